// The passes of kernels/conv2d_fused.h.
//
//   map          a pack of four channels a thread, or one where they do not fill packs
//   gradient     32 neighbouring channels by 8 shares of kPartPixels pixels a block; a part leaves its sums
//   finish_sums  all parts together, in float64, in index order
#include "kernels/conv2d_fused.h"

#include "cuda/launch.cuh"
#include "cuda/vec.cuh"
#include "kernels/conv2d.h"

namespace cuda_cnn::cuda {
namespace channel_maps {
namespace {

constexpr int kThreads = 256, kColumns = 32, kLines = kThreads / kColumns;
constexpr int64_t kPartPixels = 256;

template <class T>
__device__ __forceinline__ const T* at(const PixelRowsView& view, int64_t row, int64_t channel) {
  return static_cast<const T*>(view.data) + row * view.pixel + channel;
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads) map(const __grid_constant__ ChannelMapParams p) {
  using A = Accumulator<T>;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, packs = p.channels / kPack;
  if (i >= p.pixels * packs) return;
  const int64_t row = i / packs, c = i % packs * kPack;
  A x[kPack], residual[kPack] = {}, z[kPack];
  load_widened<kPack, T>(x, at<T>(p.x, row, c));
  if (p.residual.data) load_widened<kPack, T>(residual, at<T>(p.residual, row, c));
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const A mapped = conv2d_prologue(x[e], static_cast<const A*>(p.scale)[c + e],
                                     static_cast<const A*>(p.shift)[c + e], false);
    z[e] = channel_map_end(mapped + residual[e], x[e], p.end);
  }
  store_narrowed<kPack, T>(static_cast<T*>(p.z) + row * p.z_pixel + c, z);
}

template <class A>
struct SumsShared {
  A g[kLines][kColumns], gx[kLines][kColumns];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradient(const __grid_constant__ ChannelMapGradParams p, Accumulator<T>* __restrict__ partials) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<SumsShared<A>>();
  const int column = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  // Stretches of channels first, parts of pixels next: both may be more than a grid's y holds.
  const auto stretches = static_cast<unsigned>(ceil_div(p.channels, kColumns));
  const int64_t part = blockIdx.x / stretches, first = part * kPartPixels;
  const int64_t c = int64_t{blockIdx.x % stretches} * kColumns + column;
  const bool exists = c < p.channels;
  const int64_t last = exists ? min64(p.pixels, first + kPartPixels) : 0;
  const A scale = p.scale && exists ? static_cast<const A*>(p.scale)[c] : A(1);
  const A shift = p.shift && exists ? static_cast<const A*>(p.shift)[c] : A(0);
  A sum_g = 0, sum_gx = 0;
  for (int64_t row = first + line; row < last; row += kLines) {
    A g = widen_fast(*at<T>(p.dz, row, c));
    const A x = p.x.data ? widen_fast(*at<T>(p.x, row, c)) : A(0);
    if (p.relu) {
      const A z = p.z.data ? widen_fast(*at<T>(p.z, row, c)) : conv2d_prologue(x, scale, shift, false);
      if (z <= 0) g = 0;
    }
    sum_g += g;
    sum_gx += g * x;
    if (p.dresidual) static_cast<T*>(p.dresidual)[row * p.channels + c] = narrow_fast<T>(g);
    if (p.dx) {
      const A added = p.added.data ? widen_fast(*at<T>(p.added, row, c)) : A(0);
      static_cast<T*>(p.dx)[row * p.channels + c] = narrow_fast<T>(g * scale + added);
    }
  }
  shared.g[line][column] = sum_g;
  shared.gx[line][column] = sum_gx;
  __syncthreads();
  if (!p.sum_g || line != 0 || !exists) return;
  for (int other = 1; other < kLines; ++other) {
    sum_g += shared.g[other][column];
    sum_gx += shared.gx[other][column];
  }
  A* out = partials + (part * p.channels + c) * 2;
  out[0] = sum_g;
  out[1] = sum_gx;
}

template <class A>
__global__ void __launch_bounds__(kThreads)
    finish_sums(int64_t parts, int64_t channels, const A* __restrict__ partials, A* __restrict__ sum_g,
                A* __restrict__ sum_gx) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= channels) return;
  double g = 0, gx = 0;
  for (int64_t part = 0; part < parts; ++part) {
    g += partials[(part * channels + c) * 2];
    gx += partials[(part * channels + c) * 2 + 1];
  }
  sum_g[c] = static_cast<A>(g);
  sum_gx[c] = static_cast<A>(gx);
}

template <class T>
bool whole_packs(const ChannelMapParams& p) {
  constexpr int64_t kBytes = 4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16;
  const auto fits = [](const void* data, int64_t pixel) {
    return is_aligned<kBytes>(data, pixel * static_cast<int64_t>(sizeof(T)));
  };
  return p.channels % 4 == 0 && fits(p.x.data, p.x.pixel) && fits(p.residual.data, p.residual.pixel) &&
         fits(p.z, p.z_pixel);
}

}  // namespace
}  // namespace channel_maps

int64_t channel_map_grad_workspace_bytes(const ChannelMapGradParams& p) {
  const int64_t bytes = p.dtype == DType::kFloat64 ? 8 : 4;
  return p.sum_g ? ceil_div(p.pixels, channel_maps::kPartPixels) * p.channels * 2 * bytes : 0;
}

void channel_map(const ChannelMapParams& p, Stream stream) {
  using namespace channel_maps;
  if (p.pixels * p.channels == 0) return;
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (whole_packs<T>(p)) {
      launch(map<T, 4>, ceil_div(p.pixels * p.channels / 4, kThreads), kThreads, 0, stream, p);
    } else {
      launch(map<T, 1>, ceil_div(p.pixels * p.channels, kThreads), kThreads, 0, stream, p);
    }
  });
}

void channel_map_grad(const ChannelMapGradParams& p, Stream stream) {
  using namespace channel_maps;
  if (p.channels == 0) return;
  const int64_t parts = ceil_div(p.pixels, kPartPixels);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Accumulator<T>;
    A* partials = static_cast<A*>(p.workspace);
    launch(gradient<T>, parts * ceil_div(p.channels, kColumns), kThreads, sizeof(SumsShared<A>), stream, p,
           partials);
    if (!p.sum_g) return;
    launch(finish_sums<A>, ceil_div(p.channels, kThreads), kThreads, 0, stream, parts, p.channels, partials,
           static_cast<A*>(p.sum_g), static_cast<A*>(p.sum_gx));
  });
}

}  // namespace cuda_cnn::cuda
