// Every wrapper of csrc/cuda/ptx.cuh, and the shuffles, by itself: one warp, each lane with its own words in
// and out.
// __init__.py holds the inputs and what must come out.
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "cuda/reduce.cuh"

namespace cuda_cnn::cuda {
namespace {

struct Shared {
  alignas(16) uint32_t rows[32][4];
};

// in: 16 bytes of source, how many of them to copy, three words that keep the next lane's source aligned.
// out: the target, which began as 0xa5a5a5a5.
struct Copy16 {
  static constexpr int kIn = 8, kOut = 4;
  template <int kBytes>
  __device__ static void copy(const uint32_t* in, uint32_t* out) {
    auto& shared = shared_storage<Shared>();
    uint32_t* row = shared.rows[threadIdx.x];
    for (int i = 0; i < 4; ++i) row[i] = 0xa5a5a5a5u;
    __syncwarp();
    for (int at = 0; at < 16; at += kBytes) {
      const int left = static_cast<int>(in[4]) - at;
      ptx::copy_async<kBytes>(ptx::shared_address(row) + at, reinterpret_cast<const char*>(in) + at,
                              left < 0        ? 0
                              : left > kBytes ? kBytes
                                              : left);
    }
    ptx::copy_commit();
    ptx::copy_wait<0>();
    __syncwarp();
    for (int i = 0; i < 4; ++i) out[i] = row[i];
  }
  __device__ static void run(const uint32_t* in, uint32_t* out) { copy<16>(in, out); }
};
struct Copy8 : Copy16 {
  __device__ static void run(const uint32_t* in, uint32_t* out) { copy<8>(in, out); }
};
struct Copy4 : Copy16 {
  __device__ static void run(const uint32_t* in, uint32_t* out) { copy<4>(in, out); }
};

// in: the lane's row of 16 bytes, and the number of the row whose address the lane gives. out: the fragment.
template <int kMatrices, bool kTranspose>
struct LoadMatrix {
  static constexpr int kIn = 5, kOut = kMatrices;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    auto& shared = shared_storage<Shared>();
    for (int i = 0; i < 4; ++i) shared.rows[threadIdx.x][i] = in[i];
    __syncwarp();
    uint32_t fragment[kMatrices];
    ptx::load_matrix<kMatrices, kTranspose>(fragment, ptx::shared_address(shared.rows[in[4]]));
    for (int i = 0; i < kMatrices; ++i) out[i] = fragment[i];
  }
};

// in: four words of a, two of b, four of d. out: d.
template <int kType>
struct Mma {
  static constexpr int kIn = 10, kOut = 4;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = bits_float(in[6 + i]);
    if constexpr (kType == 0) ptx::mma_bf16(d, a, in[4], in[5]);
    if constexpr (kType == 1) ptx::mma_fp16(d, a, in[4], in[5]);
    if constexpr (kType == 2) ptx::mma_tf32(d, a, in[4], in[5]);
    for (int i = 0; i < 4; ++i) out[i] = float_bits(d[i]);
  }
};

struct RoundTf32 {
  static constexpr int kIn = 1, kOut = 1;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    int lane = threadIdx.x;
    ptx::keep(lane);
    ptx::keep(in);
    out[0] = ptx::round_tf32(in[lane - static_cast<int>(threadIdx.x)]);
  }
};
struct PackBf16 {
  static constexpr int kIn = 2, kOut = 1;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    out[0] = ptx::pack_bf16(bits_float(in[0]), bits_float(in[1]));
  }
};
struct PackFp16 {
  static constexpr int kIn = 2, kOut = 1;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    out[0] = ptx::pack_fp16(bits_float(in[0]), bits_float(in[1]));
  }
};
struct UnpackFp16 {
  static constexpr int kIn = 1, kOut = 1;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    out[0] = float_bits(ptx::unpack_fp16(static_cast<uint16_t>(in[0])));
  }
};

struct SqrtApprox {
  static constexpr int kIn = 1, kOut = 1;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    out[0] = float_bits(ptx::sqrt_approx(bits_float(in[0])));
  }
};

// in: four words. out: the same, through 16-, 8-, 4- and 2-byte stores, and 4-, 8- and 16-byte loads.
struct SharedAccess {
  static constexpr int kIn = 4, kOut = 16;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    auto& shared = shared_storage<Shared>();
    uint32_t* row = shared.rows[threadIdx.x];
    const uint32_t address = ptx::shared_address(row);
    ptx::store_shared(address, make_uint4(in[0], in[1], in[2], in[3]));
    for (int i = 0; i < 4; ++i) out[i] = row[i];
    ptx::store_shared(address, make_uint2(in[3], in[2]));
    ptx::store_shared(address + 8, in[1]);
    ptx::store_shared(address + 12, static_cast<uint16_t>(in[0]));
    ptx::store_shared(address + 14, static_cast<uint16_t>(in[0] >> 16));
    for (int i = 0; i < 4; ++i) out[4 + i] = ptx::load_shared<uint32_t>(address + 4 * i);
    const auto low = ptx::load_shared<uint2>(address), high = ptx::load_shared<uint2>(address + 8);
    out[8] = low.x, out[9] = low.y, out[10] = high.x, out[11] = high.y;
    const auto all = ptx::load_shared<uint4>(address);
    out[12] = all.x, out[13] = all.y, out[14] = all.z, out[15] = all.w;
  }
};

// in: a value, a lane for __shfl_sync. out: the shuffles that the kernels use.
struct Shuffle {
  static constexpr int kIn = 2, kOut = 8;
  __device__ static void run(const uint32_t* in, uint32_t* out) {
    out[0] = __shfl_sync(kFullWarp, in[0], static_cast<int>(in[1]));
    out[1] = __shfl_up_sync(kFullWarp, in[0], 1);
    out[2] = __shfl_down_sync(kFullWarp, in[0], 1);
    for (int i = 0; i < 5; ++i) out[3 + i] = __shfl_xor_sync(kFullWarp, in[0], 16 >> i);
  }
};

template <class Op>
__global__ void __launch_bounds__(32) golden(const uint32_t* in, uint32_t* out) {
  uint32_t words[Op::kOut];
  Op::run(in + threadIdx.x * Op::kIn, words);
  for (int i = 0; i < Op::kOut; ++i) out[threadIdx.x * Op::kOut + i] = words[i];
}

template <class Op>
bool run(const uint32_t* in, uint32_t* out) {
  try {
    launch(golden<Op>, 1, 32, sizeof(Shared), nullptr, in, out);
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

}  // namespace
}  // namespace cuda_cnn::cuda

#define GOLDEN(name, ...)                                                                                   \
  extern "C" __attribute__((visibility("default"))) bool golden_##name(const uint32_t* in, uint32_t* out) { \
    return cuda_cnn::cuda::run<cuda_cnn::cuda::__VA_ARGS__>(in, out);                                       \
  }
GOLDEN(copy_16, Copy16)
GOLDEN(copy_8, Copy8)
GOLDEN(copy_4, Copy4)
GOLDEN(load_matrix_1, LoadMatrix<1, false>)
GOLDEN(load_matrix_2, LoadMatrix<2, false>)
GOLDEN(load_matrix_4, LoadMatrix<4, false>)
GOLDEN(load_matrix_1_transposed, LoadMatrix<1, true>)
GOLDEN(load_matrix_2_transposed, LoadMatrix<2, true>)
GOLDEN(load_matrix_4_transposed, LoadMatrix<4, true>)
GOLDEN(mma_bf16, Mma<0>)
GOLDEN(mma_fp16, Mma<1>)
GOLDEN(mma_tf32, Mma<2>)
GOLDEN(round_tf32, RoundTf32)
GOLDEN(pack_bf16, PackBf16)
GOLDEN(pack_fp16, PackFp16)
GOLDEN(unpack_fp16, UnpackFp16)
GOLDEN(sqrt_approx, SqrtApprox)
GOLDEN(shared_access, SharedAccess)
GOLDEN(shuffle, Shuffle)
