// The implicit product of weight gradients: D[row][(r, s, c)] = sum over pixels of dy[pixel][row] * x[tap's
// pixel][c]. The reduction is the slow index of both operands' memory, so the tiles keep it so
// (ReductionColumns).
//
// The pixels are split over `splits` blocks, a number that the shape alone decides; each writes its sums to
// the workspace, and add_splits adds them in the order of their numbers. No atomics: the same bits in every
// run.
#pragma once

#include "cuda/conv2d/epilogue.cuh"
#include "cuda/conv2d/load.cuh"

namespace cuda_cnn::cuda::conv2d {

// Which chunks of a tile [pixel][column] a thread fills: one column chunk, several pixels.
template <class T, int kColumns>
struct ColumnChunks {
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kChunks = kColumns / kPack;
  static constexpr int kStep = kThreads / kChunks;
  static constexpr int kCount = kDepth<T> / kStep;
  static_assert(kThreads % kChunks == 0 && kDepth<T> % kStep == 0, "whole passes over the tile");
  using Layout = ReductionColumns<T, kColumns>;

  __device__ static int chunk() { return threadIdx.x % kChunks; }
  __device__ static int row(int i) { return threadIdx.x / kChunks + i * kStep; }
  __device__ static uint32_t offset(int i) { return Layout::offset(row(i), chunk()); }
};

// Tile of dy: kColumns output channels of each pixel.
template <class T, int kColumns, Load kLoad>
class GradColumns : ColumnChunks<T, kColumns> {
  using Chunks = ColumnChunks<T, kColumns>;
  static constexpr int kPack = Chunks::kPack;

 public:
  // From first_pixel on, kDepth pixels a tile.
  __device__ GradColumns(const WeightGradient& p, int group, int first_column, int first_pixel)
      : next_(static_cast<const T*>(p.dy) + (first_pixel + Chunks::row(0)) * p.dy_pixel +
              (group * p.rows + first_column + Chunks::chunk() * kPack)),
        pixel_(p.dy_pixel),
        count_(p.rows - first_column - Chunks::chunk() * kPack) {}

  __device__ __forceinline__ void start(uint32_t tile, int first_pixel, int end_pixel) {
    const int pixels = count_ > 0 ? end_pixel - first_pixel - Chunks::row(0) : 0;
#pragma unroll
    for (int i = 0; i < Chunks::kCount; ++i) {
      const T* from = next_ + i * Chunks::kStep * pixel_;
      const bool exists = i * Chunks::kStep < pixels;
      if constexpr (kLoad != Load::kScalar) {
        ptx::copy_async<16>(tile + Chunks::offset(i), from, exists ? 16 : 0);
      } else {
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          staged_[i].elements[e] = exists && e < count_ ? from[e] : zero_of<T>();
      }
    }
    next_ += kDepth<T> * pixel_;
  }

  __device__ __forceinline__ void finish(uint32_t tile) {
    if constexpr (kLoad == Load::kScalar) {
#pragma unroll
      for (int i = 0; i < Chunks::kCount; ++i) ptx::store_shared(tile + Chunks::offset(i), staged_[i]);
    }
  }

 private:
  const T* next_;
  const int64_t pixel_;
  const int count_;
  Pack<T, kPack> staged_[kLoad == Load::kScalar ? Chunks::kCount : 1];
};

// Tile of x: kColumns of the flattened (r, s, c) for each pixel. A thread's taps stay the same, its pixels
// move.
template <class T, int kColumns, Load kLoad>
class TapColumns : ColumnChunks<T, kColumns> {
  using Chunks = ColumnChunks<T, kColumns>;
  static constexpr int kPack = Chunks::kPack;

 public:
  __device__ TapColumns(const WeightGradient& p, int group, int first_column)
      : p_(p),
        x_(static_cast<const T*>(p.x.data)),
        walk_(TapWalk::at(first_column + Chunks::chunk() * kPack, p.x.channels, p.w.taps)),
        group_channel_(group * p.x.channels),
        top_(walk_.r < p.h.taps ? source_at(p.h, 0, walk_.r) : kOutside),
        left_(source_at(p.w, 0, walk_.s)),
        column_(x_ + group_channel_ + walk_.c) {
    // Scalar loads map for themselves: their packs may reach beyond the vectors.
    if constexpr (kLoad == Load::kMapped) map_.load(p.prologue, group_channel_ + walk_.c);
  }

  __device__ __forceinline__ void start(uint32_t tile, int first_pixel, int end_pixel) {
#pragma unroll
    for (int i = 0; i < Chunks::kCount; ++i) {
      const int pixel = first_pixel + Chunks::row(i);
      const PixelIndex at = pixel_index(pixel, p_.h.by_count, p_.w.by_count);
      if constexpr (kLoad == Load::kScalar) {
        gather_elements(staged_[i], at, pixel < end_pixel);
        continue;
      }
      const int y = top_ + at.i * p_.h.move, x = left_ + at.j * p_.w.move;
      const bool valid = pixel < end_pixel && inside(y, p_.x.height) && inside(x, p_.x.width);
      // Both are below 2^31 (plan.cu) where the pixel exists; elsewhere the number may wrap around.
      const uint32_t number = (uint32_t(at.image) * p_.x.height + y) * p_.x.width + x;
      const T* from = column_ + int64_t{static_cast<int>(number)} * static_cast<int>(p_.x.pixel);
      if constexpr (kLoad == Load::kAsync) {
        ptx::copy_async<16>(tile + Chunks::offset(i), from, valid ? 16 : 0);
      } else if constexpr (kLoad == Load::kMapped) {
        inside_ = (inside_ & ~(1u << i)) | unsigned{valid} << i;
        staged_[i] = valid ? load_pack<kPack>(from) : Pack<T, kPack>{};
      }
    }
  }

  __device__ __forceinline__ void finish(uint32_t tile) {
    if constexpr (kLoad != Load::kAsync) {
#pragma unroll
      for (int i = 0; i < Chunks::kCount; ++i) {
        if (kLoad == Load::kMapped && (inside_ >> i & 1)) staged_[i] = map_(staged_[i]);
        ptx::store_shared(tile + Chunks::offset(i), staged_[i]);
      }
    }
  }

 private:
  // Null outside of the image or of the reduction.
  __device__ __forceinline__ const T* source(const PixelIndex& at, const TapWalk& tap, bool exists) const {
    const int y = source_at(p_.h, at.i, tap.r), x = source_at(p_.w, at.j, tap.s);
    if (!exists || tap.r >= p_.h.taps || !inside(y, p_.x.height) || !inside(x, p_.x.width)) return nullptr;
    return x_ + ((int64_t{at.image} * p_.x.height + y) * p_.x.width + x) * p_.x.pixel + group_channel_ +
           tap.c;
  }

  __device__ __forceinline__ void gather_elements(Pack<T, kPack>& pack, const PixelIndex& at,
                                                  bool exists) const {
    TapWalk tap = walk_;
    const bool map = p_.prologue.any();
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const T* from = source(at, tap, exists);
      T value = from ? *from : zero_of<T>();
      if (from && map)
        value = narrow_fast<T>(mapped<T>(p_.prologue, widen_fast(value), group_channel_ + tap.c));
      pack.elements[e] = value;
      tap.advance(1, p_.x.channels, p_.w.taps);
    }
  }

  const WeightGradient& p_;
  const T* x_;
  const TapWalk walk_;
  const int group_channel_;
  const int top_, left_;  // of the thread's tap, for output pixel (0, 0)
  const T* const column_;
  ChannelMap<T> map_;  // of kMapped
  unsigned inside_ = 0;
  Pack<T, kPack> staged_[kLoad == Load::kAsync ? 1 : Chunks::kCount];
};

template <class Product>
struct WeightGradShared {
  static constexpr int kStages = 4;
  using T = typename Product::Element;
  alignas(128) unsigned char a[kStages][Product::kTileRows * kReductionBytes];
  alignas(128) unsigned char b[kStages][Product::kTileColumns * kReductionBytes];
};

// The sums of one block: to the workspace, or as the gradient itself where there is one split.
template <class Product>
__device__ __forceinline__ void write_gradient(const Product& product, const WeightGradient& p,
                                               uint32_t slabs, int group, int first_row, int first_column,
                                               int columns) {
  using T = typename Product::Element;
  using A = typename Product::Sum;
  const int64_t weights = int64_t{p.groups} * p.rows * columns;
  const int column = first_column + Product::first_column(), row = first_row + Product::first_row();
  const uint32_t slab_address = slabs + threadIdx.x / kWarpSize * kSlabBytes<Product>;
#pragma unroll
  for (int slab = 0; slab < Product::kSlabs; ++slab) {
    product.store_slab(slab, slab_address);
    __syncwarp();
    for (int i = Product::lane(); i < kSlabRows * Product::kWarpColumns; i += kWarpSize) {
      const int slab_row = i / Product::kWarpColumns, slab_column = i % Product::kWarpColumns;
      const int at_row = row + slab * kSlabRows + slab_row, at_column = column + slab_column;
      const A sum =
          ptx::load_shared<A>(slab_address + (slab_row * Product::kSlabPitch + slab_column) * int(sizeof(A)));
      if (at_row >= p.rows || at_column >= columns) continue;
      const int64_t at = (int64_t{group} * p.rows + at_row) * columns + at_column;
      if (p.sums) {
        static_cast<A*>(p.out)[blockIdx.y * weights + at] = sum;
      } else {
        static_cast<T*>(p.out)[at] = narrow_fast<T>(sum);
      }
    }
    __syncwarp();
  }
}

template <class Product, Load kLoad>
__global__ void __launch_bounds__(kThreads, 2) weight_gradient(const __grid_constant__ WeightGradient p) {
  using T = typename Product::Element;
  using Shared = WeightGradShared<Product>;
  constexpr int kStages = Shared::kStages, kAhead = kLoad == Load::kAsync ? kStages - 1 : 1;
  auto& shared = shared_storage<Shared>();

  const int columns = p.h.taps * p.w.taps * p.x.channels;
  const int column_tiles = (columns + Product::kTileColumns - 1) / Product::kTileColumns;
  const int first_row = blockIdx.x / column_tiles * Product::kTileRows;
  const int first_column = blockIdx.x % column_tiles * Product::kTileColumns;
  const int group = blockIdx.z;
  const int pixels = p.images * p.h.count * p.w.count;
  const Range share = split_range((pixels + kDepth<T> - 1) / kDepth<T>, p.splits, blockIdx.y);

  GradColumns<T, Product::kTileRows, kLoad> grad(p, group, first_row, share.begin * kDepth<T>);
  TapColumns<T, Product::kTileColumns, kLoad> taps(p, group, first_column);
  const uint32_t tiles_a = ptx::shared_address(shared.a), tiles_b = ptx::shared_address(shared.b);
  const auto stage_a = [&](int tile) { return tiles_a + tile % kStages * int(sizeof(shared.a[0])); };
  const auto stage_b = [&](int tile) { return tiles_b + tile % kStages * int(sizeof(shared.b[0])); };
  const auto start = [&](int tile) {
    const int first_pixel = (share.begin + tile) * kDepth<T>;
    grad.start(stage_a(tile), first_pixel, pixels);
    taps.start(stage_b(tile), first_pixel, pixels);
  };
  const auto finish = [&](int tile) {
    grad.finish(stage_a(tile));
    taps.finish(stage_b(tile));
  };
  const int tiles = share.end - share.begin;
  for (int tile = 0; tile < kAhead; ++tile) {
    if (tile < tiles) {
      start(tile);
      finish(tile);
    }
    ptx::copy_commit();
  }
  Product product;
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::copy_wait<kAhead - 1>();
    __syncthreads();
    if (tile + kAhead < tiles) start(tile + kAhead);
    ptx::copy_commit();
    product.multiply(stage_a(tile), stage_b(tile));
    if (tile + kAhead < tiles) finish(tile + kAhead);
  }
  ptx::copy_wait<0>();
  __syncthreads();  // the tiles' memory becomes the epilogue's
  static_assert(4 * kSlabBytes<Product> <= sizeof(shared.a) + sizeof(shared.b),
                "the epilogue reuses the tiles");
  write_gradient(product, p, tiles_a, group, first_row, first_column, columns);
}

}  // namespace cuda_cnn::cuda::conv2d
