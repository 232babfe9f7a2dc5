// What both directions of batch normalisation share: the sums of channels, and the numbers of channels.
//
// Two sums a channel are taken over parts whose size is fixed, then over the parts in index order in double:
// the same bits in every run and on every card.
//   rows    channels_last: a thread has a pack of channels (16 bytes, or one) and every 32nd (8th) row
//           of the part
//   planes  contiguous: a block has one channel, its threads packs of neighbouring pixels
#pragma once

#include "cuda/launch.cuh"
#include "cuda/moments.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "kernels/batch_norm.h"

namespace cuda_cnn::cuda::batch_norm {

constexpr int kThreads = 256;
constexpr int kPartRows = 512;       // rows: 16 for each thread; 1600 blocks for ResNet's first layer
constexpr int kPartElements = 8192;  // planes: 32 for each thread

inline int64_t part_size(const BatchNormShape& s) { return s.channels_last ? kPartRows : kPartElements; }
inline int64_t parts_of(const BatchNormShape& s) { return ceil_div(s.per_channel(), part_size(s)); }

// The numbers of each channel in the accumulation type, as the element-wise passes read them, and the parts'
// sums.
template <class A>
struct Workspace {
  A *mean, *scale, *shift;                   // BatchNormMap
  A *grad_scale, *grad_slope, *grad_offset;  // BatchNormGradient
  double* partials;                          // [part][channel][2]

  Workspace(void* base, int64_t channels) {
    const int64_t padded = ceil_div(channels, 4) * 4;
    A* next = static_cast<A*>(base);
    for (A** vector : {&mean, &scale, &shift, &grad_scale, &grad_slope, &grad_offset}) {
      *vector = next;
      next += padded;
    }
    partials = reinterpret_cast<double*>(next);
  }
};

// i / n and i % n; in 32 bits where they fit, for that takes a tenth of the time.
struct Split {
  int64_t quotient, remainder;
};
__device__ __forceinline__ Split split(int64_t i, int64_t n) {
  if ((i | n) >> 32 == 0) {
    const uint32_t small = static_cast<uint32_t>(i), by = static_cast<uint32_t>(n);
    return {small / by, small % by};
  }
  return {i / n, i % n};
}

template <class A>
__device__ __forceinline__ A apply_map(A x, A mean, A scale, A shift) {
  return fma(x - mean, scale, shift);
}

// ---- the two sums of a part ----

// Forward: x - pivot and its square. Backward: g and g * (x - mean), g being dy under the ReLU's mask.
template <class T>
struct Terms {
  using A = Accumulator<T>;
  const T *x, *dy, *y;
  bool relu;

  template <bool kBackward, int kPack>
  __device__ __forceinline__ void add(int64_t offset, const A (&mean)[kPack], const A (&scale)[kPack],
                                      const A (&shift)[kPack], A (&first)[kPack], A (&second)[kPack]) const {
    A values[kPack], grads[kPack], outputs[kPack];
    load_widened<kPack, T>(values, x + offset);
    if (kBackward) load_widened<kPack, T>(grads, dy + offset);
    if (kBackward && y) load_widened<kPack, T>(outputs, y + offset);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const A centred = values[e] - mean[e];
      if constexpr (kBackward) {
        const A z = y ? outputs[e] : apply_map(values[e], mean[e], scale[e], shift[e]);
        const A g = relu && z <= 0 ? A(0) : grads[e];
        first[e] += g;
        second[e] = fma(g, centred, second[e]);
      } else {
        first[e] += centred;
        second[e] = fma(centred, centred, second[e]);
      }
    }
  }
};

template <class A>
__device__ __forceinline__ A finite_or_zero(A value) {
  return value - value == 0 ? value : A(0);
}

// The part as finish_* reads it: forward (sum, M2), backward the sums themselves.
template <bool kBackward>
__device__ __forceinline__ void store_partial(double* partial, double first, double second, double pivot,
                                              int64_t count) {
  const double spread = second - first * (first / count);
  partial[0] = kBackward ? first : pivot * count + first;
  partial[1] = kBackward ? second : spread < 0 ? 0 : spread;
}

constexpr int kPivotRows = 8;

template <class A, int kLines, int kColumns>
struct RowsShared {
  A first[kLines][kColumns], second[kLines][kColumns];
  A pivot[kColumns];
};

// The mean of the part's first rows: near the channel's mean, so that little is lost when it is taken off
// again. An infinite pivot would turn finite values into NaN.
template <class T, int kLines, int kColumns>
__device__ __forceinline__ void find_pivots(RowsShared<Accumulator<T>, kLines, kColumns>& shared,
                                            const T* first_row, int64_t channels, int64_t first_channel,
                                            int64_t rows) {
  using A = Accumulator<T>;
  const int count = static_cast<int>(min64(kPivotRows, rows));
  for (int column = threadIdx.x; column < kColumns; column += kThreads) {
    A sum = 0;
    for (int row = 0; row < count && first_channel + column < channels; ++row) {
      sum += widen_fast(first_row[row * channels + first_channel + column]);
    }
    shared.pivot[column] = finite_or_zero(sum / A(count));
  }
  __syncthreads();
}

template <int kPack>
constexpr int kRowLanes = kPack == 1 ? 32 : 8;

template <class T, int kPack, bool kBackward>
__global__ void __launch_bounds__(kThreads, 3)
    reduce_rows(int64_t rows, int64_t channels, Terms<T> terms, Workspace<Accumulator<T>> workspace) {
  using A = Accumulator<T>;
  constexpr int kLanes = kRowLanes<kPack>, kLines = kThreads / kLanes, kColumns = kLanes * kPack;
  auto& shared = shared_storage<RowsShared<A, kLines, kColumns>>();
  const int lane = threadIdx.x % kLanes, line = threadIdx.x / kLanes;
  // Stretches of channels first, parts of rows next: both may be more than a grid's y holds.
  const auto stretches = static_cast<unsigned>(ceil_div(channels, kColumns));
  const int64_t part = blockIdx.x / stretches, first_channel = int64_t{blockIdx.x % stretches} * kColumns;
  const int64_t channel = first_channel + lane * kPack;
  const int64_t first_row = part * kPartRows, count = min64(kPartRows, rows - first_row);
  A mean[kPack] = {}, scale[kPack] = {}, shift[kPack] = {}, first[kPack] = {}, second[kPack] = {};
  if constexpr (!kBackward)
    find_pivots(shared, terms.x + first_row * channels, channels, first_channel, count);
  if (channel < channels) {
    if constexpr (kBackward) {
      load_widened<kPack, A>(mean, workspace.mean + channel);
      load_widened<kPack, A>(scale, workspace.scale + channel);
      load_widened<kPack, A>(shift, workspace.shift + channel);
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) mean[e] = shared.pivot[lane * kPack + e];
    }
    for (int64_t row = line; row < count; row += kLines) {
      const int64_t offset = (first_row + row) * channels + channel;
      terms.template add<kBackward>(offset, mean, scale, shift, first, second);
    }
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    shared.first[line][lane * kPack + e] = first[e];
    shared.second[line][lane * kPack + e] = second[e];
  }
  __syncthreads();
  const int column = threadIdx.x;
  if (column >= kColumns || first_channel + column >= channels) return;
  A a = shared.first[0][column], b = shared.second[0][column];
  for (int other = 1; other < kLines; ++other) {
    a += shared.first[other][column];
    b += shared.second[other][column];
  }
  const A pivot = kBackward ? A(0) : shared.pivot[column];
  store_partial<kBackward>(workspace.partials + (part * channels + first_channel + column) * 2, a, b, pivot,
                           count);
}

template <class A>
struct PlanesShared {
  A scratch[kThreads / kWarpSize];
};

template <class T, int kPack, bool kBackward>
__global__ void __launch_bounds__(kThreads, 3)
    reduce_planes(BatchNormShape s, int64_t parts, Terms<T> terms, Workspace<Accumulator<T>> workspace) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<PlanesShared<A>>();
  const int64_t channel = blockIdx.x / parts, part = blockIdx.x % parts;
  const int64_t begin = part * kPartElements, count = min64(kPartElements, s.per_channel() - begin);
  const auto offset_of = [&](int64_t element) {
    const Split at = split(element, s.spatial);
    return (at.quotient * s.channels + channel) * s.spatial + at.remainder;
  };
  A mean[kPack], scale[kPack], shift[kPack], first[kPack] = {}, second[kPack] = {};
  A centre;
  if constexpr (kBackward) {
    centre = workspace.mean[channel];
  } else {
    const A value = threadIdx.x < count ? A(widen_fast(terms.x[offset_of(begin + threadIdx.x)])) : A(0);
    centre = finite_or_zero(block_reduce<kThreads>(value, shared.scratch, Sum{}) / A(min64(kThreads, count)));
  }
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    mean[e] = centre;
    scale[e] = kBackward ? workspace.scale[channel] : A(0);
    shift[e] = kBackward ? workspace.shift[channel] : A(0);
  }
  for (int64_t i = threadIdx.x * kPack; i < count; i += kThreads * kPack) {
    terms.template add<kBackward>(offset_of(begin + i), mean, scale, shift, first, second);
  }
#pragma unroll
  for (int e = 1; e < kPack; ++e) {
    first[0] += first[e];
    second[0] += second[e];
  }
  const A a = block_reduce<kThreads>(first[0], shared.scratch, Sum{});
  const A b = block_reduce<kThreads>(second[0], shared.scratch, Sum{});
  if (threadIdx.x == 0) {
    store_partial<kBackward>(workspace.partials + (part * s.channels + channel) * 2, a, b, centre, count);
  }
}

// ---- channels ----

template <class A>
__device__ __forceinline__ void store_map(const Workspace<A>& workspace, int64_t c,
                                          const BatchNormMap<A>& map) {
  workspace.mean[c] = map.mean;
  workspace.scale[c] = map.scale;
  workspace.shift[c] = map.shift;
}

// ---- elements ----

// values[e] = the vector's number for element e of the pack: neighbouring channels, or the same one.
template <int kPack, class A>
__device__ __forceinline__ void load_channels(A (&values)[kPack], const A* vector, int64_t channel,
                                              bool rows) {
  if (rows) return load_widened<kPack, A>(values, vector + channel);
#pragma unroll
  for (int e = 0; e < kPack; ++e) values[e] = vector[channel];
}

// The channel of the first element of pack i.
template <int kPack>
__device__ __forceinline__ int64_t channel_of(const BatchNormShape& s, int64_t i) {
  if (s.channels_last) return split(i, s.channels / kPack).remainder * kPack;
  return split(split(i, s.spatial / kPack).quotient, s.channels).remainder;
}

// ---- launchers ----

template <class T, int kPack, bool kBackward>
void reduce(const BatchNormShape& s, const Terms<T>& terms, const Workspace<Accumulator<T>>& workspace,
            Stream stream) {
  using A = Accumulator<T>;
  if (s.channels_last) {
    constexpr int kLanes = kRowLanes<kPack>, kColumns = kLanes * kPack;
    launch(reduce_rows<T, kPack, kBackward>, parts_of(s) * ceil_div(s.channels, kColumns), kThreads,
           sizeof(RowsShared<A, kThreads / kLanes, kColumns>), stream, s.per_channel(), s.channels, terms,
           workspace);
  } else {
    launch(reduce_planes<T, kPack, kBackward>, parts_of(s) * s.channels, kThreads, sizeof(PlanesShared<A>),
           stream, s, parts_of(s), terms, workspace);
  }
}

// Whether packs of 16 bytes stay within a row (channels_last) or a plane, at aligned addresses.
template <class... Pointers>
bool fits_packs(const BatchNormShape& s, Pointers... pointers) {
  return (s.channels_last ? s.channels : s.spatial) * element_size(s.dtype) % 16 == 0 &&
         (is_aligned(pointers) && ...);
}

}  // namespace cuda_cnn::cuda::batch_norm
