// The formulas of kernels/conv2d.h as they stand, in 64-bit arithmetic: what takes every legal call, and what
// the other kernels are compared with. Forward and input gradient: one thread a result. Weight gradient: one
// block.
#include "cuda/conv2d/kernels.h"
#include "cuda/conv2d/load.cuh"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"

namespace cuda_cnn::cuda::conv2d {
namespace {

constexpr int kBlock = 128;

template <class T>
__device__ __forceinline__ Accumulator<T> map_element(const Prologue& prologue, T value, int64_t channel) {
  if (!prologue.any()) return widen_fast(value);
  return widen_fast(narrow_fast<T>(mapped<T>(prologue, widen_fast(value), static_cast<int>(channel))));
}

// The pixel that tap (r, s) of output (n, row, q) reads, or null outside of the image.
template <class T>
__device__ __forceinline__ const T* tap_pixel(const Conv2dParams& p, int64_t n, int64_t row, int64_t q,
                                              int64_t r, int64_t s) {
  const int64_t h = conv2d_input_index(row, r, p.stride_h, p.pad_h, p.dilation_h);
  const int64_t w = conv2d_input_index(q, s, p.stride_w, p.pad_w, p.dilation_w);
  if (h < 0 || h >= p.H || w < 0 || w >= p.W) return nullptr;
  return static_cast<const T*>(p.x) + ((n * p.H + h) * p.W + w) * p.x_pixel;
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    forward_kernel(const __grid_constant__ Conv2dParams p, Prologue prologue) {
  using A = Accumulator<T>;
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x, pixel = i / p.K, k = i % p.K;
  if (pixel >= p.N * p.P * p.Q) return;
  const int64_t q = pixel % p.Q, row = pixel / p.Q % p.P, n = pixel / p.Q / p.P;
  const int64_t channels = p.C / p.groups, first = k / (p.K / p.groups) * channels;
  A sum = 0;
  for (int64_t r = 0; r < p.R; ++r) {
    for (int64_t s = 0; s < p.S; ++s) {
      const T* x = tap_pixel<T>(p, n, row, q, r, s);
      const T* weight = static_cast<const T*>(p.weight) + ((k * p.R + r) * p.S + s) * channels;
      for (int64_t c = 0; x && c < channels; ++c) {
        sum += widen_fast(weight[c]) * map_element(prologue, x[first + c], first + c);
      }
    }
  }
  if (p.bias) sum += widen_fast(static_cast<const T*>(p.bias)[k]);
  if (p.residual) sum += widen_fast(static_cast<const T*>(p.residual)[pixel * p.residual_pixel + k]);
  if (p.relu && sum < 0) sum = 0;
  static_cast<T*>(p.y)[pixel * p.y_pixel + k] = narrow_fast<T>(sum);
}

template <class T>
__global__ void __launch_bounds__(kBlock) input_grad_kernel(const __grid_constant__ Conv2dParams p) {
  using A = Accumulator<T>;
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x, pixel = i / p.C, c = i % p.C;
  if (pixel >= p.N * p.H * p.W) return;
  const int64_t w = pixel % p.W, h = pixel / p.W % p.H, n = pixel / p.W / p.H;
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups, first = c / channels * outputs;
  A sum = 0;
  for (int64_t r = 0; r < p.R; ++r) {
    const int64_t y = h + p.pad_h - r * p.dilation_h;
    if (y < 0 || y % p.stride_h != 0 || y / p.stride_h >= p.P) continue;
    for (int64_t s = 0; s < p.S; ++s) {
      const int64_t x = w + p.pad_w - s * p.dilation_w;
      if (x < 0 || x % p.stride_w != 0 || x / p.stride_w >= p.Q) continue;
      const T* dy =
          static_cast<const T*>(p.dy) + ((n * p.P + y / p.stride_h) * p.Q + x / p.stride_w) * p.y_pixel;
      for (int64_t k = first; k < first + outputs; ++k) {
        const T weight = static_cast<const T*>(p.weight)[((k * p.R + r) * p.S + s) * channels + c % channels];
        sum += widen_fast(weight) * widen_fast(dy[k]);
      }
    }
  }
  static_cast<T*>(p.dx)[pixel * p.x_pixel + c] = narrow_fast<T>(sum);
}

template <class A>
struct ReduceShared {
  A scratch[kBlock / kWarpSize];
};

template <class T>
__global__ void __launch_bounds__(kBlock)
    weight_grad_kernel(const __grid_constant__ Conv2dParams p, Prologue prologue) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<ReduceShared<A>>();
  const int64_t i = blockIdx.x, channels = p.C / p.groups;
  const int64_t c = i % channels, s = i / channels % p.S, r = i / channels / p.S % p.R,
                k = i / channels / p.S / p.R;
  const int64_t channel = k / (p.K / p.groups) * channels + c;
  A sum = 0;
  for (int64_t pixel = threadIdx.x; pixel < p.N * p.P * p.Q; pixel += kBlock) {
    const int64_t q = pixel % p.Q, row = pixel / p.Q % p.P, n = pixel / p.Q / p.P;
    const T* x = tap_pixel<T>(p, n, row, q, r, s);
    const A dy = widen_fast(static_cast<const T*>(p.dy)[pixel * p.y_pixel + k]);
    if (x) sum += dy * map_element(prologue, x[channel], channel);
  }
  sum = block_reduce<kBlock>(sum, shared.scratch, Sum{});
  if (threadIdx.x == 0) static_cast<T*>(p.dweight)[i] = narrow_fast<T>(sum);
}

Prologue prologue_of(const Conv2dParams& p) { return {p.in_scale, p.in_shift, p.in_relu}; }

}  // namespace

void direct_forward(const Conv2dParams& p, Stream stream) {
  const int64_t blocks = ceil_div(p.N * p.P * p.Q * p.K, kBlock);
  dispatch_dtype(p.dtype, [&](auto type) {
    launch(forward_kernel<decltype(type)>, blocks, kBlock, 0, stream, p, prologue_of(p));
  });
}

void direct_input_grad(const Conv2dParams& p, Stream stream) {
  const int64_t blocks = ceil_div(p.N * p.H * p.W * p.C, kBlock);
  dispatch_dtype(p.dtype,
                 [&](auto type) { launch(input_grad_kernel<decltype(type)>, blocks, kBlock, 0, stream, p); });
}

void direct_weight_grad(const Conv2dParams& p, Stream stream) {
  const int64_t blocks = p.K * p.R * p.S * (p.C / p.groups);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(weight_grad_kernel<T>, blocks, kBlock, sizeof(ReduceShared<Accumulator<T>>), stream, p,
           prologue_of(p));
  });
}

}  // namespace cuda_cnn::cuda::conv2d
