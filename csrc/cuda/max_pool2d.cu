// Max-pooling; formulas and the meaning of a tap: kernels/max_pool2d.h. No atomics: the gradient gathers,
// each cell asking the few windows that hold it for their tap, in window order.
//
//   packs    channels_last: a thread has 16 bytes of channels of one cell, and their taps as one word
//   singles  contiguous, odd channel counts, misaligned slices, windows of more than 255 cells: one element a
//   thread
//
// Index: int32_t where every number fits, for its divisions become multiplications.
#include "kernels/max_pool2d.h"

#include "cuda/divide.h"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda {
namespace {

constexpr int kThreads = 256;

template <class Index>
struct Axis {
  Index in, out, kernel, stride, pad, dilation;
  Divide<Index> by_in, by_out, by_stride, by_dilation, by_kernel;

  explicit Axis(const PoolAxis& a)
      : in(Index(a.in)),
        out(Index(a.out)),
        kernel(Index(a.kernel)),
        stride(Index(a.stride)),
        pad(Index(a.pad)),
        dilation(Index(a.dilation)),
        by_in(Divide<Index>::by(a.in)),
        by_out(Divide<Index>::by(a.out)),
        by_stride(Divide<Index>::by(a.stride)),
        by_dilation(Divide<Index>::by(a.dilation)),
        by_kernel(Divide<Index>::by(a.kernel)) {}

  __device__ Index cell(Index window, Index tap) const { return window * stride - pad + tap * dilation; }
  __device__ bool holds(Index at) const { return at >= 0 && at < in; }
  __device__ Index first_tap(Index window) const {
    const Index before = pad - window * stride;
    return before <= 0 ? 0 : by_dilation.quotient(before + dilation - 1);
  }
  __device__ Index first_window(Index at) const {
    const Index reach = at + pad - (kernel - 1) * dilation;
    return reach <= 0 ? 0 : by_stride.quotient(reach + stride - 1);
  }
  __device__ Index end_window(Index at) const {
    const Index end = by_stride.quotient(at + pad) + 1;
    return end < out ? end : out;
  }
  // -1: the window skips the cell.
  __device__ Index tap_of(Index at, Index window) const {
    const Index offset = at + pad - window * stride, tap = by_dilation.quotient(offset);
    return tap * dilation == offset ? tap : -1;
  }
};

template <class Index>
struct Problem {
  Axis<Index> h, w;
  Divide<Index> channels;  // in packs
  Index count;             // threads
  bool channels_last, wide_taps;
};

// A thread's place in one of the two grids, of height x width cells: where a plane (an image) begins in units
// of its cells, the cell, and the number of the channel's first element among the cell's.
template <class Index>
struct Place {
  Index plane, row, column, channel;
  Index channels;  // elements between neighbouring cells
};

template <int kPack, class Index>
__device__ __forceinline__ Place<Index> place_of(const Problem<Index>& p, Index i,
                                                 const Divide<Index>& height, const Divide<Index>& width) {
  Place<Index> at{};
  at.channels = 1;
  if (p.channels_last) {
    at.channels = p.channels.divisor * kPack;
    const Index cell = split_off(i, p.channels);
    at.channel = i * kPack;
    i = cell;
  }
  at.column = i;
  at.row = split_off(at.column, width);
  at.plane = split_off(at.row, height);
  return at;
}

template <class Index>
__device__ __forceinline__ int64_t offset_of(const Place<Index>& at, const Axis<Index>& h,
                                             const Axis<Index>& w, bool pooled, Index row, Index column) {
  const int64_t height = pooled ? h.out : h.in, width = pooled ? w.out : w.in;
  return ((at.plane * height + row) * width + column) * at.channels + at.channel;
}

template <int kPack>
__device__ __forceinline__ void load_taps(int (&taps)[kPack], const void* all, int64_t offset, bool wide) {
  if (kPack == 1 && wide) {
    taps[0] = static_cast<const int32_t*>(all)[offset];
    return;
  }
  const Pack<uint8_t, kPack> pack = load_pack<kPack>(static_cast<const uint8_t*>(all) + offset);
#pragma unroll
  for (int e = 0; e < kPack; ++e) taps[e] = pack.elements[e];
}

template <int kPack>
__device__ __forceinline__ void store_taps(void* all, int64_t offset, const int (&taps)[kPack], bool wide) {
  if (kPack == 1 && wide) {
    static_cast<int32_t*>(all)[offset] = taps[0];
    return;
  }
  Pack<uint8_t, kPack> pack;
#pragma unroll
  for (int e = 0; e < kPack; ++e) pack.elements[e] = static_cast<uint8_t>(taps[e]);
  store_pack(static_cast<uint8_t*>(all) + offset, pack);
}

template <class T, int kPack, class Index>
__global__ void __launch_bounds__(kThreads, 3)
    pool(const __grid_constant__ Problem<Index> p, const T* __restrict__ x, T* __restrict__ y,
         void* __restrict__ taps, int64_t* __restrict__ indices) {
  using A = Accumulator<T>;
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread >= p.count) return;
  const Place<Index> at = place_of<kPack>(p, Index(thread), p.h.by_out, p.w.by_out);
  A best[kPack];
  int tap[kPack];
#pragma unroll
  for (int e = 0; e < kPack; ++e) {  // what stays where dilation steps over the whole plane
    best[e] = -A(INFINITY);
    tap[e] = static_cast<int>(p.h.first_tap(at.row) * p.w.kernel + p.w.first_tap(at.column));
  }
  bool found = false;
  for (Index r = 0; r < p.h.kernel; ++r) {
    const Index row = p.h.cell(at.row, r);
    if (!p.h.holds(row)) continue;
    for (Index s = 0; s < p.w.kernel; ++s) {
      const Index column = p.w.cell(at.column, s);
      if (!p.w.holds(column)) continue;
      A values[kPack];
      load_widened<kPack, T>(values, x + offset_of(at, p.h, p.w, false, row, column));
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (!found || takes_over(values[e], best[e])) {
          best[e] = values[e];
          tap[e] = static_cast<int>(r * p.w.kernel + s);
        }
      }
      found = true;
    }
  }
  const int64_t out = offset_of(at, p.h, p.w, true, at.row, at.column);
  store_narrowed<kPack, T>(y + out, best);
  if (taps) store_taps<kPack>(taps, out, tap, p.wide_taps);
  if (!indices) return;
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    Index s = tap[e];
    const Index r = split_off(s, p.w.by_kernel);
    const Index row = p.h.cell(at.row, r), column = p.w.cell(at.column, s);
    indices[out + e] = int64_t{row} * p.w.in + column;
  }
}

// dx[cell] = sum of dy over the windows whose tap is the cell.
template <class T, int kPack, class Index>
__global__ void __launch_bounds__(kThreads,
                                  sizeof(Index) == 8 ? 2 : 3)  // 64-bit numbers take twice the registers
    pool_backward(const __grid_constant__ Problem<Index> p, const T* __restrict__ dy, T* __restrict__ dx,
                  const void* __restrict__ taps) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread >= p.count) return;
  const Place<Index> at = place_of<kPack>(p, Index(thread), p.h.by_in, p.w.by_in);
  const Index end_row = p.h.end_window(at.row), end_column = p.w.end_window(at.column);
  Accumulator<T> sums[kPack] = {};
  for (Index row = p.h.first_window(at.row); row < end_row; ++row) {
    const Index r = p.h.tap_of(at.row, row);
    for (Index column = p.w.first_window(at.column); column < end_column; ++column) {
      const Index s = p.w.tap_of(at.column, column);
      // Where dilation makes the window skip the cell, no tap is equal; reading it does no harm.
      const Index wanted = r < 0 || s < 0 ? -1 : r * p.w.kernel + s;
      const int64_t offset = offset_of(at, p.h, p.w, true, row, column);
      int tap[kPack];
      load_taps<kPack>(tap, taps, offset, p.wide_taps);
      Accumulator<T> grad[kPack];
      load_widened<kPack, T>(grad, dy + offset);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
        if (tap[e] == wanted) sums[e] += grad[e];
      }
    }
  }
  store_narrowed<kPack, T>(dx + offset_of(at, p.h, p.w, false, at.row, at.column), sums);
}

// ddy[window] = ddx[the window's tap]
template <class T, int kPack, class Index>
__global__ void __launch_bounds__(kThreads, 3)
    pool_gather(const __grid_constant__ Problem<Index> p, const T* __restrict__ ddx, T* __restrict__ ddy,
                const void* __restrict__ taps) {
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread >= p.count) return;
  const Place<Index> at = place_of<kPack>(p, Index(thread), p.h.by_out, p.w.by_out);
  const int64_t out = offset_of(at, p.h, p.w, true, at.row, at.column);
  int tap[kPack];
  load_taps<kPack>(tap, taps, out, p.wide_taps);
  Pack<T, kPack> gathered;
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    Index s = tap[e];
    const Index r = split_off(s, p.w.by_kernel);
    const Index row = p.h.cell(at.row, r), column = p.w.cell(at.column, s);
    const bool exists = p.h.holds(row) && p.w.holds(column);
    gathered.elements[e] = exists ? ddx[offset_of(at, p.h, p.w, false, row, column) + e] : narrow<T>(0);
  }
  store_pack(ddy + out, gathered);
}

// ---- launchers ----

// Whether every index, and every position in or around the planes, is far below 2^31.
bool fits_int32(const MaxPool2dParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 30;
  const auto reach = [](const PoolAxis& a) {
    return max64(a.in, a.out * a.stride) + a.pad + a.kernel * a.dilation + a.stride;
  };
  const int64_t planes = p.batch * p.channels;
  return planes * p.h.in * p.w.in < kLimit && planes * p.h.out * p.w.out < kLimit && reach(p.h) < kLimit &&
         reach(p.w) < kLimit;
}

bool fits_packs(const MaxPool2dParams& p) {
  const int64_t pack = 16 / element_size(p.dtype);
  return p.channels_last && p.channels % pack == 0 && !p.wide_taps && is_aligned(p.input) &&
         is_aligned(p.output) && reinterpret_cast<uintptr_t>(p.taps) % pack == 0 && fits_int32(p);
}

// fn(T{}, pack size, Index{}): the variants above.
template <class Fn>
void for_variant(const MaxPool2dParams& p, Fn fn) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (fits_packs(p)) return fn(element, std::integral_constant<int, kPackSize<T>>{}, int32_t{});
    fits_int32(p) ? fn(element, std::integral_constant<int, 1>{}, int32_t{})
                  : fn(element, std::integral_constant<int, 1>{}, int64_t{});
  });
}

template <class Index>
Problem<Index> problem_of(const MaxPool2dParams& p, int pack, bool pooled) {
  const int64_t cells = pooled ? p.h.out * p.w.out : p.h.in * p.w.in;
  return {Axis<Index>(p.h),
          Axis<Index>(p.w),
          Divide<Index>::by(p.channels / pack),
          Index(p.batch * p.channels / pack * cells),
          p.channels_last,
          p.wide_taps};
}

template <class Index>
int64_t blocks_of(const Problem<Index>& problem) {
  return ceil_div(problem.count, kThreads);
}

}  // namespace

void max_pool2d(const MaxPool2dParams& p, Stream stream) {
  for_variant(p, [&](auto element, auto pack, auto index) {
    using T = decltype(element);
    using Index = decltype(index);
    const auto problem = problem_of<Index>(p, pack.value, true);
    launch(pool<T, pack.value, Index>, blocks_of(problem), kThreads, 0, stream, problem,
           static_cast<const T*>(p.input), static_cast<T*>(p.output), p.taps, p.indices);
  });
}

void max_pool2d_backward(const MaxPool2dParams& p, Stream stream) {
  for_variant(p, [&](auto element, auto pack, auto index) {
    using T = decltype(element);
    using Index = decltype(index);
    const auto problem = problem_of<Index>(p, pack.value, false);
    launch(pool_backward<T, pack.value, Index>, blocks_of(problem), kThreads, 0, stream, problem,
           static_cast<const T*>(p.input), static_cast<T*>(p.output), static_cast<const void*>(p.taps));
  });
}

void max_pool2d_gather(const MaxPool2dParams& p, Stream stream) {
  for_variant(p, [&](auto element, auto pack, auto index) {
    using T = decltype(element);
    using Index = decltype(index);
    const auto problem = problem_of<Index>(p, pack.value, true);
    launch(pool_gather<T, pack.value, Index>, blocks_of(problem), kThreads, 0, stream, problem,
           static_cast<const T*>(p.input), static_cast<T*>(p.output), static_cast<const void*>(p.taps));
  });
}

}  // namespace cuda_cnn::cuda
