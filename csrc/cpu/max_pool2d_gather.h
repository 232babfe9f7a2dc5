// The gradient of max-pooling by gathering: a cell adds dy from each window that holds it and whose tap names
// it.
#pragma once

#include "cpu/max_pool2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// NCHW with small windows of one-byte taps; false for those that are better scattered.
template <class T>
bool max_pool2d_backward_nchw(const MaxPool2dParams& params);

constexpr int kBlocks = 4;  // vectors of cells at a time

// A window that holds a pixel: where its channels begin, and the pixel's tap in it.
struct Term {
  int64_t offset;
  int64_t tap;
};

// kCount vectors of neighbouring cells, or the first `lanes` of one.
template <class T, class Tap, int kCount, class Out>
CUDA_CNN_INLINE void gather_vectors(const Term* terms, int64_t count, const T* dy, const Tap* taps, Out* dx,
                                    int64_t lanes = kLanes<T>) {
  Vec<Accumulator<T>> total[kCount] = {};
  for (int64_t k = 0; k < count; ++k) {
    const TapLanes<T> wanted = TapLanes<T>{} + static_cast<TapLane<T>>(terms[k].tap);
#pragma GCC unroll 4
    for (int b = 0; b < kCount; ++b) {
      const int64_t at = terms[k].offset + b * kLanes<T>;
      total[b] += load_taps<T>(taps + at) == wanted ? load(dy + at) : Vec<Accumulator<T>>{};
    }
  }
  if (lanes < kLanes<T>) return store_first(dx, total[0], lanes);
  for (int b = 0; b < kCount; ++b) store(dx + b * kLanes<T>, total[b]);
}

// `cells` neighbouring cells: a pixel's channels or, of scratch that may be read past the end, any number.
template <class T, class Tap, class Out>
CUDA_CNN_INLINE void gather_cells(const Term* terms, int64_t count, int64_t cells, const T* dy,
                                  const Tap* taps, Out* dx) {
  constexpr int64_t kStep = kLanes<T>;
  if (cells < kStep) return gather_vectors<T, Tap, 1>(terms, count, dy, taps, dx, cells);
  int64_t c = 0;
  for (; c + kBlocks * kStep <= cells; c += kBlocks * kStep) {
    gather_vectors<T, Tap, kBlocks>(terms, count, dy + c, taps + c, dx + c);
  }
  for (; c < cells; c += kStep) {
    const int64_t from = min64(c, cells - kStep);  // the last vector overlaps the one before
    gather_vectors<T, Tap, 1>(terms, count, dy + from, taps + from, dx + from);
  }
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
