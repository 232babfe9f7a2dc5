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

template <class T, class E = Accumulator<T>>
Filters<T, E> make_filters(const Conv2dParams& p) {
  return {static_cast<const T*>(p.weight), p.R, p.S, p.C / p.groups, p.K / p.groups, false, {}, {},
          static_cast<const E*>(p.packed)};
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
  with_operand<T>(conv2d_packs_pairs(p), [&](auto operand) {
    correlate(forward_gather<T>(p), forward_scatter<T>(p), make_filters<T, decltype(operand)>(p), p.N,
              p.groups);
  });
}

template <class T>
void forward_few_channels(const Conv2dParams& unpacked) {
  Conv2dParams p = unpacked;
  if (conv2d_packs_pairs(p)) p.packed = nullptr;  // runs of odd length have no pairs
  correlate_few_channels(forward_gather<T>(p), forward_scatter<T>(p), make_filters<T>(p), p.N);
}

void forward_winograd(const Conv2dParams& p) {
  if (p.stride_h * p.stride_w > 1) return forward_winograd_blocks(p);
  with_winograd_types(p.dtype, [&](auto type, auto operand) {
    using T = decltype(type);
    auto filters = make_filters<T, decltype(operand)>(p);
    filters.planes = p.weight_planes;
    correlate_winograd(forward_gather<T>(p), forward_scatter<T>(p), filters, p.N, p.groups);
  });
}

template <class T>
void input_grad_gemm(const Conv2dParams& p) {
  for (int64_t a = 0; a < min64(p.stride_h, p.H); ++a) {
    const Conv2dPhase h = conv2d_phase(a, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    for (int64_t b = 0; b < min64(p.stride_w, p.W); ++b) {
      const Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      if (h.taps == 0 || w.taps == 0) {
        zero_phase<T>(p, h, w);
        continue;
      }
      with_operand<T>(multiplies_pairs() && p.K / p.groups % 2 == 0, [&](auto operand) {
        auto filters = make_filters<T, decltype(operand)>(p);
        filters.transposed = true, filters.h = h, filters.w = w;
        correlate(phase_gather<T>(p, h, w), phase_scatter<T>(p, h, w), filters, p.N, p.groups);
      });
    }
  }
}

void input_grad_winograd(const Conv2dParams& p) {
  const Conv2dPhase h = conv2d_phase(0, p.H, p.R, 1, p.pad_h, 1),
                    w = conv2d_phase(0, p.W, p.S, 1, p.pad_w, 1);
  with_winograd_types(p.dtype, [&](auto type, auto operand) {
    using T = decltype(type);
    auto filters = make_filters<T, decltype(operand)>(p);
    filters.transposed = true, filters.h = h, filters.w = w, filters.planes = p.weight_planes;
    correlate_winograd(phase_gather<T>(p, h, w), phase_scatter<T>(p, h, w), filters, p.N, p.groups);
  });
}

void conv2d_pack(const Conv2dParams& p) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    with_operand<T>(conv2d_packs_pairs(p), [&](auto operand) {
      using E = decltype(operand);
      auto filters = make_filters<T, E>(p);
      filters.planes = p.nchw;
      pack_all_filters(filters, p.groups, static_cast<E*>(p.y));
    });
  });
}

#define INSTANTIATE(T)                                        \
  template void forward_gemm<T>(const Conv2dParams&);         \
  template void forward_few_channels<T>(const Conv2dParams&); \
  template void input_grad_gemm<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
