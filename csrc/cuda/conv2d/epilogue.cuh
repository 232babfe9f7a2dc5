// The way of the sums into memory: bias, residual, ReLU, and the statistics of each channel.
// A warp hands 16 rows at a time through shared memory, so that whole sectors are read and written; a lane
// keeps the same four columns all along.
#pragma once

#include "cuda/conv2d/problem.h"
#include "cuda/conv2d/product.cuh"

namespace cuda_cnn::cuda::conv2d {

constexpr int kLaneColumns = 4;

// Bytes of shared memory that the four warps need here.
template <class Product>
constexpr int kSlabBytes = kSlabRows * Product::kSlabPitch * int(sizeof(typename Product::Sum));

// Sums of a lane's columns, about a value of the column itself: no cancellation where the mean is large.
template <class A>
struct ColumnSums {
  A pivot[kLaneColumns], first[kLaneColumns] = {}, second[kLaneColumns] = {};
  bool has_pivot = false;

  __device__ __forceinline__ void add(const A (&values)[kLaneColumns]) {
#pragma unroll
    for (int e = 0; e < kLaneColumns; ++e) {
      if (!has_pivot) pivot[e] = values[e];
      const A difference = values[e] - pivot[e];
      first[e] += difference;
      second[e] += difference * difference;
    }
    has_pivot = true;
  }
};

// values[e] = columns[e], beyond `count` 0.
template <class T>
__device__ __forceinline__ void load_columns(Accumulator<T> (&values)[kLaneColumns], const T* columns,
                                             bool vectors, int count) {
  if (vectors) return load_widened<kLaneColumns, T>(values, columns);
#pragma unroll
  for (int e = 0; e < kLaneColumns; ++e) values[e] = e < count ? widen_fast(columns[e]) : Accumulator<T>(0);
}

template <class T>
__device__ __forceinline__ void store_columns(T* columns, const Accumulator<T> (&values)[kLaneColumns],
                                              bool vectors, int count) {
  if (vectors) return store_narrowed<kLaneColumns, T>(columns, values);
#pragma unroll
  for (int e = 0; e < kLaneColumns; ++e) {
    if (e < count) columns[e] = narrow_fast<T>(values[e]);
  }
}

// The statistics of the warp's rows: (sum, M2) of each column, from the lanes that share it.
template <class Product, class A>
__device__ __forceinline__ void store_statistics(ColumnSums<A>& sums, A* partials, int rows, int count) {
  constexpr int kLanesOfRow = Product::kWarpColumns / kLaneColumns;
#pragma unroll
  for (int e = 0; e < kLaneColumns; ++e) {
    // Every lane that shares the column moves to the pivot of the first of them, which holds the warp's first
    // row.
    const A pivot = __shfl_sync(kFullWarp, sums.pivot[e], Product::lane() % kLanesOfRow);
    const int own_rows =
        (rows - Product::lane() / kLanesOfRow + kWarpSize / kLanesOfRow - 1) * kLanesOfRow / kWarpSize;
    const A shift = own_rows > 0 ? sums.pivot[e] - pivot : A(0);
    A first = sums.first[e] + own_rows * shift;
    A second = sums.second[e] + shift * (2 * sums.first[e] + own_rows * shift);
#pragma unroll
    for (int distance = kWarpSize / 2; distance >= kLanesOfRow; distance /= 2) {
      first += __shfl_xor_sync(kFullWarp, first, distance);
      second += __shfl_xor_sync(kFullWarp, second, distance);
    }
    if (Product::lane() < kLanesOfRow && e < count && rows > 0) {
      const A spread = second - first * (first / rows);
      partials[2 * e] = pivot * rows + first;
      partials[2 * e + 1] = spread < 0 ? A(0) : spread;
    }
  }
}

// `pixel_of_row` holds the output pixel of each row of the tile, or -1. `first_row` is the tile's, of `rows`
// in all.
template <class Product>
__device__ __forceinline__ void write_out(const Product& product, const Correlation& p, uint32_t slabs,
                                          const int* pixel_of_row, int group, int first_row, int first_column,
                                          int rows) {
  using T = typename Product::Element;
  using A = typename Product::Sum;
  constexpr int kLanesOfRow = Product::kWarpColumns / kLaneColumns, kRowsOfPass = kWarpSize / kLanesOfRow;
  const Epilogue& epilogue = p.epilogue;
  const int lane = Product::lane(), lane_row = lane / kLanesOfRow,
            lane_column = lane % kLanesOfRow * kLaneColumns;
  const int column = first_column + Product::first_column() + lane_column, count = p.columns - column;
  const int64_t channel = int64_t{group} * p.columns + column;
  const bool vectors = epilogue.vectors && count >= kLaneColumns;
  const uint32_t slab_address = slabs + threadIdx.x / kWarpSize * kSlabBytes<Product>;

  A bias[kLaneColumns] = {};
  if (epilogue.bias && count > 0)
    load_columns<T>(bias, static_cast<const T*>(epilogue.bias) + channel, false, count);
  ColumnSums<A> sums;
#pragma unroll
  for (int slab = 0; slab < Product::kSlabs; ++slab) {
    product.store_slab(slab, slab_address);
    __syncwarp();
#pragma unroll
    for (int pass = 0; pass < kSlabRows / kRowsOfPass; ++pass) {
      const int row = pass * kRowsOfPass + lane_row;
      const int pixel = pixel_of_row[Product::first_row() + slab * kSlabRows + row];
      const uint32_t at = slab_address + (row * Product::kSlabPitch + lane_column) * int(sizeof(A));
      using Quad = Pack<A, kLaneColumns>;
      A values[kLaneColumns];
      if constexpr (sizeof(Quad) == 16) {
        const Quad quad = ptx::load_shared<Quad>(at);
#pragma unroll
        for (int e = 0; e < kLaneColumns; ++e) values[e] = quad.elements[e];
      } else {
#pragma unroll
        for (int e = 0; e < kLaneColumns; ++e) values[e] = ptx::load_shared<A>(at + e * int(sizeof(A)));
      }
      if (pixel < 0 || count <= 0) continue;
      A residual[kLaneColumns] = {};
      if (epilogue.residual) {
        const T* from = static_cast<const T*>(epilogue.residual) + pixel * epilogue.residual_pixel + channel;
        load_columns<T>(residual, from, vectors, count);
      }
#pragma unroll
      for (int e = 0; e < kLaneColumns; ++e) {
        values[e] += bias[e] + residual[e];
        if (epilogue.relu && values[e] < 0) values[e] = 0;
        values[e] = widen_fast(narrow_fast<T>(values[e]));
      }
      if (epilogue.partials) sums.add(values);
      store_columns<T>(static_cast<T*>(p.out) + pixel * p.out_pixel + channel, values, vectors, count);
    }
    __syncwarp();
  }
  if (epilogue.partials) {
    const int warp_row = (first_row + Product::first_row()) / Product::kWarpRows;
    const int warp_rows = rows - first_row - Product::first_row();
    A* partials =
        static_cast<A*>(epilogue.partials) + (int64_t{warp_row} * p.groups * p.columns + channel) * 2;
    store_statistics<Product>(sums, partials, warp_rows < Product::kWarpRows ? warp_rows : Product::kWarpRows,
                              count);
  }
}

}  // namespace cuda_cnn::cuda::conv2d
