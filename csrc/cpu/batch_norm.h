// What the two passes of batch normalisation share on the CPU: how a tensor is cut, walked, and what each
// channel holds.
//
// A channel's elements are cut into at most kGroups groups, whatever the number of threads, and a group into
// chunks. A chunk is summed in the accumulation type, chunks and groups are joined in index order in double:
// so the bits do not depend on the threads, and long sums lose nothing.
//
//   channels_last: a group is a run of rows, split into blocks of channels; some rows are read together
//
//   contiguous: a group is a run of images of one channel
#pragma once

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"
#include "kernels/batch_norm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kGroups = 64;
// channels_last: every group has sums of its own for all channels, which another core may have to fetch. So
// a group has many rows, but for the first few groups, which occupy the cores.
constexpr int64_t kGroupRows = 512;
constexpr int64_t kFewGroups = 8;
constexpr int64_t kRows = 64;    // channels_last: rows of a chunk
constexpr int64_t kBlock = 512;  // channels_last: channels of a block
constexpr int64_t kRun = 4096;   // contiguous: elements of a chunk
constexpr int kWide = 4;         // vectors side by side
constexpr int64_t kElementsPerTask = 32768;
constexpr int64_t kPlanesEnough = 256;  // contiguous: with as many channels no channel is cut

template <class A>
constexpr int64_t kTile = kWide * kLanes<A>;

template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_lanes(const T* p, int64_t lanes) {
  return lanes == kLanes<T> ? load(p) : load_first(p, lanes);
}
template <class T>
CUDA_CNN_INLINE void store_lanes(T* p, Vec<Accumulator<T>> v, int64_t lanes) {
  if (lanes == kLanes<T>) {
    store(p, v);
  } else {
    store_first(p, v, lanes);
  }
}

// A result that with its operands, two or three times its size, is more than a core's share of the last cache
// is written past the caches: an ordinary store first reads what it overwrites, a sixth of what backward
// moves.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;
// Whether results of this shape are: of whole aligned vectors, as they then must be.
template <class T>
CUDA_CNN_INLINE bool streams(const void* result, const BatchNormShape& s) {
  return sizeof(T) == sizeof(float) && s.per_channel() * s.channels * 4 >= kStreamedBytes &&
         (s.channels_last ? s.channels : s.spatial) % kLanes<T> == 0 &&
         reinterpret_cast<uintptr_t>(result) % kVectorBytes == 0;
}
template <class T>
CUDA_CNN_INLINE void write_lanes(T* p, Vec<Accumulator<T>> v, int64_t lanes, bool streamed) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (streamed) return stream(p, v);
  }
  store_lanes(p, v, lanes);
}

// ---- Per-channel values
// ------------------------------------------------------------------------------------

template <class A>
struct MapLanes {
  Vec<A> mean, scale, shift;
  CUDA_CNN_INLINE Vec<A> operator()(Vec<A> x) const { return fma(x - mean, scale, shift); }
};
template <class A>
struct GradientLanes {
  Vec<A> scale, slope, offset;
};

// Doubles in and coefficients out, one array each, so that loops over channels are vector code; padded, so
// that whole vectors can be read. Both passes take them from one workspace.
template <class A>
struct Coefficients {
  static constexpr int kDoubles = 6, kArrays = 6;
  double *mean, *var, *weight, *bias;  // what a pass is given
  double *sum_g, *sum_gx;              // backward
  A* base;
  int64_t pitch;

  explicit Coefficients(int64_t channels) : pitch(ceil_div(channels, kTile<A>) * kTile<A>) {
    double* doubles = workspace<double>(Workspace::kShared, (kDoubles + kArrays) * pitch);
    double** const arrays[] = {&mean, &var, &weight, &bias, &sum_g, &sum_gx};
    for (int i = 0; i < kDoubles; ++i) *arrays[i] = doubles + i * pitch;
    base = reinterpret_cast<A*>(doubles + kDoubles * pitch);
  }
  CUDA_CNN_INLINE A* array(int i) const { return base + i * pitch; }
  CUDA_CNN_INLINE MapLanes<A> map(int64_t c) const {
    return {load(array(0) + c), load(array(1) + c), load(array(2) + c)};
  }
  CUDA_CNN_INLINE GradientLanes<A> gradient(int64_t c) const {
    return {load(array(3) + c), load(array(4) + c), load(array(5) + c)};
  }
  // The same channel in every lane.
  CUDA_CNN_INLINE MapLanes<A> map_of(int64_t c) const {
    return {broadcast(array(0)[c]), broadcast(array(1)[c]), broadcast(array(2)[c])};
  }
  CUDA_CNN_INLINE GradientLanes<A> gradient_of(int64_t c) const {
    return {broadcast(array(3)[c]), broadcast(array(4)[c]), broadcast(array(5)[c])};
  }
  void set_map(int64_t begin, int64_t end, double eps) const {
    for (int64_t c = begin; c < end; ++c) {
      const BatchNormMap<A> m = batch_norm_map<A>(mean[c], var[c], weight[c], bias[c], eps);
      array(0)[c] = m.mean;
      array(1)[c] = m.scale;
      array(2)[c] = m.shift;
    }
  }
};

CUDA_CNN_INLINE void read_channels(const ChannelVector& values, double if_null, int64_t begin, int64_t end,
                                   double* out) {
  if (!values.data) {
    for (int64_t c = begin; c < end; ++c) out[c] = if_null;
    return;
  }
  dispatch_dtype(values.dtype, [&](auto element) {
    const auto* in = static_cast<const decltype(element)*>(values.data);
    for (int64_t c = begin; c < end; ++c) out[c] = widen(in[c]);
  });
}
CUDA_CNN_INLINE void write_channels(const double* values, int64_t begin, int64_t end,
                                    const MutableChannelVector& out) {
  if (!out.data) return;
  dispatch_dtype(out.dtype, [&](auto element) {
    using T = decltype(element);
    auto* to = static_cast<T*>(out.data);
    for (int64_t c = begin; c < end; ++c) to[c] = narrow<T>(static_cast<Accumulator<T>>(values[c]));
  });
}

// ---- How a tensor is cut
// ------------------------------------------------------------------------------------

// Groups of the rows (channels_last) or images (contiguous), which this struct calls items.
struct Cut {
  int64_t items, step, groups;
  int64_t per_item;  // elements of a channel

  explicit Cut(const BatchNormShape& s) {
    items = s.channels_last ? s.batch * s.spatial : s.batch;
    per_item = s.channels_last ? 1 : s.spatial;
    const int64_t most = s.channels_last ? max64(items / kGroupRows, min64(kFewGroups, items / kRows))
                                         : ceil_div(kPlanesEnough, s.channels);
    groups = 1;
    while (2 * groups <= min64(kGroups, min64(items, most))) groups *= 2;
    step = ceil_div(items, groups);
    groups = ceil_div(items, step);
  }
  int64_t begin(int64_t group) const { return group * step; }
  int64_t end(int64_t group) const { return min64(items, (group + 1) * step); }
  int64_t count(int64_t group) const { return (end(group) - begin(group)) * per_item; }
};

// Calls fn(group, first channel, channels) for every group and block of channels, contiguous: for single
// channels.
template <class Fn>
void for_each_part(const BatchNormShape& s, const Cut& cut, const Fn& fn) {
  const int64_t width = s.channels_last ? kBlock : 1, blocks = ceil_div(s.channels, width);
  const int64_t elements = cut.step * cut.per_item * min64(width, s.channels);
  parallel_for(cut.groups * blocks, ceil_div(kElementsPerTask, elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * width;
      fn(i / blocks, first, min64(width, s.channels - first));
    }
  });
}

// channels_last: calls fn(Rows<kSide>, first row) for rows taken side by side, which spares loads of what
// each channel holds, and fn(Rows<1>, row) for the others.
template <int R>
struct Rows {
  static constexpr int value = R;
};
template <int kSide, class Fn>
CUDA_CNN_INLINE void for_rows(bool side_by_side, int64_t begin, int64_t end, const Fn& fn) {
  int64_t row = begin;
  for (; side_by_side && row + kSide <= end; row += kSide) fn(Rows<kSide>{}, row);
  for (; row < end; ++row) fn(Rows<1>{}, row);
}
// Rows read side by side: whether the next ones are asked for meanwhile. Of long rows few lie in a page of
// memory, where the prefetcher follows one stream; of longer ones each has pages of its own.
template <class T>
CUDA_CNN_INLINE bool prefetches(int64_t channels) {
  const int64_t row = channels * static_cast<int64_t>(sizeof(T));
  return row >= 512 && row < 4096;
}
// Of several tensors, rows are taken side by side as long as they do not fall into the same sets of the first
// cache; of more than a few lines only where the caches hold them: from memory they come best as they lie.
template <class T>
CUDA_CNN_INLINE bool fits_side_by_side(const BatchNormShape& s, int64_t longest) {
  const int64_t row = s.channels * static_cast<int64_t>(sizeof(T));
  return row <= 256 || (row <= longest && s.per_channel() * row < kStreamedBytes);
}
template <class T>
CUDA_CNN_INLINE bool reads_side_by_side(const BatchNormShape& s) {
  return fits_side_by_side<T>(s, 2047) || s.channels * static_cast<int64_t>(sizeof(T)) >= 4096;
}
template <class T>
CUDA_CNN_INLINE bool writes_side_by_side(const BatchNormShape& s) {
  return fits_side_by_side<T>(s, 512);
}

// contiguous: calls fn(first element, runs, length) for the chunks of a channel in a group; a chunk's runs
// lie an image apart.
template <class Fn>
CUDA_CNN_INLINE void for_each_chunk(const BatchNormShape& s, const Cut& cut, int64_t group, int64_t channel,
                                    const Fn& fn) {
  const int64_t images = max64(1, kRun / s.spatial);
  for (int64_t n = cut.begin(group); n < cut.end(group); n += images) {
    const int64_t plane = (n * s.channels + channel) * s.spatial;
    for (int64_t i = 0; i < s.spatial; i += kRun) {
      fn(plane + i, min64(images, cut.end(group) - n), min64(kRun, s.spatial - i));
    }
  }
}

// Calls fn(i, slot, lanes) for the vectors of a run; neighbouring vectors have different slots below kWide.
template <class A, class Fn>
CUDA_CNN_INLINE void for_each_vector(int64_t length, const Fn& fn) {
  int64_t i = 0;
  for (; i + kTile<A> <= length; i += kTile<A>) {
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) fn(i + v * kLanes<A>, v, int64_t{kLanes<A>});
  }
#pragma GCC unroll 4
  for (int v = 0; v < kWide - 1 && i + kLanes<A> <= length; ++v, i += kLanes<A>) fn(i, v, int64_t{kLanes<A>});
  if (i < length) fn(i, kWide - 1, length - i);
}

// Calls fn(begin, end) for stretches of rows (channels_last) or planes; the last ones first, in stretches
// long enough for the prefetcher: they are what the reducing pass has left in the cache.
template <class Fn>
CUDA_CNN_INLINE void for_all(const BatchNormShape& s, const Fn& fn) {
  const int64_t count = s.channels_last ? s.per_channel() : s.batch * s.channels;
  const int64_t step = ceil_div(kElementsPerTask, s.channels_last ? s.channels : s.spatial);
  parallel_for(count, step, [&](int64_t begin, int64_t end) {
    for (int64_t last = end; last > begin; last -= step) fn(max64(begin, last - step), last);
    end_of_stream();
  });
}

template <class A>
CUDA_CNN_INLINE A total(const Vec<A> (&v)[kWide]) {
  return sum((v[0] + v[1]) + (v[2] + v[3]));
}

}  // namespace
}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
