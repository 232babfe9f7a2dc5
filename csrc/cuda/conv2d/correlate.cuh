// The implicit product of forward passes and input gradients: D[pixel][column] = sum of A[pixel][(r, s, c)] *
// B[column][(r, s, c)], where A is gathered from NHWC memory tile by tile and B is the weight.
//
// A pipeline of kStages tiles in shared memory. Asynchronous loads run kStages - 1 tiles ahead; loads through
// registers one tile, their values arriving during the product of the tile before.
#pragma once

#include "cuda/conv2d/epilogue.cuh"
#include "cuda/conv2d/load.cuh"

namespace cuda_cnn::cuda::conv2d {

template <class Product>
struct CorrelateShared {
  static constexpr int kStages = 4;
  alignas(128) unsigned char a[kStages][Product::kTileRows * kReductionBytes];
  alignas(128) unsigned char b[kStages][Product::kTileColumns * kReductionBytes];
  int pixel_of_row[Product::kTileRows];
};

// The output pixel of each row of the tile: the first row of a phase may lie anywhere.
template <class Product>
__device__ void locate_rows(CorrelateShared<Product>& shared, const Correlation& p, const Axis& h,
                            const Axis& w, int first_row, int rows) {
  for (int i = threadIdx.x; i < Product::kTileRows; i += kThreads) {
    const int row = first_row + i;
    const PixelIndex at = pixel_index(row, h.by_count, w.by_count);
    const int y = output_at(h, at.i), x = output_at(w, at.j);
    shared.pixel_of_row[i] = row < rows ? (at.image * p.out_height + y) * p.out_width + x : -1;
  }
}

template <class Product, Load kLoad>
__global__ void __launch_bounds__(kThreads, 2) correlate(const __grid_constant__ Correlation p) {
  using T = typename Product::Element;
  using Shared = CorrelateShared<Product>;
  constexpr int kStages = Shared::kStages, kAhead = kLoad == Load::kAsync ? kStages - 1 : 1;
  auto& shared = shared_storage<Shared>();

  const int group = blockIdx.z % p.groups, phase = blockIdx.z / p.groups;
  const Axis &h = p.h[phase / p.phases_w], &w = p.w[phase % p.phases_w];
  const int rows = p.images * h.count * w.count;
  // Tiles of the same pixels are neighbours: the second finds them in the cache.
  const int column_tiles = (p.columns + Product::kTileColumns - 1) / Product::kTileColumns;
  const int first_row = blockIdx.x / column_tiles * Product::kTileRows;
  const int first_column = blockIdx.x % column_tiles * Product::kTileColumns;
  if (first_row >= rows) return;  // the grid is made for the largest phase

  const int64_t weight_phase = (phase / p.phases_w) * p.phases_of_row + phase % p.phases_w;
  const T* weight =
      static_cast<const T*>(p.weight) + weight_phase * p.weight_phase + group * p.columns * p.weight_row;
  PixelRows<T, Product::kTileRows, kLoad> pixels(p, h, w, group, first_row, rows);
  WeightRows<T, Product::kTileColumns> weights(weight, p.weight_row, first_column, p.columns);
  locate_rows(shared, p, h, w, first_row, rows);

  const uint32_t tiles_a = ptx::shared_address(shared.a), tiles_b = ptx::shared_address(shared.b);
  const auto stage_a = [&](int tile) { return tiles_a + tile % kStages * int(sizeof(shared.a[0])); };
  const auto stage_b = [&](int tile) { return tiles_b + tile % kStages * int(sizeof(shared.b[0])); };
  const int tiles = (h.taps * w.taps * p.source.channels + kDepth<T> - 1) / kDepth<T>;
  for (int tile = 0; tile < kAhead; ++tile) {
    if (tile < tiles) {
      pixels.start(stage_a(tile));
      weights.start(stage_b(tile));
      pixels.finish(stage_a(tile));
    }
    ptx::copy_commit();
  }
  Product product;
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::copy_wait<kAhead - 1>();
    __syncthreads();
    const int next = tile + kAhead;
    if (next < tiles) {
      pixels.start(stage_a(next));
      weights.start(stage_b(next));
    }
    ptx::copy_commit();
    product.multiply(stage_a(tile), stage_b(tile));
    if (next < tiles) pixels.finish(stage_a(next));
  }
  ptx::copy_wait<0>();
  __syncthreads();  // the tiles' memory becomes the epilogue's
  static_assert(4 * kSlabBytes<Product> <= sizeof(shared.a) + sizeof(shared.b),
                "the epilogue reuses the tiles");
  write_out(product, p, tiles_a, shared.pixel_of_row, group, first_row, first_column, rows);
}

}  // namespace cuda_cnn::cuda::conv2d
