// Forward and input gradient as correlations of the image with packed filters: by matrix products (gemm.cpp)
// or by Winograd's algorithm (winograd.cpp).
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/filters.h"
#include "cpu/conv2d/gemm.h"
#include "cpu/conv2d/winograd.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// Below so many elements packing is not worth a second thread.
constexpr int64_t kPackGrain = 65536;

// All panels, then their product with the image's matrix.
template <class T>
void correlate_packed(const Conv2dParams& p, const Gather<T>& gather, const Scatter<T>& scatter,
                      const Filters<T>& filters) {
  using Acc = Accumulator<T>;
  const int64_t panel_size = filters.depth() * kTileColumns<Acc>;
  const int64_t panels = ceil_div(filters.columns(), kTileColumns<Acc>);
  Acc* packed = workspace<Acc>(Workspace::kShared, p.groups * panels * panel_size);
  parallel_for(p.groups * panels, ceil_div(kPackGrain, panel_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_filters(filters, i / panels, i % panels * kTileColumns<Acc>, packed + i * panel_size);
    }
  });
  correlate(gather, scatter, packed, p.N, p.groups, filters.columns());
}

template <class T>
Filters<T> make_filters(const Conv2dParams& p) {
  return {static_cast<const T*>(p.weight), p.R, p.S, p.C / p.groups, p.K / p.groups, false, {}, {}};
}

template <class T>
Scatter<T> forward_scatter(const Conv2dParams& p) {
  Scatter<T> scatter{static_cast<T*>(p.y), p.P, p.Q, p.y_pixel};
  scatter.bias = static_cast<const T*>(p.bias);
  scatter.residual = static_cast<const T*>(p.residual);
  scatter.residual_pixel = p.residual_pixel;
  scatter.relu = p.relu;
  return scatter;
}

// The input gradient's phase (h, w): a correlation of stride 1 over dy.
template <class T>
Gather<T> phase_gather(const Conv2dParams& p, const Conv2dPhase& h, const Conv2dPhase& w) {
  return {static_cast<const T*>(p.dy),
          p.P,
          p.Q,
          p.y_pixel,
          h.count,
          w.count,
          1,
          1,
          h.base - (h.taps - 1) * h.dy_step,
          w.base - (w.taps - 1) * w.dy_step,
          h.taps,
          w.taps,
          h.dy_step,
          w.dy_step,
          p.K / p.groups};
}

template <class T>
Scatter<T> phase_scatter(const Conv2dParams& p, const Conv2dPhase& h, const Conv2dPhase& w) {
  return {static_cast<T*>(p.dx), p.H, p.W, p.x_pixel, h.first, w.first, p.stride_h, p.stride_w};
}

// With few channels (a network's first layer) the phases of a row are computed together, as the channels of
// one pixel `stride_w` pixels wide: its columns (pixel, channel) fill the vectors that `C` of them would not.
// Its taps are those of all phases: offsets first .. first + count - 1 in dy.
struct WidePixel {
  int64_t first, count;
};

WidePixel wide_pixel(const Conv2dParams& p) {
  int64_t first = p.Q, last = -p.S;
  for (int64_t b = 0; b < p.stride_w; ++b) {
    const Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
    if (w.taps == 0) continue;
    first = min64(first, w.base - (w.taps - 1) * w.dy_step);
    last = max64(last, w.base);
  }
  return {first, last - first + 1};
}

// Wide pixels of a row; 0 where vectors of single ones are fewer.
template <class T>
int64_t wide_pixels(const Conv2dParams& p) {
  if (p.groups != 1 || p.x_pixel != p.C || p.stride_w == 1) return 0;
  const WidePixel wide = wide_pixel(p);
  const int64_t wide_vectors = ceil_div(p.C * p.stride_w, kLanes<T>) * wide.count;
  return wide.count > 0 && wide_vectors < ceil_div(p.C, kLanes<T>) * p.S ? p.W / p.stride_w : 0;
}

// The filters' panels [tap, offset, output channel][kTileColumns] of wide pixels.
template <class T>
void pack_wide_filters(const Conv2dParams& p, const Conv2dPhase& h, const WidePixel& wide,
                       Accumulator<T>* panels) {
  using Acc = Accumulator<T>;
  const int64_t depth = h.taps * wide.count * p.K;
  for (int64_t column = 0; column < p.stride_w * p.C; ++column) {
    const Conv2dPhase w = conv2d_phase(column / p.C, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
    Acc* to = panels + column / kTileColumns<Acc> * depth * kTileColumns<Acc> + column % kTileColumns<Acc>;
    for (int64_t r = h.taps - 1; r >= 0; --r) {
      for (int64_t offset = wide.first; offset < wide.first + wide.count; ++offset) {
        const int64_t tap = (w.base - offset) / w.dy_step;
        const bool reached = offset <= w.base && tap < w.taps && tap * w.dy_step == w.base - offset;
        const int64_t at = (h.tap + r * h.tap_step) * p.S + w.tap + tap * w.tap_step;
        const T* from = static_cast<const T*>(p.weight) + at * p.C + column % p.C;
        for (int64_t k = 0; k < p.K; ++k, to += kTileColumns<Acc>) {
          *to = reached ? widen(from[k * p.R * p.S * p.C]) : Acc{};
        }
      }
    }
  }
}

// The rows of phase h, pixels [0, count * stride_w) of them.
template <class T>
void correlate_wide(const Conv2dParams& p, const Conv2dPhase& h, int64_t count) {
  using Acc = Accumulator<T>;
  const WidePixel wide = wide_pixel(p);
  const int64_t columns = p.stride_w * p.C;
  const int64_t size = ceil_div(columns, kTileColumns<Acc>) * kTileColumns<Acc> * h.taps * wide.count * p.K;
  Acc* panels = workspace<Acc>(Workspace::kShared, size);
  for (int64_t i = 0; i < size; ++i) panels[i] = 0;
  pack_wide_filters<T>(p, h, wide, panels);
  const Conv2dPhase w{0, count, 0, 0, wide.count, wide.first + wide.count - 1, 1};
  correlate(phase_gather<T>(p, h, w), phase_scatter<T>(p, h, w), panels, p.N, 1, columns);
}

// Pixels of a phase that no tap reaches.
template <class T>
void zero_phase(const Conv2dParams& p, const Conv2dPhase& h, const Conv2dPhase& w) {
  parallel_for(p.N * h.count, ceil_div(kPackGrain, w.count * p.C + 1), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / h.count * p.H + h.first + i % h.count * p.stride_h;
      for (int64_t j = 0; j < w.count; ++j) {
        T* to = static_cast<T*>(p.dx) + (row * p.W + w.first + j * p.stride_w) * p.x_pixel;
        for (int64_t c = 0; c < p.C; ++c) to[c] = T{};
      }
    }
  });
}

}  // namespace

template <class T>
void forward_gemm(const Conv2dParams& p) {
  correlate_packed(p, forward_gather<T>(p), forward_scatter<T>(p), make_filters<T>(p));
}

void forward_winograd(const Conv2dParams& p) {
  correlate_winograd(forward_gather<float>(p), forward_scatter<float>(p), make_filters<float>(p), p.N,
                     p.groups);
}

template <class T>
void input_grad_gemm(const Conv2dParams& p) {
  const int64_t wide = wide_pixels<T>(p);
  for (int64_t a = 0; a < min64(p.stride_h, p.H); ++a) {
    const Conv2dPhase h = conv2d_phase(a, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    const int64_t done = h.taps == 0 ? 0 : wide;
    if (done > 0) correlate_wide<T>(p, h, done);
    for (int64_t b = 0; b < min64(p.stride_w, p.W); ++b) {
      Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      w.first += done * p.stride_w, w.base += done, w.count -= done;
      if (w.count == 0) continue;
      if (h.taps == 0 || w.taps == 0) {
        zero_phase<T>(p, h, w);
      } else {
        Filters<T> filters = make_filters<T>(p);
        filters.transposed = true, filters.h = h, filters.w = w;
        correlate_packed(p, phase_gather<T>(p, h, w), phase_scatter<T>(p, h, w), filters);
      }
    }
  }
}

void input_grad_winograd(const Conv2dParams& p) {
  const Conv2dPhase h = conv2d_phase(0, p.H, p.R, 1, p.pad_h, 1),
                    w = conv2d_phase(0, p.W, p.S, 1, p.pad_w, 1);
  Filters<float> filters = make_filters<float>(p);
  filters.transposed = true, filters.h = h, filters.w = w;
  correlate_winograd(phase_gather<float>(p, h, w), phase_scatter<float>(p, h, w), filters, p.N, p.groups);
}

#define INSTANTIATE(T)                                \
  template void forward_gemm<T>(const Conv2dParams&); \
  template void input_grad_gemm<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
