// Local response normalisation across channels (kernels/local_response_norm.h has the formulas).
//
//   packs   channels_last, window of at most 5, 16-byte packs: the tensor as one sequence of packs, one a
//   lane.
//           The neighbours' squares, and in the backward pass their terms, come by shuffle: no shared memory,
//           no idle lane where a pixel has few channels. Lanes 0 and 31 only serve their neighbours.
//   tile    everything else: a block takes some columns (pixels) and a stretch of channels with the windows'
//   reach
//           on both sides into shared memory; neighbouring threads touch neighbouring addresses in either
//           layout.
//   plain   windows too long for a tile: every thread walks its windows in global memory.
#include "kernels/local_response_norm.h"

#include <type_traits>

#include "cuda/divide.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;

// The numbers of one call in the accumulation type.
template <class A>
struct Constants {
  A scale, beta, k, factor;  // α/n, β, k, −2αβ/n
  int before, after;         // the window's reach

  explicit Constants(const LocalResponseNormParams& p)
      : scale(A(p.alpha / p.size)),
        beta(A(p.beta)),
        k(A(p.k)),
        factor(A(-2 * p.alpha * p.beta / p.size)),
        before(static_cast<int>(min64(lrn_before(p.size), p.channels))),
        after(static_cast<int>(min64(lrn_after(p.size), p.channels))) {}
};

// s^−β and 1/s; for β = 3/4 by the hardware's roots, without a division: s^−¾ = r·√r and 1/s = r² with r =
// 1/√s.
__device__ __forceinline__ float inverse_power(float s, float beta) {
  if (beta == 0.75f) {
    const float root = rsqrtf(s);
    return root * ptx::sqrt_approx(root);
  }
  return powf(s, -beta);
}
__device__ __forceinline__ double inverse_power(double s, double beta) { return lrn_inverse_power(s, beta); }

__device__ __forceinline__ float inverse(float s, float beta) {
  if (beta != 0.75f) return 1.f / s;
  const float root = rsqrtf(s);
  return root * root;
}
__device__ __forceinline__ double inverse(double s, double) { return 1. / s; }

// ---- packs ----

constexpr int kReach = 2;
constexpr int kUsefulLanes = kWarpSize - 2;

// sums[i] = Σ values[i − before … i + after] over this lane's pack and its neighbours'.
template <int kPack>
__device__ __forceinline__ void window_sums(float (&sums)[kPack], const float (&values)[kPack], int before,
                                            int after, bool has_left, bool has_right) {
  float row[kPack + 2 * kReach];
#pragma unroll
  for (int i = 0; i < kReach; ++i) {
    const float left = __shfl_up_sync(kFullWarp, values[kPack - kReach + i], 1);
    const float right = __shfl_down_sync(kFullWarp, values[i], 1);
    row[i] = has_left ? left : 0.f;
    row[kReach + kPack + i] = has_right ? right : 0.f;
  }
#pragma unroll
  for (int i = 0; i < kPack; ++i) row[kReach + i] = values[i];
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    sums[i] = 0.f;
#pragma unroll
    for (int d = -kReach; d <= kReach; ++d) {
      if (-before <= d && d <= after) sums[i] += row[kReach + i + d];
    }
  }
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    lrn_packs(Constants<float> constants, uint32_t packs, uint32_t packs_per_pixel, const T* __restrict__ x,
              const T* __restrict__ dy, T* __restrict__ out) {
  constexpr int kPack = kPackSize<T>;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warp = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize;
  const int64_t index = warp * kUsefulLanes + lane - 1;
  const bool inside = index >= 0 && index < packs;
  const uint32_t in_pixel = inside ? static_cast<uint32_t>(index) % packs_per_pixel : 0;
  const bool has_left = in_pixel > 0, has_right = in_pixel + 1 < packs_per_pixel;

  float values[kPack] = {}, squares[kPack], s[kPack];
  if (inside) load_widened<kPack, T>(values, x + index * kPack);
#pragma unroll
  for (int i = 0; i < kPack; ++i) squares[i] = values[i] * values[i];
  window_sums(s, squares, constants.before, constants.after, has_left, has_right);
#pragma unroll
  for (int i = 0; i < kPack; ++i) s[i] = fmaf(constants.scale, s[i], constants.k);

  float result[kPack];
  if constexpr (kBackward) {
    float grad[kPack] = {}, terms[kPack], sums[kPack];
    if (inside) load_widened<kPack, T>(grad, dy + index * kPack);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      grad[i] *= inverse_power(s[i], constants.beta);
      terms[i] = grad[i] * values[i] * inverse(s[i], constants.beta);
    }
    // A window that holds c is the forward window mirrored.
    window_sums(sums, terms, constants.after, constants.before, has_left, has_right);
#pragma unroll
    for (int i = 0; i < kPack; ++i) result[i] = fmaf(constants.factor * values[i], sums[i], grad[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) result[i] = values[i] * inverse_power(s[i], constants.beta);
  }
  if (inside && lane >= 1 && lane <= kUsefulLanes) store_narrowed<kPack, T>(out + index * kPack, result);
}

// ---- tile ----

constexpr int kTileElements = 4096;  // 16 or 32 KB (float64) each for squares and terms
constexpr int kMaxTileReach = 32;

template <class A>
struct TileShared {
  A squares[kTileElements];
  A terms[kTileElements];
};

// How the threads and the scratch walk over (channel, column): `inner` is the index of neighbouring threads.
struct TileShape {
  int channels, columns;  // channels with the reach on both sides
  int useful;             // channels that a tile writes
  int reach;
  bool channels_first;       // neighbouring threads hold neighbouring channels
  FastDivide by_neighbours;  // channels or columns, of which neighbouring threads hold neighbouring ones
};

struct TileSize {
  int64_t outer, channels, inner;
  FastDivide by_inner;
  bool small;  // outer * inner, and a tile beyond it, are below 2^31

  explicit TileSize(const LocalResponseNormParams& p)
      : outer(p.outer),
        channels(p.channels),
        inner(p.inner),
        by_inner(FastDivide::by(p.inner)),
        small(p.outer * p.inner < (int64_t{1} << 31) - kTileElements) {}

  __device__ int64_t image_of(int64_t column) const {
    return small ? by_inner.quotient(static_cast<uint32_t>(column)) : column / inner;
  }
};

// Calls fn(channel of the tensor, index into scratch, distance of channels in scratch, offset in memory) for
// the elements of this thread whose channel lies `margin` inside of the tile.
template <class Fn>
__device__ __forceinline__ void for_each_element(const TileShape& tile, const TileSize& size, int margin,
                                                 Fn fn) {
  const uint32_t stretches = (size.channels + tile.useful - 1) / tile.useful;
  const int64_t first_channel = int64_t{blockIdx.x % stretches} * tile.useful - tile.reach;
  const int64_t first_column = int64_t{blockIdx.x / stretches} * tile.columns;
  const int step = tile.channels_first ? 1 : tile.columns;
  for (int i = threadIdx.x; i < tile.channels * tile.columns; i += kThreads) {
    const int line = tile.by_neighbours.quotient(i), along = i - line * tile.by_neighbours.divisor;
    const int channel = tile.channels_first ? along : line, column = tile.channels_first ? line : along;
    const int64_t c = first_channel + channel, at = first_column + column;
    const bool useful = channel >= margin && channel < tile.channels - margin;
    const bool inside = c >= 0 && c < size.channels && at < size.outer * size.inner;
    const int64_t image = size.image_of(at);
    const int64_t offset = (image * size.channels + c - image) * size.inner + at;
    if (useful) fn(inside, i, step, offset);
  }
}

template <class A>
__device__ __forceinline__ A window_sum(const A* centre, int step, int before, int after) {
  A sum = 0;
  for (int d = -before; d <= after; ++d) sum += centre[d * step];
  return sum;
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 3)
    lrn_tile(Constants<Accumulator<T>> constants, TileShape tile, TileSize size, const T* __restrict__ x,
             const T* __restrict__ dy, T* __restrict__ out) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<TileShared<A>>();
  const int before = constants.before, after = constants.after;
  const int longest = before > after ? before : after;
  for_each_element(tile, size, 0, [&](bool inside, int i, int, int64_t offset) {
    const A value = inside ? widen_fast(x[offset]) : A(0);
    shared.squares[i] = value * value;
  });
  __syncthreads();
  for_each_element(tile, size, longest, [&](bool inside, int i, int step, int64_t offset) {
    const A s = constants.scale * window_sum(shared.squares + i, step, before, after) + constants.k;
    const A power = inverse_power(s, constants.beta);
    if constexpr (kBackward) {
      const A grad = inside ? widen_fast(dy[offset]) * power : A(0);
      shared.terms[i] = inside ? grad * widen_fast(x[offset]) * inverse(s, constants.beta) : A(0);
    } else {
      if (inside) out[offset] = narrow_fast<T>(widen_fast(x[offset]) * power);
    }
  });
  if constexpr (kBackward) {
    __syncthreads();
    for_each_element(tile, size, 2 * longest, [&](bool inside, int i, int step, int64_t offset) {
      if (!inside) return;
      const A s = constants.scale * window_sum(shared.squares + i, step, before, after) + constants.k;
      const A direct = widen_fast(dy[offset]) * inverse_power(s, constants.beta);
      const A sum = window_sum(shared.terms + i, step, after, before);
      out[offset] = narrow_fast<T>(constants.factor * widen_fast(x[offset]) * sum + direct);
    });
  }
}

// ---- plain ----

template <class T>
__device__ Accumulator<T> scale_at(const Constants<Accumulator<T>>& constants, const TileSize& size,
                                   const T* column, int64_t c) {
  Accumulator<T> sum = 0;
  const int64_t last = min64(c + constants.after, size.channels - 1);
  for (int64_t j = max64(c - constants.before, 0); j <= last; ++j) {
    const Accumulator<T> value = widen_fast(column[j * size.inner]);
    sum += value * value;
  }
  return constants.scale * sum + constants.k;
}

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    lrn_plain(Constants<Accumulator<T>> constants, TileSize size, const T* __restrict__ x,
              const T* __restrict__ dy, T* __restrict__ out) {
  using A = Accumulator<T>;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= size.outer * size.channels * size.inner) return;
  const int64_t c = i / size.inner % size.channels, column = i - c * size.inner;
  const A power = inverse_power(scale_at<T>(constants, size, x + column, c), constants.beta);
  if constexpr (!kBackward) {
    out[i] = narrow_fast<T>(widen_fast(x[i]) * power);
  } else {
    A sum = 0;
    const int64_t last = min64(c + constants.before, size.channels - 1);
    for (int64_t j = max64(c - constants.after, 0); j <= last; ++j) {
      const A s = scale_at<T>(constants, size, x + column, j);
      const int64_t at = column + j * size.inner;
      const A grad = widen_fast(dy[at]) * inverse_power(s, constants.beta);
      sum += grad * widen_fast(x[at]) * inverse(s, constants.beta);
    }
    out[i] = narrow_fast<T>(constants.factor * widen_fast(x[i]) * sum + widen_fast(dy[i]) * power);
  }
}

// ---- launcher ----

bool takes_packs(const LocalResponseNormParams& p) {
  const int64_t row_bytes = p.channels * element_size(p.dtype);
  const int64_t packs = p.outer * row_bytes / 16;
  return p.inner == 1 && lrn_before(p.size) <= kReach && p.dtype != DType::kFloat64 &&
         packs < (int64_t{1} << 31) && is_aligned(p.x, row_bytes) && is_aligned(p.dy, row_bytes) &&
         is_aligned(p.out, row_bytes);
}

TileShape tile_shape(const LocalResponseNormParams& p, int reach) {
  const bool channels_first = p.inner == 1;
  // Long enough that the reach is little extra work; 32 columns are a full line of memory.
  const int most = channels_first ? 512 : kTileElements / 32;
  const int useful = static_cast<int>(min64(p.channels, most - 2 * reach));
  const int channels = useful + 2 * reach;
  const int columns = kTileElements / channels;
  return {channels, columns,        useful,
          reach,    channels_first, FastDivide::by(channels_first ? channels : columns)};
}

template <class T, bool kBackward>
void launch_packs(const LocalResponseNormParams& p, Stream stream) {
  const uint32_t per_pixel = static_cast<uint32_t>(p.channels / kPackSize<T>);
  const uint32_t packs = static_cast<uint32_t>(p.outer * per_pixel);
  const int64_t blocks = ceil_div(packs, int64_t{kUsefulLanes} * kWarps);
  launch(lrn_packs<T, kBackward>, blocks, kThreads, 0, stream, Constants<float>(p), packs, per_pixel,
         static_cast<const T*>(p.x), static_cast<const T*>(p.dy), static_cast<T*>(p.out));
}

template <class T, bool kBackward>
void run(const LocalResponseNormParams& p, Stream stream) {
  using A = Accumulator<T>;
  const Constants<A> constants(p);
  const TileSize size(p);
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  if constexpr (!std::is_same_v<T, double>) {
    if (takes_packs(p)) return launch_packs<T, kBackward>(p, stream);
  }
  const int reach =
      (constants.before > constants.after ? constants.before : constants.after) * (kBackward ? 2 : 1);
  if (reach > kMaxTileReach) {
    const int64_t blocks = ceil_div(p.outer * p.channels * p.inner, kThreads);
    launch(lrn_plain<T, kBackward>, blocks, kThreads, 0, stream, constants, size, x, dy,
           static_cast<T*>(p.out));
    return;
  }
  const TileShape tile = tile_shape(p, reach);
  const int64_t blocks = ceil_div(p.outer * p.inner, tile.columns) * ceil_div(p.channels, tile.useful);
  launch(lrn_tile<T, kBackward>, blocks, kThreads, sizeof(TileShared<A>), stream, constants, tile, size, x,
         dy, static_cast<T*>(p.out));
}

template <bool kBackward>
void run_any(const LocalResponseNormParams& p, Stream stream) {
  if (p.outer * p.channels * p.inner == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) { run<decltype(element), kBackward>(p, stream); });
}

}  // namespace

void local_response_norm_forward(const LocalResponseNormParams& p, Stream stream) {
  run_any<false>(p, stream);
}
void local_response_norm_backward(const LocalResponseNormParams& p, Stream stream) {
  run_any<true>(p, stream);
}

}  // namespace cuda_cnn::cuda
