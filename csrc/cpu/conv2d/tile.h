// The register tile that every dense convolution here is made of:
//   C[rows][columns] += A[rows][depth] * B[depth][columns]
// for operands E of A and B, and sums of Accumulator<E>. Its depth counts E: pairs, where those are pairs.
#pragma once

#include "cpu/conv2d/operand.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// 32 registers hold 14 * 2 sums, 2 of B and a broadcast; 16 registers hold 6 * 2.
#if defined(CUDA_CNN_ISA_AVX512) || defined(__aarch64__)
constexpr int kTileRows = 14;
#else
constexpr int kTileRows = 6;
#endif
constexpr int kTileVectors = 2;
template <class E>
constexpr int kTileColumns = kTileVectors * kLanes<E>;

// B is a panel [depth][kTileColumns], whole or with its first vector alone in use.
// Of A, either the depth or the rows are contiguous; the other index has step a_step.
enum class TileOperand { kDepthContiguous, kRowContiguous };

// C = [C +] A * B [+ bias or row_bias] [+ residual], then max(C, 0) if relu.
template <class Acc>
struct TileOutput {
  Acc* c;
  int64_t step;     // between rows of C
  const Acc* bias;  // a panel's columns, or null
  bool accumulate;
  bool relu;
  const Acc* residual = nullptr;  // as C, rows residual_step apart, or null
  int64_t residual_step = 0;
  const Acc* row_bias = nullptr;  // a value a row, or null
  // Of pairs, without residual and row_bias: where the result goes, rounded, in the place of c; or null.
  BFloat16* narrowed = nullptr;
  int64_t narrowed_step = 0;
  const int64_t* places = nullptr;  // of narrowed's rows, in steps; or null: 0, 1, …
};

template <class E>
using Tile = void (*)(const E* a, int64_t a_step, const E* b, int64_t depth,
                      const TileOutput<Accumulator<E>>& out);

// The same where A's depth lies in `runs` pieces of `run`, run_step apart.
template <class E>
using TileOfRuns = void (*)(const E* a, int64_t a_step, int64_t runs, int64_t run, int64_t run_step,
                            const E* b, const TileOutput<Accumulator<E>>& out);
template <class E>
TileOfRuns<E> find_tile_of_runs(int64_t rows, int64_t columns);

// The tile of 1 <= rows <= kTileRows and as many vectors as `columns` needs.
template <class E>
Tile<E> find_tile(TileOperand operand, int64_t rows, int64_t columns);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
