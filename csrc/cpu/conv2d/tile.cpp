// Register tiles. A step of depth takes two loads of B, one broadcast of A a row and two multiply-adds a row:
// 28 (AVX-512) or 12 (AVX2, SSE2) independent sums hide the multiply-adder's latency, and loads stay at half
// the multiply-adds. The addresses are written so that the loop needs few registers: see depth_contiguous.
#include "cpu/conv2d/tile.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

template <class E, int kRows, int kVectors>
CUDA_CNN_INLINE void store_tile(const Vec<Accumulator<E>> (&sums)[kRows][kVectors],
                                const TileOutput<Accumulator<E>>& out) {
  using Acc = Accumulator<E>;
  if constexpr (kDepthOf<E> == 2) {
    const auto narrow_rows = [&](const auto& place) __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        const Vec<Acc> bias = out.bias ? load(out.bias + j * kLanes<E>) : Vec<Acc>{};
#pragma GCC unroll 14
        for (int i = 0; i < kRows; ++i) {
          Vec<Acc> value = sums[i][j] + bias;
          if (out.accumulate) value += load(out.c + i * out.step + j * kLanes<E>);
          store_result<E>(out.narrowed + place(i) * out.narrowed_step + j * kLanes<E>,
                          out.relu ? relu(value) : value);
        }
      }
    };
    // Without a branch a row.
    if (out.narrowed && out.places) return narrow_rows([&](int i) { return out.places[i]; });
    if (out.narrowed) return narrow_rows([](int i) { return i; });
  }
  if (!out.bias && !out.row_bias && !out.residual && !out.relu) {  // most tiles: without a branch a vector
    const auto each = [&](const auto& value) __attribute__((always_inline)) {
      Acc* c = out.c;
#pragma GCC unroll 14
      for (int i = 0; i < kRows; ++i, c += out.step) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) store(c + j * kLanes<Acc>, value(sums[i][j], c + j * kLanes<Acc>));
      }
    };
    if (out.accumulate) return each([](Vec<Acc> sum, const Acc* c) { return sum + load(c); });
    return each([](Vec<Acc> sum, const Acc*) { return sum; });
  }
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    const Vec<Acc> bias = out.bias ? load(out.bias + j * kLanes<Acc>) : Vec<Acc>{};
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
      Acc* c = out.c + i * out.step + j * kLanes<Acc>;
      Vec<Acc> value = sums[i][j];
      if (out.accumulate) value += load(c);
      value += out.row_bias ? broadcast(out.row_bias[i]) : bias;
      if (out.residual) value += load(out.residual + i * out.residual_step + j * kLanes<Acc>);
      store(c, out.relu ? relu(value) : value);
    }
  }
}

// The lines that a tile is going to write, asked for row by row, or a few in a short sum, while it computes.
// All at once they would be more than L1 waits for at a time, and what computes would wait too.
template <class E, int kRows, int kVectors>
struct OutputAhead {
  const char* row;
  int64_t step;
  int left = kRows, at_once;

  OutputAhead(const TileOutput<Accumulator<E>>& out, int64_t times)
      : row(reinterpret_cast<const char*>(out.c)),
        step(out.step * sizeof(Accumulator<E>)),
        at_once(times >= kRows ? 1 : kRows / (times + 1) + 1) {
    if (kDepthOf<E> == 1 || !out.narrowed) return;
    row = reinterpret_cast<const char*>(out.narrowed), step = out.narrowed_step * sizeof(BFloat16);
    if (!out.places) return;
    row += out.places[0] * step;  // the others mostly as far apart as the second
    if (kRows > 1) step *= out.places[1] - out.places[0];
  }
  CUDA_CNN_INLINE void next() {
    for (int i = 0; i < at_once && left > 0; ++i, --left, row += step) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) __builtin_prefetch(row + j * kVectorBytes, 1);
    }
  }
};

// sum += a * b, in the sum's register. In a long loop g++ would have another take it here and there, then
// lack one, and a sum that passes through memory takes longer than the multiply-adds beside it.
template <class A, class Sum>
CUDA_CNN_INLINE void accumulate(Sum& sum, A a, A b) {
  sum = fma(a, b, sum);
}
#if defined(CUDA_CNN_ISA_AVX2) || defined(CUDA_CNN_ISA_AVX512)
CUDA_CNN_INLINE void accumulate(Vec<float>& sum, Vec<float> a, Vec<float> b) {
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
CUDA_CNN_INLINE void accumulate(Vec<double>& sum, Vec<double> a, Vec<double> b) {
  asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#endif

// One step of depth; value(i) points to A's element of row i.
template <class E, bool kAccumulate, int kRows, int kVectors, class Value>
CUDA_CNN_INLINE void multiply_add(Vec<Accumulator<E>> (&sums)[kRows][kVectors], const E* b,
                                  const Value& value) {
  Vec<E> columns[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    columns[j] = load(b + j * kLanes<E>);
    pin(columns[j]);
  }
#pragma GCC unroll 14
  for (int i = 0; i < kRows; ++i) {
    const Vec<E> row = broadcast_from(value(i));
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      if constexpr (kAccumulate) {
        accumulate(sums[i][j], row, columns[j]);
      } else {
        sums[i][j] = fma(row, columns[j], sums[i][j]);
      }
    }
  }
}

// A multiply-add takes 4 cycles, and two start in each: a tile of one vector has too few sums to fill them
// and keeps two of each, for steps of depth that are even and odd. The panel alone decides, never the rows:
// how many a tile has depends on how the threads cut the pixels, and the bits must not.
template <int kVectors>
constexpr int kSets = kVectors == 1 ? 2 : 1;

template <class E, int kRows, int kVectors>
CUDA_CNN_INLINE void join_sets(Vec<Accumulator<E>> (&sums)[kSets<kVectors>][kRows][kVectors]) {
  if constexpr (kSets<kVectors> > 1) {
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[0][i][j] += sums[1][i][j];
    }
  }
}

// sums += A * B over `depth`; b is left behind what was read. Rows in threes from one pointer: row i is [p],
// [p + step] or [p + 2*step], which are addressing modes.
template <class E, int kRows, int kVectors>
CUDA_CNN_INLINE void add_depth(Vec<Accumulator<E>> (&sums)[kSets<kVectors>][kRows][kVectors], const E* a,
                               int64_t a_step, const E*& b, int64_t depth,
                               OutputAhead<E, kRows, kVectors>& ahead) {
  constexpr int kUnroll = 4, kGroups = (kRows + 2) / 3;
  const E* rows[kGroups];
#pragma GCC unroll 5
  for (int g = 0; g < kGroups; ++g) rows[g] = a + 3 * g * a_step;
  const auto advance = [&](int steps) __attribute__((always_inline)) {
    b += steps * kTileColumns<E>;
#pragma GCC unroll 5
    for (int g = 0; g < kGroups; ++g) rows[g] += steps;
  };
  for (; depth >= kUnroll; depth -= kUnroll) {
    ahead.next();
#pragma GCC unroll 4
    for (int d = 0; d < kUnroll; ++d) {
      opaque(b);
#pragma GCC unroll 5
      for (int g = 0; g < kGroups; ++g) opaque(rows[g]);
      multiply_add<E, true>(sums[d % kSets<kVectors>], b + d * kTileColumns<E>,
                            [&](int i)
                                __attribute__((always_inline)) { return rows[i / 3] + i % 3 * a_step + d; });
    }
    advance(kUnroll);
  }
  for (; depth > 0; --depth) {
    multiply_add<E, true>(sums[0], b,
                          [&](int i) __attribute__((always_inline)) { return rows[i / 3] + i % 3 * a_step; });
    advance(1);
  }
}

template <class E, int kRows, int kVectors>
void depth_contiguous(const E* a, int64_t a_step, const E* b, int64_t depth,
                      const TileOutput<Accumulator<E>>& out) {
  Vec<Accumulator<E>> sums[kSets<kVectors>][kRows][kVectors] = {};
  OutputAhead<E, kRows, kVectors> ahead(out, depth / 4);
  add_depth<E, kRows, kVectors>(sums, a, a_step, b, depth, ahead);
  join_sets<E, kRows, kVectors>(sums);
  store_tile<E, kRows, kVectors>(sums[0], out);
}

template <class E, int kRows, int kVectors>
void runs_contiguous(const E* a, int64_t a_step, int64_t runs, int64_t run, int64_t run_step, const E* b,
                     const TileOutput<Accumulator<E>>& out) {
  Vec<Accumulator<E>> sums[kSets<kVectors>][kRows][kVectors] = {};
  OutputAhead<E, kRows, kVectors> ahead(out, runs * (run / 4));
  for (; runs > 0; --runs, a += run_step) add_depth<E, kRows, kVectors>(sums, a, a_step, b, run, ahead);
  join_sets<E, kRows, kVectors>(sums);
  store_tile<E, kRows, kVectors>(sums[0], out);
}

template <class E, int kRows, int kVectors>
void row_contiguous(const E* a, int64_t a_step, const E* b, int64_t depth,
                    const TileOutput<Accumulator<E>>& out) {
  constexpr int kSteps = kSets<kVectors>;
  Vec<Accumulator<E>> sums[kSteps][kRows][kVectors] = {};
  OutputAhead<E, kRows, kVectors> ahead(out, depth / 2);
  const auto step = [&](int set) __attribute__((always_inline)) {
    opaque(a);
    opaque(b);
    multiply_add<E, false>(sums[set], b, [&](int i) __attribute__((always_inline)) { return a + i; });
    a += a_step;
    b += kTileColumns<E>;
  };
  for (; depth >= kSteps; depth -= kSteps) {
    if (kSteps == 2 || depth % 2 == 0) ahead.next();
#pragma GCC unroll 2
    for (int set = 0; set < kSteps; ++set) step(set);
  }
  if (depth > 0) step(0);
  join_sets<E, kRows, kVectors>(sums);
  store_tile<E, kRows, kVectors>(sums[0], out);
}

template <class E>
struct TileTable {
  Tile<E> tiles[2][2][kTileRows + 1];             // [operand][vectors - 1][rows]
  TileOfRuns<E> tiles_of_runs[2][kTileRows + 1];  // [vectors - 1][rows]

  template <int kRows>
  constexpr void fill() {
    tiles[0][0][kRows] = depth_contiguous<E, kRows, 1>;
    tiles[0][1][kRows] = depth_contiguous<E, kRows, 2>;
    tiles[1][0][kRows] = row_contiguous<E, kRows, 1>;
    tiles[1][1][kRows] = row_contiguous<E, kRows, 2>;
    tiles_of_runs[0][kRows] = runs_contiguous<E, kRows, 1>;
    tiles_of_runs[1][kRows] = runs_contiguous<E, kRows, 2>;
    if constexpr (kRows > 1) fill<kRows - 1>();
  }
  constexpr TileTable() : tiles(), tiles_of_runs() { fill<kTileRows>(); }
};

template <class E>
constexpr TileTable<E> kTable;

}  // namespace

template <class E>
Tile<E> find_tile(TileOperand operand, int64_t rows, int64_t columns) {
  return kTable<E>.tiles[static_cast<int>(operand)][columns > kLanes<E>][rows];
}

template <class E>
TileOfRuns<E> find_tile_of_runs(int64_t rows, int64_t columns) {
  return kTable<E>.tiles_of_runs[columns > kLanes<E>][rows];
}

template Tile<float> find_tile<float>(TileOperand, int64_t, int64_t);
template Tile<double> find_tile<double>(TileOperand, int64_t, int64_t);
#if defined(CUDA_CNN_HAS_PAIRS)
template Tile<Bf16Pair> find_tile<Bf16Pair>(TileOperand, int64_t, int64_t);
template TileOfRuns<Bf16Pair> find_tile_of_runs<Bf16Pair>(int64_t, int64_t);
#endif
template TileOfRuns<float> find_tile_of_runs<float>(int64_t, int64_t);
template TileOfRuns<double> find_tile_of_runs<double>(int64_t, int64_t);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
