// Depthwise convolution: y[pixel][c] = sum over r, s of w[c][r][s] * x[tap's pixel][c]. Bound by memory, so
// no matrix product: a thread has one pixel and a pack of channels (16 bytes, or one where they do not fill
// whole packs), the weights of the block's channels lie in shared memory as [tap][channel] in the
// accumulation type.
//
// Weight gradient: a block has one tap, a stretch of channels and a share of the pixels, the number of shares
// a function of the shape; partial sums meet in shared memory, then in the workspace, each time in index
// order.
#include "cuda/conv2d/kernels.h"
#include "cuda/conv2d/load.cuh"
#include "cuda/conv2d/windows.h"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda::conv2d {
namespace {

constexpr int kBlock = 128;
constexpr int kLanes = 16;  // packs of channels of a block
constexpr int kPixels = kBlock / kLanes;
constexpr int kPixelsEach = 8;  // of one thread: the weights are loaded once for all
constexpr int kMaxTaps = 64;

template <class A, int kPack>
struct WeightShared {
  A weight[kMaxTaps][kLanes * kPack];
};

template <class T, int kPack, bool kGradient>
__global__ void __launch_bounds__(kBlock, 6) depthwise_kernel(const __grid_constant__ Windows p) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<WeightShared<A, kPack>>();
  const int lane = threadIdx.x % kLanes, first_channel = blockIdx.y * kLanes * kPack, taps = p.R * p.S;
  const int channel = first_channel + lane * kPack;
  for (int i = threadIdx.x; i < taps * kLanes * kPack; i += kBlock) {
    const int c = first_channel + i / taps;
    const T* weight = static_cast<const T*>(p.weight) + int64_t{c} * taps + i % taps;
    shared.weight[i % taps][i / taps] = c < p.outputs ? widen_fast(*weight) : A(0);
  }
  __syncthreads();
  if (channel >= p.outputs) return;
  const int pixels = p.pixels();
  const bool map = p.prologue.any();
  for (int each = 0; each < kPixelsEach; ++each) {
    const int pixel = (blockIdx.x * kPixelsEach + each) * kPixels + threadIdx.x / kLanes;
    if (pixel >= pixels) return;
    const auto [image, row, column] = pixel_index(pixel, p.by_height, p.by_width);
    A sums[kPack] = {};
    for (int tap = 0, r = 0, s = 0; tap < taps; ++tap) {
      const int h =
          source_row<kGradient>(row, r, p.stride_h, p.by_stride_h, p.pad_h, p.dilation_h, p.source_height);
      const int w =
          source_row<kGradient>(column, s, p.stride_w, p.by_stride_w, p.pad_w, p.dilation_w, p.source_width);
      if (h >= 0 && w >= 0) {
        const int64_t at =
            ((int64_t{image} * p.source_height + h) * p.source_width + w) * p.source_pixel + channel;
        const Pack<T, kPack> pack = load_pack<kPack>(static_cast<const T*>(p.source) + at);
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          A value = widen_fast(pack.elements[e]);
          if (map) value = widen_fast(narrow_fast<T>(mapped<T>(p.prologue, value, channel + e)));
          sums[e] += shared.weight[tap][lane * kPack + e] * value;
        }
      }
      if (++s == p.S) {
        s = 0;
        ++r;
      }
    }
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      if (p.bias) sums[e] += widen_fast(static_cast<const T*>(p.bias)[channel + e]);
      if (p.residual) {
        sums[e] += widen_fast(static_cast<const T*>(p.residual)[pixel * p.residual_pixel + channel + e]);
      }
      if (p.relu && sums[e] < 0) sums[e] = 0;
    }
    store_narrowed<kPack, T>(static_cast<T*>(p.out) + pixel * p.out_pixel + channel, sums);
  }
}

template <class A, int kPack>
struct SumShared {
  A sums[kPixels][kLanes * kPack];
};

// `source` is x, `out` dy: the sums over its pixels.
template <class T, int kPack>
__global__ void __launch_bounds__(kBlock, 6)
    depthwise_weight_kernel(const __grid_constant__ Windows p, const T* __restrict__ dy, int64_t dy_pixel,
                            int splits, Accumulator<T>* __restrict__ sums_of_splits) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<SumShared<A, kPack>>();
  const int lane = threadIdx.x % kLanes, line = threadIdx.x / kLanes;
  const int tap = blockIdx.y, r = tap / p.S, s = tap % p.S, split = blockIdx.z;
  const int first_channel = blockIdx.x * kLanes * kPack, channel = first_channel + lane * kPack;
  const Range share = split_range(p.pixels(), splits, split);
  A sums[kPack] = {};
  for (int pixel = share.begin + line; pixel < share.end && channel < p.outputs; pixel += kPixels) {
    const PixelIndex at_pixel = pixel_index(pixel, p.by_height, p.by_width);
    const int h =
        source_row<false>(at_pixel.i, r, p.stride_h, p.by_stride_h, p.pad_h, p.dilation_h, p.source_height);
    const int w =
        source_row<false>(at_pixel.j, s, p.stride_w, p.by_stride_w, p.pad_w, p.dilation_w, p.source_width);
    if (h < 0 || w < 0) continue;
    const int64_t at =
        ((int64_t{at_pixel.image} * p.source_height + h) * p.source_width + w) * p.source_pixel + channel;
    const Pack<T, kPack> x = load_pack<kPack>(static_cast<const T*>(p.source) + at);
    const Pack<T, kPack> grad = load_pack<kPack>(dy + pixel * dy_pixel + channel);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      A value = widen_fast(x.elements[e]);
      if (p.prologue.any()) value = widen_fast(narrow_fast<T>(mapped<T>(p.prologue, value, channel + e)));
      sums[e] += widen_fast(grad.elements[e]) * value;
    }
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) shared.sums[line][lane * kPack + e] = sums[e];
  __syncthreads();
  const int c = first_channel + threadIdx.x;
  if (threadIdx.x >= kLanes * kPack || c >= p.outputs) return;
  A sum = shared.sums[0][threadIdx.x];
  for (int other = 1; other < kPixels; ++other) sum += shared.sums[other][threadIdx.x];
  sums_of_splits[(int64_t{split} * p.outputs + c) * p.R * p.S + tap] = sum;
}

bool in_packs(const Conv2dParams& p, const void* a, int64_t a_pixel, const void* b, int64_t b_pixel) {
  const int64_t bytes = element_size(p.dtype);
  return p.C * bytes % 16 == 0 && is_aligned(a, a_pixel * bytes) && is_aligned(b, b_pixel * bytes);
}

template <class T, int kPack, bool kGradient>
void start(const Windows& d, Stream stream) {
  const Grid grid(ceil_div(d.pixels(), kPixels * kPixelsEach), ceil_div(d.outputs, kLanes * kPack));
  launch(depthwise_kernel<T, kPack, kGradient>, grid, kBlock, sizeof(WeightShared<Accumulator<T>, kPack>),
         stream, d);
}

template <bool kGradient>
void start_any(const Conv2dParams& p, const Windows& d, Stream stream) {
  const bool packs = in_packs(p, d.source, d.source_pixel, d.out, d.out_pixel);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    packs ? start<T, kPackSize<T>, kGradient>(d, stream) : start<T, 1, kGradient>(d, stream);
  });
}

}  // namespace

void depthwise_forward(const Conv2dParams& p, Stream stream) {
  start_any<false>(p, forward_windows(p), stream);
}

void depthwise_input_grad(const Conv2dParams& p, Stream stream) {
  start_any<true>(p, input_grad_windows(p), stream);
}

void depthwise_weight_grad(const Conv2dParams& p, const Plan& plan, Stream stream) {
  const Windows d = forward_windows(p);
  const bool packs = in_packs(p, p.x, p.x_pixel, p.dy, p.y_pixel);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    const int pack = packs ? kPackSize<T> : 1;
    const Grid grid(ceil_div(p.C, kLanes * pack), p.R * p.S, plan.splits);
    const auto run = [&](auto kernel, size_t shared) {
      launch(kernel, grid, kBlock, shared, stream, d, static_cast<const T*>(p.dy), p.y_pixel, plan.splits,
             static_cast<A*>(p.workspace));
    };
    packs ? run(&depthwise_weight_kernel<T, kPackSize<T>>, sizeof(SumShared<A, kPackSize<T>>))
          : run(&depthwise_weight_kernel<T, 1>, sizeof(SumShared<A, 1>));
  });
  add_splits(p, plan.splits, p.workspace, stream);
}

}  // namespace cuda_cnn::cuda::conv2d
