// Two small kernels with a place for each kind of mistake, and with kNone none: what the emulator must catch,
// and must not complain about.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda {

enum class Bug : int {
  kNone,
  kMissingBarrier,
  kMissingWait,
  kEarlyPrefetch,
  kWrongSwizzle,
  kNoSwizzle,
  kLoaderOffByOne,
  kSharedOutOfBounds,
  kUnwrittenRows,
  kDivergentBarrier,
  kIncompleteWarp,
  kMisalignedCopy,
  kUnrounded,
  kPlainGlobalOutOfBounds,
  kPlainSharedOutOfBounds,
  kShuffleAsFence,
  kEarlyExit,
  kAtomics,
  kWarpBarrierForBlock,
  kOverlappingBlocks,
  kReadsOtherBlock,
  kRegisterOutOfBounds,  // from here on what only AddressSanitizer sees
  kHostTableOutOfBounds,
};

// ---- D = A · Bᵀ: A [m][depth], B [n][depth] bfloat16, D [m][n] float; one 64 x 64 tile a block ----

constexpr int kTile = 64, kRowBytes = 64, kDepth = 32, kStages = 3, kGemmThreads = 128;

struct GemmShared {
  alignas(128) unsigned char a[kStages][kTile * kRowBytes];
  alignas(128) unsigned char b[kStages][kTile * kRowBytes];
};

// Two rows share a line of 128 bytes; the 16-byte chunk is exchanged by the line's number.
template <Bug kBug>
__device__ uint32_t tile_offset(int row, int chunk) {
  const int line = kBug == Bug::kNoSwizzle ? 0 : row / 2;
  return row * kRowBytes + ((chunk ^ (line & 3)) << 4);
}

template <Bug kBug>
__device__ void load_tile(uint32_t tile, const BFloat16* matrix, int first_row, int rows, int depth, int k) {
  const int chunk = threadIdx.x % 4, column = k + chunk * 8;
  for (int row = threadIdx.x / 4; row < kTile; row += kGemmThreads / 4) {
    const int source_row = first_row + row;
    const bool inside = source_row < rows + (kBug == Bug::kLoaderOffByOne) && column < depth;
    if (kBug == Bug::kUnwrittenRows && !inside) continue;
    const int swizzled_row = kBug == Bug::kWrongSwizzle && row == 13 ? row + 2 : row;
    const uint32_t target = tile + (tile_offset<kBug>(swizzled_row, chunk) & 48u) + row * kRowBytes;
    const BFloat16* source = inside ? matrix + int64_t{source_row} * depth + column : matrix;
    ptx::copy_async<16>(target + (kBug == Bug::kMisalignedCopy ? 8 : 0), source, inside ? 16 : 0);
  }
}

template <Bug kBug>
__device__ void multiply_tile(float (&d)[4][2][4], uint32_t a_tile, uint32_t b_tile) {
  const int lane = threadIdx.x % 32, first_column = threadIdx.x / 32 * 16;
  for (int step = 0; step < 2; ++step) {
    uint32_t b[4];
    const int b_row = first_column + lane % 8 + lane / 16 * 8;
    ptx::load_matrix<4>(b, b_tile + tile_offset<kBug>(b_row, step * 2 + lane / 8 % 2));
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4];
      if (kBug == Bug::kIncompleteWarp && lane == 31) continue;
      ptx::load_matrix<4>(a, a_tile + tile_offset<kBug>(i * 16 + lane % 16, step * 2 + lane / 16));
      ptx::mma_bf16(d[i][0], a, b[0], b[1]);
      ptx::mma_bf16(d[i][1], a, b[2], b[3]);
    }
  }
}

template <Bug kBug>
__global__ void __launch_bounds__(kGemmThreads)
    gemm(const BFloat16* a, const BFloat16* b, float* d, int m, int n, int depth) {
  GemmShared& shared = shared_storage<GemmShared>();
  const int m0 = blockIdx.x * kTile, n0 = blockIdx.y * kTile, steps = (depth + kDepth - 1) / kDepth;
  const uint32_t a_tiles = ptx::shared_address(shared.a), b_tiles = ptx::shared_address(shared.b);
  constexpr int kTileBytes = kTile * kRowBytes;
  const auto prefetch = [&](int step) {
    if (step < steps) {
      const int overrun = kBug == Bug::kSharedOutOfBounds && step == 2 ? kStages : 0;
      load_tile<kBug>(a_tiles + step % kStages * kTileBytes, a, m0, m, depth, step * kDepth);
      load_tile<kBug>(b_tiles + (step % kStages + overrun) * kTileBytes, b, n0, n, depth, step * kDepth);
    }
    ptx::copy_commit();
  };
  float accumulator[4][2][4] = {};
  for (int step = 0; step < kStages - 1; ++step) prefetch(step);
  for (int step = 0; step < steps; ++step) {
    if (kBug == Bug::kEarlyPrefetch) prefetch(step + kStages - 1);
    if (kBug == Bug::kMissingWait || kBug == Bug::kEarlyPrefetch) {
      ptx::copy_wait<kStages - 1>();
    } else {
      ptx::copy_wait<kStages - 2>();
    }
    if (kBug == Bug::kWarpBarrierForBlock) {
      __syncwarp();
    } else if (kBug != Bug::kMissingBarrier &&
               (kBug != Bug::kDivergentBarrier || threadIdx.x < 96 || step != 1)) {
      __syncthreads();
    }
    if (kBug != Bug::kEarlyPrefetch) prefetch(step + kStages - 1);
    multiply_tile<kBug>(accumulator, a_tiles + step % kStages * kTileBytes,
                        b_tiles + step % kStages * kTileBytes);
  }
  if (kBug == Bug::kMissingWait) ptx::copy_wait<0>();
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      for (int h = 0; h < 4; ++h) {
        const int row = m0 + i * 16 + g + h / 2 * 8,
                  column = n0 + threadIdx.x / 32 * 16 + j * 8 + 2 * t + h % 2;
        if (row < m && column < n) d[int64_t{row} * n + column] = accumulator[i][j][h];
      }
    }
  }
}

// ---- sums[row] = Σ x[row][·], one block a row ----

constexpr int kSumThreads = 96;

struct SumShared {
  float values[kSumThreads];
};

template <Bug kBug>
__global__ void row_sums(const float* x, float* sums, int columns) {
  SumShared& shared = shared_storage<SumShared>();
  const int self = threadIdx.x;
  float sum = 0.f, held[2] = {};
  for (int i = self; i < columns + (kBug == Bug::kPlainGlobalOutOfBounds); i += kSumThreads) {
    sum += x[int64_t{blockIdx.x} * columns + i];
  }
  if (kBug == Bug::kRegisterOutOfBounds) {
    float* register_file = held;
    register_file[self / 32] = sum;
    sum = register_file[self / 32];
  }
  if (kBug == Bug::kAtomics) {
    atomicAdd(&sums[blockIdx.x], sum);
    return;
  }
  if (kBug == Bug::kEarlyExit && self >= columns) return;
  shared.values[self] = sum;
  if (kBug == Bug::kShuffleAsFence) {
    __shfl_sync(kFullWarp, sum, 0);
  } else if (kBug != Bug::kMissingBarrier) {
    __syncthreads();
  }
  if (self >= 32) return;
  sum = 0.f;
  for (int i = self; i < kSumThreads + (kBug == Bug::kPlainSharedOutOfBounds); i += 32)
    sum += shared.values[i];
  __syncwarp();  // orders the reads above before the writes below
  shared.values[self] = sum;
  __syncwarp();
  sum = shared.values[self ^ 1] + shared.values[self];
  __syncwarp();
  sum = warp_reduce(sum, Sum{}) * 0.5f;
  if (kBug == Bug::kReadsOtherBlock && self == 0 && blockIdx.x > 0) sum += 0.f * sums[blockIdx.x - 1];
  if (self == 0) sums[kBug == Bug::kOverlappingBlocks ? blockIdx.x / 2 : blockIdx.x] = sum;
}

// ---- TF32: d = a · b for one 16 x 8 x 8 product ----

template <Bug kBug>
__global__ void tf32_product(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto operand = [](float value) {
    return kBug == Bug::kUnrounded ? float_bits(value) : ptx::round_tf32(float_bits(value));
  };
  const uint32_t fragment[4] = {operand(a[g * 8 + t]), operand(a[(g + 8) * 8 + t]), operand(a[g * 8 + t + 4]),
                                operand(a[(g + 8) * 8 + t + 4])};
  float sum[4] = {};
  ptx::mma_tf32(sum, fragment, operand(b[t * 8 + g]), operand(b[(t + 4) * 8 + g]));
  for (int h = 0; h < 4; ++h) d[(g + h / 2 * 8) * 8 + 2 * t + h % 2] = sum[h];
}

// ---- entry points for ctypes: true, or false with the emulator's report ----

template <class Launcher>
bool succeeds(Launcher launcher) {
  try {
    launcher();
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

// Calls fn with the bug as a constant.
template <int kFirst = 0, class Fn>
void with_bug(int bug, Fn fn) {
  if constexpr (kFirst <= static_cast<int>(Bug::kHostTableOutOfBounds)) {
    if (bug != kFirst) return with_bug<kFirst + 1>(bug, fn);
    fn(std::integral_constant<Bug, static_cast<Bug>(kFirst)>{});
  }
}

}  // namespace cuda_cnn::cuda

#define EXPORT extern "C" __attribute__((visibility("default"))) bool

using namespace cuda_cnn::cuda;
using cuda_cnn::BFloat16;

EXPORT run_gemm(int bug, float* d, const BFloat16* a, const BFloat16* b, int m, int n, int depth) {
  return succeeds([&] {
    with_bug(bug, [&](auto constant) {
      const Grid grid((m + kTile - 1) / kTile, (n + kTile - 1) / kTile);
      launch(gemm<constant.value>, grid, kGemmThreads, sizeof(GemmShared), nullptr, a, b, d, m, n, depth);
    });
  });
}

EXPORT run_row_sums(int bug, float* sums, const float* x, int rows, int columns) {
  static const volatile int lengths[2] = {100, 200};
  return succeeds([&] {
    for (int i = 0; bug == static_cast<int>(Bug::kHostTableOutOfBounds) && lengths[i] != columns; ++i) {
    }
    with_bug(bug, [&](auto constant) {
      launch(row_sums<constant.value>, rows, kSumThreads, sizeof(SumShared), nullptr, x, sums, columns);
    });
  });
}

EXPORT run_tf32_product(int bug, float* d, const float* a, const float* b) {
  return succeeds([&] {
    with_bug(bug, [&](auto constant) { launch(tf32_product<constant.value>, 1, 32, 0, nullptr, a, b, d); });
  });
}
