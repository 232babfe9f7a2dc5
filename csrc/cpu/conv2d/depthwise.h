// What the depthwise kernels share (depthwise.cpp): lanes are channels, two vectors of them at a time, and
// filters and their gradients lie in panels [panel][tap][i][kTileColumns].
#pragma once

#include "cpu/conv2d/pack.h"
#include "cpu/conv2d/prefetch.h"
#include "cpu/conv2d/transpose.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

constexpr int64_t kDepthwiseGrain = 65536;  // multiply-adds worth a thread

// Tap (r, s) of a correlation lies `first + r*step_r + s*step_s` behind a panel's start.
template <class Acc>
struct NarrowFilters {
  const Acc* panels;
  int64_t panel_size, first, step_r, step_s;

  const Acc* of_channel(int64_t c) const {
    return panels + c / kTileColumns<Acc> * panel_size + c % kTileColumns<Acc> + first;
  }
};

// p[j] for the vectors of a step, `left` channels of them in use.
template <class T, int kVectors>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_vector(const T* p, int j, int64_t left) {
  p += j * kLanes<T>;
  return kVectors > 1 || left >= kLanes<T> ? load(p) : load_first(p, left);
}

// Lane k holds lane i of the kChannels lanes around k.
template <class Acc, int kChannels, int i>
CUDA_CNN_INLINE Vec<Acc> spread(Vec<Acc> x) {
  if constexpr (kChannels == 1) {
    return x;
  } else {
#if defined(__clang__)  // has no __builtin_shuffle, and finds the shuffle in this by itself
    Vec<Acc> out = {};
    for (int k = 0; k < kLanes<Acc>; ++k) out[k] = x[k / kChannels * kChannels + i];
    return out;
#else
    typedef typename LaneIndexOf<Acc>::type Index __attribute__((vector_size(kVectorBytes)));
    Index index = {};
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<Acc>; ++k) index[k] = k / kChannels * kChannels + i;
    return __builtin_shuffle(x, index);
#endif
  }
}

// The range of taps whose input lies inside [0, extent), for an output that starts to read at `start`.
CUDA_CNN_INLINE void clip(int64_t start, int64_t step, int64_t extent, int64_t taps, int64_t* begin,
                          int64_t* end) {
  *begin = start < 0 ? min64(ceil_div(-start, step), taps) : 0;
  *end = start >= extent ? *begin : max64(*begin, min64(taps, (extent - 1 - start) / step + 1));
}

// Asks for the rows of the source that output row `row` + 1 reads and row `row` does not: of all images,
// where one ends too.
template <class T>
Prefetch prefetch_next_rows(const Gather<T>& g, int64_t row, int64_t N, int64_t C) {
  const auto last_row = [&](int64_t i) {
    const int64_t last = g.base_h + i % g.P * g.stride_h + (g.R - 1) * g.tap_h;
    return i / g.P * g.H + max64(-1, min64(g.H - 1, last));
  };
  const int64_t begin = last_row(row) + 1, end = row + 1 < N * g.P ? last_row(row + 1) + 1 : begin;
  return prefetch_rows(g.source + begin * g.W * g.pixel, g.pixel, C, (end - begin) * g.W);
}

// The channels of a group that a kernel is made for: fn(a type with kChannels).
template <int kCount>
struct Channels {
  static constexpr int kChannels = kCount;
};
template <class T, class Fn>
void dispatch_channels(int64_t channels, const Fn& fn) {
  constexpr int kMost = kLanes<T>;
  if (channels == 1) return fn(Channels<1>{});
  if (channels == 2) return fn(Channels<2>{});
  if constexpr (kMost >= 4) {
    if (channels == 4) return fn(Channels<4>{});
  }
  if constexpr (kMost >= 8) {
    if (channels == 8) return fn(Channels<8>{});
  }
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
