// LeNet-5's sub-sampling; formulas: kernels/subsample.h. Its planes are small, so one element a thread in
// either layout, neighbouring threads on neighbouring addresses.
//
// The two sums a channel: a warp for each band of output rows and channel, its lanes along the band, then one
// block a channel over the bands. The shape decides the order.
#include "kernels/subsample.h"

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda {
namespace {

constexpr int kThreads = 128;

struct Cell {
  int64_t n, c, row, column;
};

// The cell that element i of a tensor of height x width planes holds.
__device__ __forceinline__ Cell cell_of(const SubsampleParams& p, int64_t i, int64_t height, int64_t width) {
  Cell cell;
  if (p.channels_last) {
    cell.c = i % p.channels;
    i /= p.channels;
  }
  cell.column = i % width;
  i /= width;
  cell.row = i % height;
  i /= height;
  if (!p.channels_last) {
    cell.c = i % p.channels;
    i /= p.channels;
  }
  cell.n = i;
  return cell;
}

__device__ __forceinline__ int64_t offset_of(const SubsampleParams& p, const Cell& at, int64_t height,
                                             int64_t width) {
  if (p.channels_last) return ((at.n * height + at.row) * width + at.column) * p.channels + at.c;
  return ((at.n * p.channels + at.c) * height + at.row) * width + at.column;
}

// Sum of the window of output cell `at`.
template <class T>
__device__ __forceinline__ Accumulator<T> window_sum(const SubsampleParams& p, const Cell& at) {
  const int64_t step = p.channels_last ? p.channels : 1;
  const Cell corner{at.n, at.c, at.row * p.kernel_h, at.column * p.kernel_w};
  const T* x = static_cast<const T*>(p.x) + offset_of(p, corner, p.height, p.width);
  Accumulator<T> sum = 0;
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    for (int64_t s = 0; s < p.kernel_w; ++s) sum += widen_fast(x[(r * p.width + s) * step]);
  }
  return sum;
}

// da of output cell `at`.
template <class T>
__device__ __forceinline__ Accumulator<T> grad_of(const SubsampleParams& p, const Cell& at) {
  const int64_t i = offset_of(p, at, p.out_height, p.out_width);
  const Accumulator<T> y = widen_fast(static_cast<const T*>(p.y)[i]);
  return widen_fast(static_cast<const T*>(p.dy)[i]) * squash_slope(y, p.squash);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 6)
    forward(const __grid_constant__ SubsampleParams p, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const Cell at = cell_of(p, i, p.out_height, p.out_width);
  const Accumulator<T> coefficient = widen_fast(static_cast<const T*>(p.coefficient)[at.c]);
  const Accumulator<T> bias = widen_fast(static_cast<const T*>(p.bias)[at.c]);
  static_cast<T*>(p.y)[i] = narrow_fast<T>(squash(fma(coefficient, window_sum<T>(p, at), bias), p.squash));
}

template <class T>
__global__ void __launch_bounds__(kThreads, 6)
    input_grad(const __grid_constant__ SubsampleParams p, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  Cell at = cell_of(p, i, p.height, p.width);
  at.row /= p.kernel_h;
  at.column /= p.kernel_w;
  Accumulator<T> value = 0;  // beyond the last whole window
  if (at.row < p.out_height && at.column < p.out_width) {
    value = widen_fast(static_cast<const T*>(p.coefficient)[at.c]) * grad_of<T>(p, at);
  }
  static_cast<T*>(p.dx)[i] = narrow_fast<T>(value);
}

template <class T>
__global__ void __launch_bounds__(kThreads, 6)
    band_sums(const __grid_constant__ SubsampleParams p, int64_t tasks) {
  using A = Accumulator<T>;
  const int64_t task = int64_t{blockIdx.x} * (kThreads / kWarpSize) + threadIdx.x / kWarpSize;
  if (task >= tasks) return;
  const int64_t c = task % p.channels, band = task / p.channels,
                bands = ceil_div(p.out_height, kSubsampleBand);
  const int64_t first = band % bands * kSubsampleBand;
  const int64_t count = min64(kSubsampleBand, p.out_height - first) * p.out_width;
  A weighted = 0, plain = 0;
  for (int64_t i = threadIdx.x % kWarpSize; i < count; i += kWarpSize) {
    const Cell at{band / bands, c, first + i / p.out_width, i % p.out_width};
    const A da = grad_of<T>(p, at);
    weighted = fma(da, window_sum<T>(p, at), weighted);
    plain += da;
  }
  weighted = warp_reduce(weighted, Sum{});
  plain = warp_reduce(plain, Sum{});
  if (threadIdx.x % kWarpSize == 0) {
    A* partial = static_cast<A*>(p.partial) + band * 2 * p.channels + c;
    partial[0] = weighted;
    partial[p.channels] = plain;
  }
}

struct ReduceShared {
  double scratch[kThreads / kWarpSize];
};

template <class T>
__global__ void __launch_bounds__(kThreads, 6)
    add_bands(const __grid_constant__ SubsampleParams p, int64_t bands) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<ReduceShared>();
  const A* partial = static_cast<const A*>(p.partial) + blockIdx.x;
  double weighted = 0, plain = 0;
  for (int64_t band = threadIdx.x; band < bands; band += kThreads) {
    weighted += partial[band * 2 * p.channels];
    plain += partial[(band * 2 + 1) * p.channels];
  }
  weighted = block_reduce<kThreads>(weighted, shared.scratch, Sum{});
  plain = block_reduce<kThreads>(plain, shared.scratch, Sum{});
  if (threadIdx.x == 0) {
    static_cast<T*>(p.dcoefficient)[blockIdx.x] = narrow_fast<T>(static_cast<A>(weighted));
    static_cast<T*>(p.dbias)[blockIdx.x] = narrow_fast<T>(static_cast<A>(plain));
  }
}

}  // namespace

void subsample(const SubsampleParams& p, Stream stream) {
  const int64_t count = p.batch * p.channels * p.out_height * p.out_width;
  dispatch_dtype(p.dtype, [&](auto element) {
    launch(forward<decltype(element)>, ceil_div(count, kThreads), kThreads, 0, stream, p, count);
  });
}

void subsample_backward(const SubsampleParams& p, Stream stream) {
  const int64_t cells = p.batch * p.channels * p.height * p.width;
  const int64_t bands = subsample_bands(p.batch, p.out_height), tasks = bands * p.channels;
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(input_grad<T>, ceil_div(cells, kThreads), kThreads, 0, stream, p, cells);
    launch(band_sums<T>, ceil_div(tasks, kThreads / kWarpSize), kThreads, 0, stream, p, tasks);
    launch(add_bands<T>, p.channels, kThreads, sizeof(ReduceShared), stream, p, bands);
  });
}

}  // namespace cuda_cnn::cuda
