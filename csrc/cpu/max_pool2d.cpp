// Max-pooling on the CPU; formulas and the meaning of a tap: kernels/max_pool2d.h.
//
// NHWC, here: output rows over threads; vectors lie along the channels, kBlocks of them at a time, so that
// the chains of compare and select overlap. Contiguous: max_pool2d_nchw.cpp. Gradients:
// max_pool2d_backward.cpp.
#include "cpu/max_pool2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int kBlocks = 4;

// The taps of a window that lie inside the plane along one axis, and the cell of the first.
struct Taps {
  int64_t begin, end, cell;

  Taps(const PoolAxis& a, int64_t out) : begin(first_tap(a, out)), end(end_tap(a, out)) {
    cell = window_start(a, out) + begin * a.dilation;
  }
};

// What one output pixel's kernels need; pointers at channel 0.
template <class T, class Tap>
struct Pixel {
  const T* cell;  // of the first tap inside
  int64_t row_step, column_step;
  Taps r, s;
  int64_t kernel_w;
  int64_t checked;  // columns of taps to look at for NaN: the next pixel of the row sees the others
  T* y;
  Tap* taps;
};

// Channels [c, c + kCount vectors), or `count` of them where they are fewer than a vector. A NaN or an
// infinity leaves NaN in check: with kFinite the result is void then.
template <class T, class Tap, bool kTrack, bool kFinite, int kCount, bool kWhole>
CUDA_CNN_INLINE void pool_channels(const Pixel<T, Tap>& pixel, int64_t c, int64_t count,
                                   Vec<Accumulator<T>>& check) {
  constexpr int kStep = kLanes<T>;
  Vec<Accumulator<T>> best[kCount];
  TapLanes<T> tap[kCount];
  for (int b = 0; b < kCount; ++b) {
    best[b] = lowest<Accumulator<T>>();
    tap[b] = TapLanes<T>{} + static_cast<TapLane<T>>(pixel.r.begin * pixel.kernel_w + pixel.s.begin);
  }
  const T* row = pixel.cell + c;
  for (int64_t r = pixel.r.begin; r < pixel.r.end; ++r, row += pixel.row_step) {
    const T* p = row;
    for (int64_t s = pixel.s.begin; s < pixel.s.end; ++s, p += pixel.column_step) {
      const TapLanes<T> here = TapLanes<T>{} + static_cast<TapLane<T>>(r * pixel.kernel_w + s);
#pragma GCC unroll 4
      for (int b = 0; b < kCount; ++b) {
        const Vec<Accumulator<T>> v = kWhole ? load(p + b * kStep) : load_first(p, count);
        if (kFinite && s < pixel.checked) check = fma(v, Vec<Accumulator<T>>{}, check);
        take_greater<kTrack, kFinite>(v, here, best[b], tap[b]);
      }
    }
  }
  for (int b = 0; b < kCount; ++b, c += kStep) {
    if constexpr (kWhole) {
      store(pixel.y + c, best[b]);
      if constexpr (kTrack) store_taps<T>(pixel.taps + c, tap[b]);
    } else {
      store_first(pixel.y + c, best[b], count);
      if constexpr (kTrack) store_first_taps<T>(pixel.taps + c, tap[b], count);
    }
  }
}

template <class T, class Tap, bool kTrack, bool kFinite>
CUDA_CNN_INLINE void pool_pixel(const Pixel<T, Tap>& pixel, int64_t channels, Vec<Accumulator<T>>& check) {
  constexpr int64_t kStep = kLanes<T>;
  if (channels < kStep) return pool_channels<T, Tap, kTrack, kFinite, 1, false>(pixel, 0, channels, check);
  int64_t c = 0;
  for (; c + kBlocks * kStep <= channels; c += kBlocks * kStep) {
    pool_channels<T, Tap, kTrack, kFinite, kBlocks, true>(pixel, c, kStep, check);
  }
  for (; c < channels; c += kStep) {  // the last vector overlaps the one before
    pool_channels<T, Tap, kTrack, kFinite, 1, true>(pixel, min64(c, channels - kStep), kStep, check);
  }
}

// Output row `row` of all the batch's rows. True if the input was finite.
template <class T, class Tap, bool kTrack, bool kFinite>
bool pool_row(const MaxPool2dParams& params, int64_t row, const Taps* columns) {
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t channels = params.channels;
  const Taps r(h, row % h.out);
  const T* cells = static_cast<const T*>(params.input) + (row / h.out * h.in + r.cell) * w.in * channels;
  Vec<Accumulator<T>> check = {};
  for (int64_t q = 0; q < w.out; ++q) {
    const int64_t at = (row * w.out + q) * channels;
    const Pixel<T, Tap> pixel = {cells + columns[q].cell * channels,
                                 h.dilation * w.in * channels,
                                 w.dilation * channels,
                                 r,
                                 columns[q],
                                 w.kernel,
                                 w.dilation == 1 && q + 1 < w.out ? w.stride : w.kernel,
                                 static_cast<T*>(params.output) + at,
                                 kTrack ? static_cast<Tap*>(params.taps) + at : nullptr};
    pool_pixel<T, Tap, kTrack, kFinite>(pixel, channels, check);
  }
  return sum(check) == 0;
}

template <class T, class Tap, bool kTrack>
void forward(const MaxPool2dParams& params) {
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t channels = params.channels;
  Taps* columns = workspace<Taps>(Workspace::kShared, w.out);
  for (int64_t q = 0; q < w.out; ++q) columns[q] = Taps(w, q);
  parallel_for(params.batch * h.out, grain_of(w.out * channels), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (!pool_row<T, Tap, kTrack, true>(params, row, columns)) {
        pool_row<T, Tap, kTrack, false>(params, row, columns);
      }
      if (!kTrack || params.indices == nullptr) continue;
      for (int64_t k = row * w.out * channels; k < (row + 1) * w.out * channels; ++k) {
        params.indices[k] =
            tap_index(h, w, row % h.out, k / channels % w.out, static_cast<const Tap*>(params.taps)[k]);
      }
    }
  });
}

}  // namespace

void max_pool2d(const MaxPool2dParams& params) {
  if (!params.channels_last) return max_pool2d_nchw(params);
  dispatch_pool(params, [&](auto element, auto tap) {
    return params.taps ? forward<decltype(element), decltype(tap), true>(params)
                       : forward<decltype(element), decltype(tap), false>(params);
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
