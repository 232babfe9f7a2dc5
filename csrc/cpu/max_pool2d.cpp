// Max-pooling on the CPU; formulas and the meaning of a tap: kernels/max_pool2d.h.
//
// NHWC: vectors lie along the channels, kBlocks of them at a time so that a window's compare-and-select
// chains overlap. Output rows (forward) or input rows (backward) over threads. NCHW: max_pool2d_nchw.cpp. The
// gradient gathers: a cell asks each window that holds it for its tap, in window order. No atomics, every
// cell written once, the same bits for any number of threads.
#include "cpu/max_pool2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

struct TapRange {
  int64_t begin;
  int64_t end;
};

template <class T, bool kTrack, int kBlocks, bool kWhole>
CUDA_CNN_INLINE void window_max(const T* cell, int64_t row_step, int64_t column_step, TapRange r, TapRange s,
                                int64_t kernel_w, int64_t count, Vec<Accumulator<T>>* best,
                                TapLanes<T>* tap) {
  for (int b = 0; b < kBlocks; ++b) {
    best[b] = lowest<Accumulator<T>>();
    tap[b] = TapLanes<T>{} + static_cast<TapLane<T>>(r.begin * kernel_w + s.begin);
  }
  for (int64_t i = r.begin; i < r.end; ++i, cell += row_step) {
    const T* p = cell;
    for (int64_t j = s.begin; j < s.end; ++j, p += column_step) {
      const TapLanes<T> here = TapLanes<T>{} + static_cast<TapLane<T>>(i * kernel_w + j);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b) {
        take_greater<kTrack>(kWhole ? load(p + b * kLanes<T>) : load_first(p, count), here, best[b], tap[b]);
      }
    }
  }
}

// One output pixel's channels.
template <class T, class Tap, bool kTrack>
void pool_pixel(const MaxPool2dParams& params, int64_t n, int64_t p, int64_t q) {
  const PoolAxis &h = params.h, &w = params.w;
  const TapRange r = {first_tap(h, p), end_tap(h, p)}, s = {first_tap(w, q), end_tap(w, q)};
  const int64_t channels = params.channels;
  const int64_t row = window_start(h, p) + r.begin * h.dilation,
                column = window_start(w, q) + s.begin * w.dilation;
  const T* cell = static_cast<const T*>(params.input) + ((n * h.in + row) * w.in + column) * channels;
  const int64_t at = ((n * h.out + p) * w.out + q) * channels;
  T* y = static_cast<T*>(params.output) + at;
  Tap* taps = params.taps ? static_cast<Tap*>(params.taps) + at : nullptr;
  int64_t* indices = params.indices ? params.indices + at : nullptr;

  constexpr int kBlocks = 4, kStep = kLanes<T>;
  const auto pool = [&](auto blocks, auto whole, int64_t c, int64_t count) {
    constexpr int kCount = decltype(blocks)::kValue;
    constexpr bool kWhole = decltype(whole)::kValue != 0;
    Vec<Accumulator<T>> best[kCount];
    TapLanes<T> tap[kCount];
    window_max<T, kTrack, kCount, kWhole>(cell + c, h.dilation * w.in * channels, w.dilation * channels, r, s,
                                          w.kernel, count, best, tap);
    for (int b = 0; b < kCount; ++b, c += kStep) {
      if constexpr (kWhole) {
        store(y + c, best[b]);
      } else {
        store_first(y + c, best[b], count);
      }
      if constexpr (kTrack) {
        if (taps && kWhole) store_taps<T>(taps + c, tap[b]);
        if (taps && !kWhole) store_first_taps<T>(taps + c, tap[b], count);
        if (indices) {
          for (int64_t i = 0; i < count; ++i) indices[c + i] = tap_index(h, w, p, q, tap[b][i]);
        }
      }
    }
  };
  int64_t c = 0;
  for (; c + kBlocks * kStep <= channels; c += kBlocks * kStep) pool(Int<kBlocks>{}, Int<1>{}, c, kStep);
  for (; c + kStep <= channels; c += kStep) pool(Int<1>{}, Int<1>{}, c, kStep);
  if (c == channels) return;
  if (channels >= kStep) {
    pool(Int<1>{}, Int<1>{}, channels - kStep, kStep);  // overlaps the block before
  } else {
    pool(Int<1>{}, Int<0>{}, c, channels - c);
  }
}

template <class T, class Tap, bool kTrack>
void forward(const MaxPool2dParams& params) {
  const int64_t row_work = params.w.out * params.channels;
  parallel_for(params.batch * params.h.out, grain_of(row_work), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t q = 0; q < params.w.out; ++q) {
        pool_pixel<T, Tap, kTrack>(params, row / params.h.out, row % params.h.out, q);
      }
    }
  });
}

// One input pixel's channels.
template <class T, class Tap>
void collect_pixel(const MaxPool2dParams& params, int64_t n, int64_t i, int64_t j) {
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t channels = params.channels;
  const T* dy = static_cast<const T*>(params.input) + n * h.out * w.out * channels;
  const Tap* taps = static_cast<const Tap*>(params.taps) + n * h.out * w.out * channels;
  T* dx = static_cast<T*>(params.output) + ((n * h.in + i) * w.in + j) * channels;
  const TapRange rows = {first_window(h, i), end_window(h, i)},
                 columns = {first_window(w, j), end_window(w, j)};

  const auto collect = [&](int64_t c, auto whole, int64_t count) {
    constexpr bool kWhole = decltype(whole)::kValue != 0;
    Vec<Accumulator<T>> total = {};
    for (int64_t p = rows.begin; p < rows.end; ++p) {
      const int64_t r = tap_of(h, i, p);
      if (r < 0) continue;
      for (int64_t q = columns.begin; q < columns.end; ++q) {
        const int64_t s = tap_of(w, j, q);
        if (s < 0) continue;
        const int64_t at = (p * w.out + q) * channels + c;
        const TapLanes<T> tap = kWhole ? load_taps<T>(taps + at) : load_first_taps<T>(taps + at, count);
        const Vec<Accumulator<T>> g = kWhole ? load(dy + at) : load_first(dy + at, count);
        total += tap == static_cast<TapLane<T>>(r * w.kernel + s) ? g : Vec<Accumulator<T>>{};
      }
    }
    if constexpr (kWhole) {
      store(dx + c, total);
    } else {
      store_first(dx + c, total, count);
    }
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= channels; c += kLanes<T>) collect(c, Int<1>{}, kLanes<T>);
  if (c < channels) collect(c, Int<0>{}, channels - c);
}

template <class T, class Tap>
void backward(const MaxPool2dParams& params) {
  const int64_t row_work = params.w.in * params.channels;
  parallel_for(params.batch * params.h.in, grain_of(row_work), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < params.w.in; ++j) {
        collect_pixel<T, Tap>(params, row / params.h.in, row % params.h.in, j);
      }
    }
  });
}

// Second derivatives only: element by element, either layout.
template <class T, class Tap>
void gather(const MaxPool2dParams& params) {
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t channels = params.channels_last ? params.channels : 1;
  const int64_t planes = params.channels_last ? params.batch : params.batch * params.channels;
  const T* input = static_cast<const T*>(params.input);
  const Tap* taps = static_cast<const Tap*>(params.taps);
  T* output = static_cast<T*>(params.output);
  parallel_for(planes * h.out, grain_of(w.out * channels), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* plane = input + row / h.out * h.in * w.in * channels;
      for (int64_t k = 0; k < w.out * channels; ++k) {
        const int64_t q = k / channels, c = k % channels, at = row * w.out * channels + k;
        const int64_t tap = taps[at];
        const int64_t i = window_start(h, row % h.out) + tap / w.kernel * h.dilation;
        const int64_t j = window_start(w, q) + tap % w.kernel * w.dilation;
        output[at] = i >= 0 && i < h.in && j >= 0 && j < w.in ? plane[(i * w.in + j) * channels + c] : T{};
      }
    }
  });
}

}  // namespace

void max_pool2d(const MaxPool2dParams& params) {
  if (!params.channels_last) return max_pool2d_nchw(params);
  dispatch_pool(params, [&](auto element, auto tap) {
    const bool track = params.taps || params.indices;
    return track ? forward<decltype(element), decltype(tap), true>(params)
                 : forward<decltype(element), decltype(tap), false>(params);
  });
}

void max_pool2d_backward(const MaxPool2dParams& params) {
  if (!params.channels_last) return max_pool2d_backward_nchw(params);
  dispatch_pool(params, [&](auto element, auto tap) { backward<decltype(element), decltype(tap)>(params); });
}

void max_pool2d_gather(const MaxPool2dParams& params) {
  dispatch_pool(params, [&](auto element, auto tap) { gather<decltype(element), decltype(tap)>(params); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
