// Forward and input gradient as correlations of the image with packed filters: by matrix products (gemm.cpp)
// or by Winograd's algorithm (winograd.cpp).
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/filters.h"
#include "cpu/conv2d/gemm.h"
#include "cpu/conv2d/winograd.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// Below so many elements zeros are not worth a second thread.
constexpr int64_t kZeroGrain = 65536;

// All panels, then their product with the image's matrix.
template <class T>
void correlate_packed(const Conv2dParams& p, const Gather<T>& gather, const Scatter<T>& scatter,
                      const Filters<T>& filters) {
  using Acc = Accumulator<T>;
  const Acc* panels = filters.packed;
  if (!panels) {
    const int64_t columns = ceil_div(filters.columns(), kTileColumns<Acc>) * kTileColumns<Acc>;
    Acc* packed = workspace<Acc>(Workspace::kShared, p.groups * columns * filters.depth());
    pack_all_filters(filters, p.groups, packed);
    panels = packed;
  }
  correlate(gather, scatter, panels, p.N, p.groups, filters.columns());
}

template <class T>
Filters<T> make_filters(const Conv2dParams& p) {
  return {static_cast<const T*>(p.weight),
          p.R,
          p.S,
          p.C / p.groups,
          p.K / p.groups,
          false,
          {},
          {},
          static_cast<const Accumulator<T>*>(p.packed)};
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

// Pixels of a phase that no tap reaches.
template <class T>
void zero_phase(const Conv2dParams& p, const Conv2dPhase& h, const Conv2dPhase& w) {
  parallel_for(p.N * h.count, ceil_div(kZeroGrain, w.count * p.C + 1), [&](int64_t begin, int64_t end) {
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
  if (p.groups == 1 && p.C < kLanes<T>) return input_grad_few_channels<T>(p);
  for (int64_t a = 0; a < min64(p.stride_h, p.H); ++a) {
    const Conv2dPhase h = conv2d_phase(a, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    for (int64_t b = 0; b < min64(p.stride_w, p.W); ++b) {
      const Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
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

void conv2d_pack(const Conv2dParams& p) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    pack_all_filters(make_filters<T>(p), p.groups, static_cast<Accumulator<T>*>(p.y));
  });
}

#define INSTANTIATE(T)                                \
  template void forward_gemm<T>(const Conv2dParams&); \
  template void input_grad_gemm<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
