// Forward and input gradient of a layer of few pixels: a fully connected one, or the last of a network. Its
// weight is all the work: read once, where it lies, at the memory's pace. Packing it, or a panel's columns
// of kLanes filters, would take longer.
//   y[m][k]  = sum over c of x[m][c] * w[k][c]     vectors along c, a few pixels by a few filters in
//   registers dx[m][c] = sum over k of dy[m][k] * w[k][c]    rows of w pass by a block of dx that stays in L1
// Sums are in chains of kChain, joined in their order; tasks cut what is not summed over.
#include <type_traits>

#include "cpu/conv2d/algorithms.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int kPixelsAtOnce = 4;
// 12 sums, 3 of w and one of x in 16 registers; in 32 twice as many filters: x, from L2, is read half as
// often.
constexpr int kFiltersAtOnce = kLanes<float> == 16 ? 6 : 3;
constexpr int kRowsAtOnce = 8;  // of w, in registers; then a sum and a broadcast
// Of dx, a thread takes blocks of columns: of a weight in L2 so few that their sums are half of L1; of a
// larger one rows that are long enough for the prefetchers.
constexpr int64_t kBlockSums = 4096;
constexpr int64_t kLongBlock = 1024;
constexpr int64_t kLargeWeight = 1572864;       // bytes
constexpr int64_t kSumsStep = kLongBlock + 16;  // keeps the pixels off one another's cache sets
constexpr int64_t kChain = 128;
constexpr int64_t kMultiplyAddsAThread = 100000;

template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_up_to(const T* p, int64_t left) {
  return left >= kLanes<T> ? load(p) : load_first(p, left);
}

// sums[i * kFiltersAtOnce + j] = sum over c of x[i][c] * w[j][c]
template <class T, int kPixels, int kFilters>
void dot_products(const T* x, int64_t x_step, const T* w, int64_t depth, Accumulator<T>* sums) {
  using Acc = Accumulator<T>;
  Vec<Acc> totals[kPixels][kFilters] = {};
  for (int64_t begin = 0; begin < depth; begin += kChain * kLanes<T>) {
    const int64_t end = min64(depth, begin + kChain * kLanes<T>);
    Vec<Acc> chains[kPixels][kFilters] = {};
    const auto add = [&](int64_t c, const auto& values) __attribute__((always_inline)) {
      Vec<Acc> filters[kFilters];
      for (int j = 0; j < kFilters; ++j) filters[j] = values(w + j * depth + c);
      for (int i = 0; i < kPixels; ++i) {
        const Vec<Acc> pixel = values(x + i * x_step + c);
        for (int j = 0; j < kFilters; ++j) chains[i][j] = fma(pixel, filters[j], chains[i][j]);
      }
    };
    int64_t c = begin;
    for (; c + kLanes<T> <= end; c += kLanes<T>) add(c, [](const T* p) { return load(p); });
    if (c < end) add(c, [&](const T* p) { return load_first(p, end - c); });
    for (int i = 0; i < kPixels; ++i) {
      for (int j = 0; j < kFilters; ++j) totals[i][j] += chains[i][j];
    }
  }
  for (int i = 0; i < kPixels; ++i) {
    for (int j = 0; j < kFilters; ++j) sums[i * kFiltersAtOnce + j] = sum(totals[i][j]);
  }
}

// part[i][c] += sum over the rows of w of g[i][row] * w[row][c]
template <class T, int kPixels, int kRows>
void add_rows(const T* w, int64_t depth, const Accumulator<T>* g, int64_t g_step, int64_t columns,
              Accumulator<T>* part) {
  using Acc = Accumulator<T>;
  for (int64_t c = 0; c < columns; c += kLanes<T>) {
    Vec<Acc> rows[kRows];
    for (int j = 0; j < kRows; ++j) rows[j] = load_up_to(w + j * depth + c, columns - c);
    for (int i = 0; i < kPixels; ++i) {
      Acc* to = part + i * kSumsStep + c;
      Vec<Acc> total = load(to);
      for (int j = 0; j < kRows; ++j) total = fma(broadcast(g[i * g_step + j]), rows[j], total);
      store(to, total);
    }
  }
}

// fn(std::integral_constant) for a count from 1 to kPixelsAtOnce.
template <class Fn>
CUDA_CNN_INLINE void with_pixels(int64_t count, const Fn& fn) {
  switch (count) {
    case 1:
      return fn(std::integral_constant<int, 1>{});
    case 2:
      return fn(std::integral_constant<int, 2>{});
    case 3:
      return fn(std::integral_constant<int, 3>{});
    default:
      return fn(std::integral_constant<int, kPixelsAtOnce>{});
  }
}

// y of filters [k, k + filters) at pixels [m, m + count).
template <class T>
void finish(const Conv2dParams& p, int64_t m, int64_t count, int64_t k, int64_t filters,
            const Accumulator<T>* sums) {
  using Acc = Accumulator<T>;
  const T *bias = static_cast<const T*>(p.bias), *residual = static_cast<const T*>(p.residual);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < filters; ++j) {
      Acc value = sums[i * kFiltersAtOnce + j];
      if (bias) value += widen(bias[k + j]);
      if (residual) value += widen(residual[(m + i) * p.residual_pixel + k + j]);
      if (p.relu && value < 0) value = 0;
      static_cast<T*>(p.y)[(m + i) * p.y_pixel + k + j] = narrow<T>(value);
    }
  }
}

template <class T>
void forward_filters(const Conv2dParams& p, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(p.x), *w = static_cast<const T*>(p.weight);
  const int64_t pixels = p.N * p.P * p.Q;
  Accumulator<T> sums[kPixelsAtOnce * kFiltersAtOnce];
  for (int64_t k = begin; k < end;) {
    const int64_t filters = end - k >= kFiltersAtOnce ? kFiltersAtOnce : end - k >= 3 ? 3 : 1;
    for (int64_t m = 0; m < pixels; m += kPixelsAtOnce) {
      const int64_t count = min64(kPixelsAtOnce, pixels - m);
      with_pixels(count, [&](auto n) {
        const auto dot = filters == kFiltersAtOnce ? &dot_products<T, n.value, kFiltersAtOnce>
                         : filters == 3            ? &dot_products<T, n.value, 3>
                                                   : &dot_products<T, n.value, 1>;
        dot(x + m * p.x_pixel, p.x_pixel, w + k * p.C, p.C, sums);
      });
      finish<T>(p, m, count, k, filters, sums);
    }
    k += filters;
  }
}

// Columns [first, first + columns) of dx; g is dy, K apart.
template <class T>
void gradient_columns(const Conv2dParams& p, const Accumulator<T>* g, int64_t first, int64_t columns) {
  using Acc = Accumulator<T>;
  const int64_t pixels = p.N * p.P * p.Q, size = pixels * kSumsStep;
  Acc *part = workspace<Acc>(Workspace::kA, 2 * size), *total = part + size;
  const auto for_vectors = [&](const auto& fn) {
    for (int64_t i = 0; i < size; i += kSumsStep) {
      for (int64_t c = 0; c < columns; c += kLanes<Acc>) fn(i + c);
    }
  };
  for_vectors([&](int64_t i) { store(total + i, Vec<Acc>{}); });
  for (int64_t begin = 0; begin < p.K; begin += kChain) {
    const int64_t end = min64(p.K, begin + kChain);
    for_vectors([&](int64_t i) { store(part + i, Vec<Acc>{}); });
    for (int64_t k = begin; k < end;) {
      const bool several = end - k >= kRowsAtOnce;
      const T* rows = static_cast<const T*>(p.weight) + k * p.C + first;
      for (int64_t m = 0; m < pixels; m += kPixelsAtOnce) {
        with_pixels(min64(kPixelsAtOnce, pixels - m), [&](auto n) {
          const auto add = several ? &add_rows<T, n.value, kRowsAtOnce> : &add_rows<T, n.value, 1>;
          add(rows, p.C, g + m * p.K + k, p.K, columns, part + m * kSumsStep);
        });
      }
      k += several ? kRowsAtOnce : 1;
    }
    for_vectors([&](int64_t i) { store(total + i, load(total + i) + load(part + i)); });
  }
  for (int64_t m = 0; m < pixels; ++m) {
    T* to = static_cast<T*>(p.dx) + m * p.x_pixel + first;
    for (int64_t c = 0; c < columns; ++c) to[c] = narrow<T>(total[m * kSumsStep + c]);
  }
}

}  // namespace

template <class T>
void forward_few_pixels(const Conv2dParams& p) {
  parallel_for(p.K, ceil_div(kMultiplyAddsAThread, p.N * p.P * p.Q * p.C),
               [&](int64_t begin, int64_t end) { forward_filters<T>(p, begin, end); });
}

template <class T>
void input_grad_few_pixels(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t pixels = p.N * p.P * p.Q;
  Acc* g = workspace<Acc>(Workspace::kShared, pixels * p.K);
  for (int64_t m = 0; m < pixels; ++m) {
    for (int64_t k = 0; k < p.K; ++k) g[m * p.K + k] = widen(static_cast<const T*>(p.dy)[m * p.y_pixel + k]);
  }
  const bool large = p.K * p.C * static_cast<int64_t>(sizeof(T)) > kLargeWeight;
  const int64_t most = large ? kLongBlock : min64(kLongBlock, kBlockSums / pixels);
  const int64_t blocks = ceil_div(ceil_div(p.C, most), num_threads()) * num_threads();
  const int64_t block = ceil_div(p.C, blocks * kLanes<T>) * kLanes<T>;
  const int64_t grain = ceil_div(kMultiplyAddsAThread, pixels * p.K * block);
  parallel_for(ceil_div(p.C, block), grain, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * block; first < min64(p.C, end * block); first += block) {
      gradient_columns<T>(p, g, first, min64(block, p.C - first));
    }
  });
}

#define INSTANTIATE(T)                                      \
  template void forward_few_pixels<T>(const Conv2dParams&); \
  template void input_grad_few_pixels<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
