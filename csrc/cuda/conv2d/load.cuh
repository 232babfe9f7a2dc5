// Filling the tiles of the two implicit products.
//
//   kAsync   16-byte cp.async, zeros outside: nothing passes through registers.
//   kMapped  16-byte loads, the prologue in registers, 16-byte stores: values and vectors are still on their
//            way while the previous tile is multiplied.
//   kScalar  element by element, for channels that do not fill 16 bytes (odd counts, one channel a group):
//            the reduction stays dense over (r, s, c). Applies a prologue too.
#pragma once

#include "cuda/conv2d/problem.h"
#include "cuda/conv2d/tile.cuh"

namespace cuda_cnn::cuda::conv2d {

template <class T>
__device__ __forceinline__ T zero_of() {
  return narrow<T>(Accumulator<T>(0));
}

template <class T>
__device__ __forceinline__ Accumulator<T> mapped(const Prologue& prologue, Accumulator<T> value,
                                                 int channel) {
  using A = Accumulator<T>;
  const A scale = prologue.scale ? static_cast<const A*>(prologue.scale)[channel] : A(1);
  const A shift = prologue.shift ? static_cast<const A*>(prologue.shift)[channel] : A(0);
  return conv2d_prologue(value, scale, shift, prologue.relu);
}

// The prologue of kPack neighbouring channels, the same for all pixels of a thread.
template <class T>
struct ChannelMap {
  using A = Accumulator<T>;
  static constexpr int kPack = kPackSize<T>;
  A scale[kPack], shift[kPack];
  bool relu;

  // The vectors and `channel` are aligned to packs (choose_load).
  __device__ __forceinline__ void load(const Prologue& prologue, int channel) {
    relu = prologue.relu;
#pragma unroll
    for (int e = 0; e < kPack; ++e) scale[e] = 1, shift[e] = 0;
    if (prologue.scale) load_widened<kPack, A>(scale, static_cast<const A*>(prologue.scale) + channel);
    if (prologue.shift) load_widened<kPack, A>(shift, static_cast<const A*>(prologue.shift) + channel);
  }

  __device__ __forceinline__ Pack<T, kPack> operator()(const Pack<T, kPack>& pack) const {
    A values[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      values[e] = conv2d_prologue(widen_fast(pack.elements[e]), scale[e], shift[e], relu);
    }
    Pack<T, kPack> result;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int e = 0; e < kPack; e += 2) {
        const uint32_t pair = narrow_pair<T>(values[e], values[e + 1]);
        result.elements[e].bits = static_cast<uint16_t>(pair);
        result.elements[e + 1].bits = static_cast<uint16_t>(pair >> 16);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kPack; ++e) result.elements[e] = narrow_fast<T>(values[e]);
    }
    return result;
  }
};

// Tile of kRows output pixels: 64 bytes of each one's taps and channels.
template <class T, int kRows, Load kLoad>
class PixelRows {
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kChunks = kReductionBytes / kChunkBytes;
  static constexpr int kStep = kThreads / kChunks;  // rows between a thread's chunks
  static constexpr int kCount = kRows / kStep;
  using Layout = ReductionRows<T>;

 public:
  __device__ PixelRows(const Correlation& p, const Axis& h, const Axis& w, int group, int first_pixel,
                       int pixels)
      : p_(p), h_(h), w_(w), group_channel_(group * p.source.channels) {
    walk_ = SourceWalk::at(chunk() * kPack, p.source.channels, h, w, p.source.width, p.source.pixel);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int pixel = first_pixel + row(i);
      const bool exists = pixel < pixels;
      const PixelIndex at = pixel_index(exists ? pixel : 0, h.by_count, w.by_count);
      top_[i] = exists ? source_at(h, at.i, 0) : kOutside;
      left_[i] = source_at(w, at.j, 0);
      const int64_t position = (int64_t{at.image} * p.source.height + top_[i]) * p.source.width + left_[i];
      base_[i] = static_cast<const T*>(p.source.data) + position * p.source.pixel + group_channel_;
      ptx::keep(top_[i]);
      ptx::keep(left_[i]);
      ptx::keep(base_[i]);
    }
  }

  // Begins the next tile; finish() completes it, except where the copies are asynchronous.
  __device__ __forceinline__ void start(uint32_t tile) {
    if constexpr (kLoad == Load::kScalar) {
      gather_elements();
    } else {
      gather_chunks(tile);
    }
  }

  __device__ __forceinline__ void finish(uint32_t tile) {
    if constexpr (kLoad == Load::kMapped) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (inside_ >> i & 1) staged_[i] = map_(staged_[i]);
      }
    }
    if constexpr (kLoad != Load::kAsync) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) ptx::store_shared(tile + Layout::offset(row(i), chunk()), staged_[i]);
    }
  }

 private:
  __device__ static int chunk() { return threadIdx.x % kChunks; }
  __device__ static int row(int i) { return threadIdx.x / kChunks + i * kStep; }

  __device__ __forceinline__ bool has_tap(int i, const SourceWalk& at) const {
    return at.r < h_.taps && inside(top_[i] + at.row, p_.source.height) &&
           inside(left_[i] + at.column, p_.source.width);
  }

  __device__ __forceinline__ void gather_chunks(uint32_t tile) {
    inside_ = 0;
    if constexpr (kLoad == Load::kMapped) map_.load(p_.prologue, group_channel_ + walk_.c);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid = has_tap(i, walk_);
      if constexpr (kLoad == Load::kAsync) {
        ptx::copy_async<16>(tile + Layout::offset(row(i), chunk()), base_[i] + walk_.offset, valid ? 16 : 0);
      } else {
        inside_ |= unsigned{valid} << i;
        staged_[i] = valid ? load_pack<kPack>(base_[i] + walk_.offset) : Pack<T, kPack>{};
      }
    }
    walk_.advance(kDepth<T>, p_.source.channels, h_, w_);
  }

  __device__ __forceinline__ void gather_elements() {
    SourceWalk at = walk_;
    const bool map = p_.prologue.any();
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        T value = zero_of<T>();
        if (has_tap(i, at)) {
          value = base_[i][at.offset];
          if (map) value = narrow_fast<T>(mapped<T>(p_.prologue, widen_fast(value), group_channel_ + at.c));
        }
        staged_[i].elements[e] = value;
      }
      at.advance(1, p_.source.channels, h_, w_);
    }
    walk_.advance(kDepth<T>, p_.source.channels, h_, w_);
  }

  const Correlation& p_;
  const Axis &h_, &w_;
  const int group_channel_;
  SourceWalk walk_;
  int top_[kCount], left_[kCount];
  const T* base_[kCount];
  Pack<T, kPack> staged_[kLoad == Load::kAsync ? 1 : kCount];
  ChannelMap<T> map_;  // of kMapped, the tile's
  unsigned inside_ = 0;
};

// Tile of kRows weight rows: 64 bytes of each. Rows are whole packs, so this is always asynchronous.
template <class T, int kRows>
class WeightRows {
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kChunks = kReductionBytes / kChunkBytes;
  static constexpr int kStep = kThreads / kChunks;

 public:
  __device__ WeightRows(const void* weight, int64_t row_length, int first_row, int rows)
      : next_(static_cast<const T*>(weight) + (first_row + row(0)) * row_length + chunk() * kPack),
        step_(kStep * row_length),
        left_(static_cast<int>(row_length) - chunk() * kPack),
        rows_(rows - first_row - row(0)) {}

  __device__ __forceinline__ void start(uint32_t tile) {
    const int rows = left_ > 0 ? rows_ : 0;
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) {
      ptx::copy_async<16>(tile + ReductionRows<T>::offset(row(i), chunk()), next_ + i * step_,
                          i * kStep < rows ? 16 : 0);
    }
    next_ += kDepth<T>;
    left_ -= kDepth<T>;
  }

 private:
  __device__ static int chunk() { return threadIdx.x % kChunks; }
  __device__ static int row(int i) { return threadIdx.x / kChunks + i * kStep; }

  const T* next_;
  const int64_t step_;
  int left_;        // elements of the rows from here on
  const int rows_;  // from the thread's first on
};

}  // namespace cuda_cnn::cuda::conv2d
