// Forward and input gradient as correlations: see gemm.cpp for the product itself.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/gemm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// Below so many elements packing is not worth a second thread.
constexpr int64_t kPackGrain = 65536;

template <class Acc, class Fn>
CUDA_CNN_INLINE void for_each_panel(int64_t groups, int64_t columns, int64_t depth, const Fn& pack) {
  const int64_t panels = ceil_div(columns, kTileColumns<Acc>);
  parallel_for(groups * panels, ceil_div(kPackGrain, depth * kTileColumns<Acc>), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) pack(i, i / panels, i % panels * kTileColumns<Acc>);
  });
}

}  // namespace

template <class T>
void forward_gemm(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups;
  Gather<T> gather{static_cast<const T*>(p.x), p.H, p.W, p.x_pixel, p.P, p.Q, p.stride_h, p.stride_w, -p.pad_h,
                   -p.pad_w, p.R, p.S, p.dilation_h, p.dilation_w, channels};
  gather.scale = static_cast<const Acc*>(p.in_scale);
  gather.shift = static_cast<const Acc*>(p.in_shift);
  gather.relu = p.in_relu;
  Scatter<T> scatter{static_cast<T*>(p.y), p.P, p.Q, p.y_pixel};
  scatter.bias = static_cast<const T*>(p.bias);
  scatter.residual = static_cast<const T*>(p.residual);
  scatter.residual_pixel = p.residual_pixel;
  scatter.relu = p.relu;

  const int64_t depth = gather.depth(), panel_size = depth * kTileColumns<Acc>;
  const int64_t panels = p.groups * ceil_div(outputs, kTileColumns<Acc>);
  Acc* packed = workspace<Acc>(Workspace::kShared, panels * panel_size);
  const T* weight = static_cast<const T*>(p.weight);
  for_each_panel<Acc>(p.groups, outputs, depth, [&](int64_t panel, int64_t group, int64_t output) {
    pack_panel_transposed(weight + (group * outputs + output) * depth, depth, outputs - output, depth,
                          packed + panel * panel_size);
  });
  correlate(gather, scatter, packed, p.N, p.groups, outputs);
}

namespace {

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

// One phase: a correlation of stride 1 over dy. Its taps run backwards, so that they step forwards in dy.
template <class T>
void input_grad_phase(const Conv2dParams& p, const Conv2dPhase& h, const Conv2dPhase& w) {
  using Acc = Accumulator<T>;
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups;
  const Gather<T> gather{static_cast<const T*>(p.dy), p.P, p.Q, p.y_pixel, h.count, w.count, 1, 1,
                         h.base - (h.taps - 1) * h.dy_step, w.base - (w.taps - 1) * w.dy_step,
                         h.taps, w.taps, h.dy_step, w.dy_step, outputs};
  const Scatter<T> scatter{static_cast<T*>(p.dx), p.H, p.W, p.x_pixel, h.first, w.first, p.stride_h, p.stride_w};

  const int64_t depth = gather.depth(), panel_size = depth * kTileColumns<Acc>;
  const int64_t panels = p.groups * ceil_div(channels, kTileColumns<Acc>);
  const int64_t filter = p.R * p.S * channels;
  Acc* packed = workspace<Acc>(Workspace::kShared, panels * panel_size);
  for_each_panel<Acc>(p.groups, channels, depth, [&](int64_t panel, int64_t group, int64_t channel) {
    const T* weight = static_cast<const T*>(p.weight) + group * outputs * filter + channel;
    Acc* to = packed + panel * panel_size;
    for (int64_t i = h.taps - 1; i >= 0; --i) {
      for (int64_t j = w.taps - 1; j >= 0; --j, to += outputs * kTileColumns<Acc>) {
        const int64_t tap = (h.tap + i * h.tap_step) * p.S + w.tap + j * w.tap_step;
        pack_panel(weight + tap * channels, filter, channels - channel, outputs, to);
      }
    }
  });
  correlate(gather, scatter, packed, p.N, p.groups, channels);
}

}  // namespace

template <class T>
void input_grad_gemm(const Conv2dParams& p) {
  for (int64_t a = 0; a < min64(p.stride_h, p.H); ++a) {
    const Conv2dPhase h = conv2d_phase(a, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    for (int64_t b = 0; b < min64(p.stride_w, p.W); ++b) {
      const Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      if (h.taps == 0 || w.taps == 0) {
        zero_phase<T>(p, h, w);
      } else {
        input_grad_phase<T>(p, h, w);
      }
    }
  }
}

#define INSTANTIATE(T)                                \
  template void forward_gemm<T>(const Conv2dParams&); \
  template void input_grad_gemm<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
