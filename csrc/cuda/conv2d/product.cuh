// The product of two tiles in registers: D[row][column] += sum of A[row][.] * B[column][.], a quarter for
// each of the 2 x 2 warps. store_slab hands 16 rows of the warp's quarter on through shared memory, row by
// row.
//
//   TensorCoreProduct  mma.sync, accumulated in float32: bfloat16, float16, and float32 rounded to TF32.
//   FmaProduct         multiply-add of the type itself: strict float32, float64.
#pragma once

#include "cuda/conv2d/tile.cuh"

namespace cuda_cnn::cuda::conv2d {

constexpr int kSlabRows = 16;

template <int kRows, int kColumns>
struct WarpQuarter {
  static constexpr int kTileRows = kRows, kTileColumns = kColumns;
  static constexpr int kWarpRows = kRows / 2, kWarpColumns = kColumns / 2;
  static constexpr int kSlabs = kWarpRows / kSlabRows;
  static constexpr int kSlabPitch = kWarpColumns + 8;  // elements: rows of a slab begin 8 banks apart

  __device__ static int lane() { return threadIdx.x % kWarpSize; }
  __device__ static int first_row() { return threadIdx.x / kWarpSize % 2 * kWarpRows; }
  __device__ static int first_column() { return threadIdx.x / kWarpSize / 2 * kWarpColumns; }
};

template <class T, class LayoutA, class LayoutB, int kRows, int kColumns>
struct TensorCoreProduct : WarpQuarter<kRows, kColumns> {
  using Quarter = WarpQuarter<kRows, kColumns>;
  using Element = T;
  using Sum = float;
  static constexpr int kRowBlocks = Quarter::kWarpRows / 16, kColumnBlocks = Quarter::kWarpColumns / 8;

  float sums[kRowBlocks][kColumnBlocks][4] = {};

  __device__ __forceinline__ static void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      ptx::mma_bf16(d, a, b0, b1);
    } else if constexpr (std::is_same_v<T, Half>) {
      ptx::mma_fp16(d, a, b0, b1);
    } else {
      ptx::mma_tf32(d, a, b0, b1);
    }
  }

  __device__ __forceinline__ static void round(uint32_t (&fragment)[4]) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (uint32_t& element : fragment) element = ptx::round_tf32(element);
    }
  }

  __device__ __forceinline__ void multiply(uint32_t tile_a, uint32_t tile_b) {
    const int lane = Quarter::lane();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kRowBlocks][4], b[kColumnBlocks / 2][4];
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
        LayoutA::load_a(a[i], tile_a, Quarter::first_row() + 16 * i, step, lane);
        round(a[i]);
      }
#pragma unroll
      for (int j = 0; j < kColumnBlocks / 2; ++j) {
        LayoutB::load_b(b[j], tile_b, Quarter::first_column() + 16 * j, step, lane);
        round(b[j]);
      }
#pragma unroll
      for (int i = 0; i < kRowBlocks; ++i) {
#pragma unroll
        for (int j = 0; j < kColumnBlocks; ++j) {
          multiply_add(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void store_slab(int slab, uint32_t address) const {
    const int row = Quarter::lane() / 4, column = Quarter::lane() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int at = (row + 8 * half) * Quarter::kSlabPitch + column + 8 * j;
        ptx::store_shared(address + at * 4,
                          make_float2(sums[slab][j][2 * half], sums[slab][j][2 * half + 1]));
      }
    }
  }
};

// A lane holds rows g + 8i and columns t + 4j (g = lane / 4, t = lane % 4) where the reduction is contiguous,
// and reads kPack terms of the sum at once; else packs of rows and columns, and reads them at one term.
template <class T, class LayoutA, class LayoutB, int kRows, int kColumns>
struct FmaProduct : WarpQuarter<kRows, kColumns> {
  using Quarter = WarpQuarter<kRows, kColumns>;
  using Element = T;
  using Sum = T;
  static constexpr int kPack = kPackSize<T>;
  static constexpr int kLaneRows = Quarter::kWarpRows / 8, kLaneColumns = Quarter::kWarpColumns / 4;

  T sums[kLaneRows][kLaneColumns] = {};

  // Row (column) that index i of this lane's share names.
  __device__ __forceinline__ static int row_of(int i) {
    const int g = Quarter::lane() / 4;
    return LayoutA::kReductionContiguous ? g + 8 * i : (g + 8 * (i / kPack)) * kPack + i % kPack;
  }
  __device__ __forceinline__ static int column_of(int j) {
    const int t = Quarter::lane() % 4;
    return LayoutA::kReductionContiguous ? t + 4 * j : (t + 4 * (j / kPack)) * kPack + j % kPack;
  }

  __device__ __forceinline__ void multiply(uint32_t tile_a, uint32_t tile_b) {
    if constexpr (LayoutA::kReductionContiguous) {
#pragma unroll
      for (int chunk = 0; chunk < kReductionBytes / kChunkBytes; ++chunk)
        multiply_chunk(tile_a, tile_b, chunk);
    } else {
#pragma unroll 2
      for (int row = 0; row < kDepth<T>; ++row) multiply_row(tile_a, tile_b, row);
    }
  }

  __device__ __forceinline__ void multiply_chunk(uint32_t tile_a, uint32_t tile_b, int chunk) {
    Pack<T, kPack> a[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      a[i] =
          ptx::load_shared<Pack<T, kPack>>(tile_a + LayoutA::offset(Quarter::first_row() + row_of(i), chunk));
    }
#pragma unroll
    for (int j = 0; j < kLaneColumns; ++j) {
      const uint32_t at = LayoutB::offset(Quarter::first_column() + column_of(j), chunk);
      const auto b = ptx::load_shared<Pack<T, kPack>>(tile_b + at);
#pragma unroll
      for (int e = 0; e < kPack; ++e) {
#pragma unroll
        for (int i = 0; i < kLaneRows; ++i) sums[i][j] = fma(a[i].elements[e], b.elements[e], sums[i][j]);
      }
    }
  }

  __device__ __forceinline__ void multiply_row(uint32_t tile_a, uint32_t tile_b, int row) {
    Pack<T, kPack> a[kLaneRows / kPack], b[kLaneColumns / kPack];
#pragma unroll
    for (int i = 0; i < kLaneRows / kPack; ++i) {
      const int chunk = (Quarter::first_row() + row_of(i * kPack)) / kPack;
      a[i] = ptx::load_shared<Pack<T, kPack>>(tile_a + LayoutA::offset(row, chunk));
    }
#pragma unroll
    for (int j = 0; j < kLaneColumns / kPack; ++j) {
      const int chunk = (Quarter::first_column() + column_of(j * kPack)) / kPack;
      b[j] = ptx::load_shared<Pack<T, kPack>>(tile_b + LayoutB::offset(row, chunk));
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        sums[i][j] = fma(a[i / kPack].elements[i % kPack], b[j / kPack].elements[j % kPack], sums[i][j]);
      }
    }
  }

  __device__ __forceinline__ void store_slab(int slab, uint32_t address) const {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      if (row_of(i) / kSlabRows != slab) continue;
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j) {
        const int at = row_of(i) % kSlabRows * Quarter::kSlabPitch + column_of(j);
        ptx::store_shared(address + at * int(sizeof(T)), sums[i][j]);
      }
    }
  }
};

}  // namespace cuda_cnn::cuda::conv2d
