// Reductions over a warp and a block in an order that the block size alone decides: the same bits in every
// run.
#pragma once

#include <cuda_runtime.h>

namespace cuda_cnn::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

// A NaN wins, as in torch.
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b || a != a ? a : b;
  }
};

// Every lane receives the result. kWidth < 32 reduces groups of that many neighbours.
template <int kWidth = kWarpSize, class Combine, class T>
__device__ __forceinline__ T warp_reduce(T value, Combine combine) {
#pragma unroll
  for (int distance = kWidth / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kFullWarp, value, distance));
  }
  return value;
}

// Every thread receives the result. Called by all kThreads threads (a multiple of 32) of a one-dimensional
// block; `scratch` is shared memory, free again when the function returns.
template <int kThreads, class Combine, class T>
__device__ __forceinline__ T block_reduce(T value, T (&scratch)[kThreads / kWarpSize], Combine combine) {
  static_assert(kThreads % kWarpSize == 0 && kThreads <= 1024);
  value = warp_reduce(value, combine);
  if (threadIdx.x % kWarpSize == 0) scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kThreads / kWarpSize; ++warp) value = combine(value, scratch[warp]);
  __syncthreads();
  return value;
}

}  // namespace cuda_cnn::cuda
