// The formulas of kernels/conv2d.h, one loop an index: the first rung of the ladder, and what runs on shapes
// with an empty sum.
#include "cpu/conv2d/algorithms.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

template <class T>
CUDA_CNN_INLINE Accumulator<T> input(const Conv2dParams& p, int64_t n, int64_t h, int64_t w, int64_t c) {
  using Acc = Accumulator<T>;
  if (h < 0 || h >= p.H || w < 0 || w >= p.W) return 0;
  const Acc x = widen(static_cast<const T*>(p.x)[((n * p.H + h) * p.W + w) * p.x_pixel + c]);
  if (p.in_scale) {
    return conv2d_prologue(x, static_cast<const Acc*>(p.in_scale)[c], static_cast<const Acc*>(p.in_shift)[c],
                           p.in_relu);
  }
  return p.in_relu && x < 0 ? Acc(0) : x;
}

}  // namespace

template <class T>
void forward_reference(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t channels = p.groups ? p.C / p.groups : 0, outputs = p.groups ? p.K / p.groups : 0;
  parallel_for(p.N * p.P * p.Q, 16, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t q = pixel % p.Q, row = pixel / p.Q % p.P, n = pixel / (p.Q * p.P);
      for (int64_t k = 0; k < p.K; ++k) {
        Acc sum = 0;
        const T* weight = static_cast<const T*>(p.weight) + k * p.R * p.S * channels;
        for (int64_t r = 0; r < p.R; ++r) {
          const int64_t h = conv2d_input_index(row, r, p.stride_h, p.pad_h, p.dilation_h);
          for (int64_t s = 0; s < p.S; ++s) {
            const int64_t w = conv2d_input_index(q, s, p.stride_w, p.pad_w, p.dilation_w);
            for (int64_t c = 0; c < channels; ++c) {
              sum += widen(*weight++) * input<T>(p, n, h, w, k / outputs * channels + c);
            }
          }
        }
        if (p.bias) sum += widen(static_cast<const T*>(p.bias)[k]);
        if (p.residual) sum += widen(static_cast<const T*>(p.residual)[pixel * p.residual_pixel + k]);
        static_cast<T*>(p.y)[pixel * p.y_pixel + k] = narrow<T>(p.relu && sum < 0 ? Acc(0) : sum);
      }
    }
  });
}

template <class T>
void input_grad_reference(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups;
  parallel_for(p.N * p.H * p.W, 16, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const int64_t w = pixel % p.W, h = pixel / p.W % p.H, n = pixel / (p.W * p.H);
      for (int64_t c = 0; c < p.C; ++c) {
        const int64_t group = c / channels;
        Acc sum = 0;
        for (int64_t r = 0; r < p.R; ++r) {
          const int64_t from_h = h + p.pad_h - r * p.dilation_h;
          if (from_h < 0 || from_h % p.stride_h || from_h / p.stride_h >= p.P) continue;
          for (int64_t s = 0; s < p.S; ++s) {
            const int64_t from_w = w + p.pad_w - s * p.dilation_w;
            if (from_w < 0 || from_w % p.stride_w || from_w / p.stride_w >= p.Q) continue;
            const int64_t from = (n * p.P + from_h / p.stride_h) * p.Q + from_w / p.stride_w;
            const T* dy = static_cast<const T*>(p.dy) + from * p.y_pixel + group * outputs;
            const T* weight = static_cast<const T*>(p.weight) + c % channels;
            for (int64_t k = 0; k < outputs; ++k) {
              sum += widen(dy[k]) * widen(weight[(((group * outputs + k) * p.R + r) * p.S + s) * channels]);
            }
          }
        }
        static_cast<T*>(p.dx)[pixel * p.x_pixel + c] = narrow<T>(sum);
      }
    }
  });
}

template <class T>
void weight_grad_reference(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups;
  parallel_for(p.K * p.R * p.S, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = i % p.S, r = i / p.S % p.R, k = i / (p.S * p.R);
      for (int64_t c = 0; c < channels; ++c) {
        Acc sum = 0;
        for (int64_t pixel = 0; pixel < p.N * p.P * p.Q; ++pixel) {
          const int64_t q = pixel % p.Q, row = pixel / p.Q % p.P, n = pixel / (p.Q * p.P);
          const int64_t h = conv2d_input_index(row, r, p.stride_h, p.pad_h, p.dilation_h);
          const int64_t w = conv2d_input_index(q, s, p.stride_w, p.pad_w, p.dilation_w);
          sum += widen(static_cast<const T*>(p.dy)[pixel * p.y_pixel + k]) *
                 input<T>(p, n, h, w, k / outputs * channels + c);
        }
        static_cast<T*>(p.dweight)[i * channels + c] = narrow<T>(sum);
      }
    }
  });
}

#define INSTANTIATE(T)                                        \
  template void forward_reference<T>(const Conv2dParams&);    \
  template void input_grad_reference<T>(const Conv2dParams&); \
  template void weight_grad_reference<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
