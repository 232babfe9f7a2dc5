// Convolutions with few channels in and out, LeNet-5's: a product would leave most of its tile's 64 columns
// empty and packs the weight in a launch of its own. Here a thread has kEach pixels and all of their outputs
// in registers, the weights lie in shared memory as [tap][input][output] in the accumulation type, and a warp
// reads the same ones at once. Outputs are rounded up to kOutputs, with weights of zero.
//
// Weight gradient: a thread has one (tap, input) and its sums for all outputs. A block takes a share of the
// pixels, kStaged at a time in shared memory; where it has more threads than (tap, input)s they take the
// pixels in turn. Partial sums meet in shared memory, then in the workspace, each time in index order.
#include "cuda/conv2d/epilogue.cuh"
#include "cuda/conv2d/kernels.h"
#include "cuda/conv2d/load.cuh"
#include "cuda/conv2d/windows.h"
#include "cuda/launch.cuh"

namespace cuda_cnn::cuda::conv2d {
namespace {

constexpr int kBlock = 128;

// A weight read from shared memory serves kEach products; double takes twice the registers.
template <class A>
constexpr int kEach = sizeof(A) == 4 ? 2 : 1;

template <class A, int kOutputs>
struct FewShared {
  Pack<A, kOutputs> weight[kFewWeights / kOutputs];
};

// Forward k is the output and c the input, in the gradient the other way round.
template <class T, int kOutputs, bool kGradient>
__device__ __forceinline__ void load_filters(FewShared<Accumulator<T>, kOutputs>& shared, const Windows& p) {
  const int taps = p.R * p.S, channels = kGradient ? p.outputs : p.inputs;
  for (int i = threadIdx.x; i < taps * p.inputs * kOutputs; i += kBlock) {
    const int output = i % kOutputs, row = i / kOutputs, tap = row / p.inputs, input = row - tap * p.inputs;
    const int k = kGradient ? input : output, c = kGradient ? output : input;
    const T* weight = static_cast<const T*>(p.weight) + (k * taps + tap) * channels + c;
    shared.weight[row].elements[output] = output < p.outputs ? widen_fast(*weight) : Accumulator<T>(0);
  }
}

template <class T, int kOutputs>
__device__ __forceinline__ void write_pixel(const Windows& p, int64_t pixel, bool vectors,
                                            Accumulator<T> (&sums)[kOutputs]) {
  using A = Accumulator<T>;
#pragma unroll
  for (int first = 0; first < kOutputs; first += kLaneColumns) {
    const int count = p.outputs - first;
    if (count <= 0) return;
    A values[kLaneColumns], residual[kLaneColumns] = {}, bias[kLaneColumns] = {};
    if (p.bias) load_columns<T>(bias, static_cast<const T*>(p.bias) + first, false, count);
    if (p.residual) {
      load_columns<T>(residual, static_cast<const T*>(p.residual) + pixel * p.residual_pixel + first, vectors,
                      count);
    }
#pragma unroll
    for (int e = 0; e < kLaneColumns; ++e) {
      values[e] = sums[first + e] + bias[e] + residual[e];
      if (p.relu && values[e] < 0) values[e] = 0;
    }
    store_columns<T>(static_cast<T*>(p.out) + pixel * p.out_pixel + first, values, vectors, count);
  }
}

template <class T, int kOutputs, bool kGradient>
__global__ void __launch_bounds__(kBlock, 4) few_channels(const __grid_constant__ Windows p, bool vectors) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<FewShared<A, kOutputs>>();
  load_filters<T, kOutputs, kGradient>(shared, p);
  __syncthreads();
  const int pixels = p.pixels(), first_pixel = blockIdx.x * (kBlock * kEach<A>)+threadIdx.x;
  PixelIndex at[kEach<A>];
  A sums[kEach<A>][kOutputs] = {};
#pragma unroll
  for (int i = 0; i < kEach<A>; ++i) at[i] = pixel_index(first_pixel + i * kBlock, p.by_height, p.by_width);
  const bool map = p.prologue.any();
  const Pack<A, kOutputs>* weight = shared.weight;
  for (int r = 0; r < p.R; ++r) {
    for (int s = 0; s < p.S; ++s) {
      const T* from[kEach<A>];  // null outside of the image
#pragma unroll
      for (int i = 0; i < kEach<A>; ++i) {
        const int h = source_row<kGradient>(at[i].i, r, p.stride_h, p.by_stride_h, p.pad_h, p.dilation_h,
                                            p.source_height);
        const int w = source_row<kGradient>(at[i].j, s, p.stride_w, p.by_stride_w, p.pad_w, p.dilation_w,
                                            p.source_width);
        const int64_t cell = (int64_t{at[i].image} * p.source_height + h) * p.source_width + w;
        const bool exists = first_pixel + i * kBlock < pixels && h >= 0 && w >= 0;
        from[i] = exists ? static_cast<const T*>(p.source) + cell * p.source_pixel : nullptr;
      }
      for (int c = 0; c < p.inputs; ++c, ++weight) {
        A value[kEach<A>];
#pragma unroll
        for (int i = 0; i < kEach<A>; ++i) {
          value[i] = from[i] ? A(widen_fast(from[i][c])) : A(0);
          if (map && from[i]) value[i] = widen_fast(narrow_fast<T>(mapped<T>(p.prologue, value[i], c)));
        }
        const Pack<A, kOutputs> weights = *weight;
#pragma unroll
        for (int e = 0; e < kOutputs; ++e) {
#pragma unroll
          for (int i = 0; i < kEach<A>; ++i) sums[i][e] = fma(weights.elements[e], value[i], sums[i][e]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach<A>; ++i) {
    const int pixel = first_pixel + i * kBlock;
    if (pixel < pixels) write_pixel<T>(p, pixel, vectors, sums[i]);
  }
}

constexpr int kStaged = 32;

template <class A, int kOutputs>
struct FewGradShared {
  Pack<A, kOutputs> dy[kStaged];
  int top[kStaged], left[kStaged];  // of the window, in the source
  int64_t image[kStaged];           // the source's first pixel
  Pack<A, kOutputs> sums[kBlock];
};

// The block's next pixels; beyond `count` none.
template <class T, int kOutputs>
__device__ __forceinline__ void stage_pixels(FewGradShared<Accumulator<T>, kOutputs>& shared,
                                             const Windows& p, const T* dy, int64_t dy_pixel, int first,
                                             int count) {
  for (int i = threadIdx.x; i < count * kOutputs; i += kBlock) {
    const int pixel = i / kOutputs, k = i % kOutputs;
    const T* from = dy + (first + pixel) * dy_pixel + k;
    shared.dy[pixel].elements[k] = k < p.outputs ? widen_fast(*from) : Accumulator<T>(0);
  }
  if (threadIdx.x < count) {
    const PixelIndex at = pixel_index(first + threadIdx.x, p.by_height, p.by_width);
    shared.top[threadIdx.x] = at.i * p.stride_h - p.pad_h;
    shared.left[threadIdx.x] = at.j * p.stride_w - p.pad_w;
    shared.image[threadIdx.x] = int64_t{at.image} * p.source_height * p.source_width;
  }
}

// A block: share blockIdx.x of the pixels, (tap, input)s from blockIdx.y * kBlock on.
template <class T, int kOutputs>
__global__ void __launch_bounds__(kBlock, 4)
    few_channels_weight(const __grid_constant__ Windows p, const T* __restrict__ dy, int64_t dy_pixel,
                        int splits, Accumulator<T>* __restrict__ sums_of_splits) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<FewGradShared<A, kOutputs>>();
  const int units = p.R * p.S * p.inputs, first_unit = blockIdx.y * kBlock;
  const int columns = min(units - first_unit, kBlock), lines = kBlock / columns;
  const int line = threadIdx.x / columns, unit = first_unit + threadIdx.x % columns;
  const int tap = unit / p.inputs, c = unit % p.inputs;
  const int row = tap / p.S * p.dilation_h, column = tap % p.S * p.dilation_w;
  const Range share = split_range(p.pixels(), splits, blockIdx.x);
  A sums[kOutputs] = {};
  for (int first = share.begin; first < share.end; first += kStaged) {
    const int count = min(kStaged, share.end - first);
    stage_pixels<T>(shared, p, dy, dy_pixel, first, count);
    __syncthreads();
    for (int i = line; i < count && line < lines; i += lines) {
      const int h = shared.top[i] + row, w = shared.left[i] + column;
      if (!inside(h, p.source_height) || !inside(w, p.source_width)) continue;
      const int64_t cell = shared.image[i] + int64_t{h} * p.source_width + w;
      A value = widen_fast(static_cast<const T*>(p.source)[cell * p.source_pixel + c]);
      if (p.prologue.any()) value = widen_fast(narrow_fast<T>(mapped<T>(p.prologue, value, c)));
      const Pack<A, kOutputs> grad = shared.dy[i];
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) sums[k] = fma(grad.elements[k], value, sums[k]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int k = 0; k < kOutputs; ++k) shared.sums[threadIdx.x].elements[k] = sums[k];
  __syncthreads();
  for (int i = threadIdx.x; i < columns * p.outputs; i += kBlock) {
    const int k = i / columns, at = i % columns;
    A sum = shared.sums[at].elements[k];
    for (int other = 1; other < lines; ++other) sum += shared.sums[other * columns + at].elements[k];
    sums_of_splits[(int64_t{blockIdx.x} * p.outputs + k) * units + first_unit + at] = sum;
  }
}

template <class T, int kOutputs, bool kGradient>
void start(const Windows& w, bool vectors, Stream stream) {
  using A = Accumulator<T>;
  launch(few_channels<T, kOutputs, kGradient>, ceil_div(w.pixels(), kBlock * kEach<A>), kBlock,
         sizeof(FewShared<A, kOutputs>), stream, w, vectors);
}

}  // namespace

void few_channels_forward(const Conv2dParams& p, bool vectors, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    p.K > kFewInputs ? start<T, kFewOutputs, false>(forward_windows(p), vectors, stream)
                     : start<T, kFewInputs, false>(forward_windows(p), vectors, stream);
  });
}

void few_channels_input_grad(const Conv2dParams& p, bool vectors, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    start<decltype(type), kFewInputs, true>(input_grad_windows(p), vectors, stream);
  });
}

void few_channels_weight_grad(const Conv2dParams& p, const Plan& plan, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const auto run = [&](auto kernel, size_t shared) {
      launch(kernel, {plan.splits, ceil_div(p.R * p.S * p.C, kBlock)}, kBlock, shared, stream,
             forward_windows(p), static_cast<const T*>(p.dy), p.y_pixel, plan.splits,
             static_cast<A*>(p.workspace));
    };
    p.K > kFewInputs ? run(&few_channels_weight<T, kFewOutputs>, sizeof(FewGradShared<A, kFewOutputs>))
                     : run(&few_channels_weight<T, kFewInputs>, sizeof(FewGradShared<A, kFewInputs>));
  });
  add_splits(p, plan.splits, p.workspace, stream);
}

}  // namespace cuda_cnn::cuda::conv2d
