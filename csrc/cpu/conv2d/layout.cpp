// NCHW to NHWC and back: a matrix transposition an image, in squares of one vector each way. A task takes a
// strip of columns, so that what it reads of a row and what it writes of a column are whole cache lines.
#include "cpu/conv2d/prefetch.h"
#include "cpu/conv2d/transpose.h"
#include "cpu/parallel.h"
#include "kernels/conv2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kStrip = 64;
constexpr int64_t kGrain = 65536;  // elements worth a thread

template <class T>
void transpose_square(const T* from, int64_t rows, int64_t columns, T* to, int64_t row_count,
                      int64_t column_count) {
  using Acc = Accumulator<T>;
  constexpr int64_t kWidth = kLanes<Acc>;
  Vec<Acc> square[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) {
    const T* row = from + i * columns;
    square[i] = i >= row_count           ? Vec<Acc>{}
                : column_count == kWidth ? load(row)
                                         : load_first(row, column_count);
  }
  transpose<Acc>(square);
  for (int64_t j = 0; j < column_count; ++j) {
    if (row_count == kWidth) {
      store(to + j * rows, square[j]);
    } else {
      store_first(to + j * rows, square[j], row_count);
    }
  }
}

template <class T>
void transpose_strips(const Conv2dTransposeParams& p) {
  constexpr int64_t kWidth = kLanes<T>;
  const int64_t strips = ceil_div(p.columns, kStrip);
  parallel_for(p.count * strips, ceil_div(kGrain, kStrip * p.rows), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % strips * kStrip, last = min64(first + kStrip, p.columns);
      const T* from = static_cast<const T*>(p.from) + task / strips * p.rows * p.columns;
      T* to = static_cast<T*>(p.to) + task / strips * p.rows * p.columns;
      for (int64_t row = 0; row < p.rows; row += kWidth) {
        // The rows that come next, and what is written of them: too many streams to be foreseen.
        const T* ahead = from + (row + kWidth) * p.columns + first;
        for (int64_t i = 0; i < kWidth; ++i) prefetch_to_l2(ahead + i * p.columns, last - first);
        for (int64_t column = first; column < last; column += kWidth) {
          prefetch_output(to + column * p.rows + row + kWidth, p.rows, kWidth, 1);
          transpose_square(from + row * p.columns + column, p.rows, p.columns, to + column * p.rows + row,
                           min64(p.rows - row, kWidth), min64(last - column, kWidth));
        }
      }
    }
  });
}

}  // namespace

void conv2d_transpose(const Conv2dTransposeParams& params) {
  if (params.count * params.rows * params.columns == 0) return;
  dispatch_dtype(params.dtype, [&](auto type) { transpose_strips<decltype(type)>(params); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
