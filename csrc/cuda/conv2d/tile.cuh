// Tiles in shared memory, in 16-byte chunks placed so that neither the copies into them nor the reads of
// fragments meet in a bank.
//
//   ReductionRows     [row][reduction]: a row holds 64 bytes of the reduction. Forward, input gradient.
//   ReductionColumns  [reduction][column]: as NHWC memory lies for sums over pixels. Weight gradient.
//
// Both give the fragments of mma.sync (layouts in cuda/ptx.cuh): load_a one of 16 rows, load_b two of 8
// columns. A step is 32 bytes of the reduction: 16 elements of 16 bits, 8 of TF32.
#pragma once

#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda::conv2d {

constexpr int kThreads = 128;  // 2 x 2 warps
constexpr int kChunkBytes = 16;
constexpr int kReductionBytes = 64;  // of one tile
constexpr int kSteps = 2;            // of one tile

template <class T>
constexpr int kDepth = kReductionBytes / sizeof(T);  // of one tile, in elements

template <class T>
struct ReductionRows {
  static constexpr bool kReductionContiguous = true;

  // Two rows share a line of 32 banks; the line's number exchanges the four chunks.
  HOST_DEVICE static uint32_t offset(int row, int chunk) {
    return row * kReductionBytes + ((chunk ^ (row >> 1 & 3)) << 4);
  }
  __device__ __forceinline__ static void load_a(uint32_t (&a)[4], uint32_t tile, int row, int step,
                                                int lane) {
    ptx::load_matrix<4>(a, tile + offset(row + (lane & 15), 2 * step + (lane >> 4)));
  }
  __device__ __forceinline__ static void load_b(uint32_t (&b)[4], uint32_t tile, int column, int step,
                                                int lane) {
    ptx::load_matrix<4>(b, tile + offset(column + (lane & 7) + (lane >> 4) * 8, 2 * step + (lane >> 3 & 1)));
  }
};

template <class T, int kColumns>
struct ReductionColumns {
  static constexpr bool kReductionContiguous = false;
  static constexpr int kPitch = kColumns * int(sizeof(T));

  // 16 bits: ldmatrix reads one chunk of 8 rows, which the row's number spreads over all banks.
  // Wider: a warp reads 8 neighbours of 4 rows in 32 bits, so every row moves by 8 words.
  HOST_DEVICE static uint32_t offset(int row, int chunk) {
    return row * kPitch + ((chunk ^ (sizeof(T) == 2 ? row & 7 : (row & 3) * 2)) << 4);
  }
  __device__ __forceinline__ static void load_a(uint32_t (&a)[4], uint32_t tile, int column, int step,
                                                int lane) {
    if constexpr (sizeof(T) == 2) {
      const int row = step * 16 + (lane & 7) + (lane >> 4) * 8;
      ptx::load_matrix<4, true>(a, tile + offset(row, column / 8 + (lane >> 3 & 1)));
    } else {
      const int row = step * 8 + lane % 4, at = column + lane / 4;
      a[0] = load_word(tile, row, at);
      a[1] = load_word(tile, row, at + 8);
      a[2] = load_word(tile, row + 4, at);
      a[3] = load_word(tile, row + 4, at + 8);
    }
  }
  __device__ __forceinline__ static void load_b(uint32_t (&b)[4], uint32_t tile, int column, int step,
                                                int lane) {
    if constexpr (sizeof(T) == 2) {
      const int row = step * 16 + (lane & 15);
      ptx::load_matrix<4, true>(b, tile + offset(row, column / 8 + (lane >> 4)));
    } else {
      const int row = step * 8 + lane % 4, at = column + lane / 4;
      b[0] = load_word(tile, row, at);
      b[1] = load_word(tile, row + 4, at);
      b[2] = load_word(tile, row, at + 8);
      b[3] = load_word(tile, row + 4, at + 8);
    }
  }
  __device__ __forceinline__ static uint32_t load_word(uint32_t tile, int row, int column) {
    return ptx::load_shared<uint32_t>(tile + offset(row, column / 4) + column % 4 * 4);
  }
};

}  // namespace cuda_cnn::cuda::conv2d
