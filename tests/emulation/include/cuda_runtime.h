// Takes the place of the toolkit's <cuda_runtime.h> when kernels are compiled for the emulator: the part of
// the CUDA language and runtime that they use. No toolkit is needed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>

#include "../engine/engine.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ shared_memory_comes_from_shared_storage_in_launch_cuh
#define __restrict__ __restrict

// ---- vector types ----

#define CUDA_CNN_VECTOR_TYPES(T, name)                                          \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                                \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                    \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }            \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_CNN_VECTOR_TYPES(unsigned char, uchar)
CUDA_CNN_VECTOR_TYPES(unsigned short, ushort)
CUDA_CNN_VECTOR_TYPES(int, int)
CUDA_CNN_VECTOR_TYPES(unsigned, uint)
CUDA_CNN_VECTOR_TYPES(float, float)
CUDA_CNN_VECTOR_TYPES(double, double)
#undef CUDA_CNN_VECTOR_TYPES

struct dim3 : cuda_cnn::emulation::Dim3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : Dim3{x, y, z} {}
};

// ---- who am I ----

#define threadIdx (::cuda_cnn::emulation::thread_index())
#define blockIdx (::cuda_cnn::emulation::block_index())
// Variables, because cudaLaunchConfig_t has members of these names.
extern dim3 gridDim, blockDim;
constexpr int warpSize = 32;

// ---- synchronisation and warp collectives ----

#define CUDA_CNN_KERNEL_CALL inline __attribute__((always_inline))

CUDA_CNN_KERNEL_CALL void __syncthreads(CUDA_CNN_SITE) { cuda_cnn::emulation::block_barrier(site); }
CUDA_CNN_KERNEL_CALL void __syncwarp(uint32_t lanes = ~0u, CUDA_CNN_SITE) {
  cuda_cnn::emulation::warp_barrier(lanes, site);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

namespace cuda_cnn::emulation {

template <class T>
CUDA_CNN_KERNEL_CALL T shuffle_value(uint32_t lanes, T value, ShuffleKind kind, int argument, int width,
                                     const Site& site) {
  static_assert(sizeof(T) <= 8);
  ShuffleData data{0, 0, kind, argument, width};
  std::memcpy(&data.value, &value, sizeof(T));
  warp_collective(WarpOp::kShuffle, lanes, &data, shuffle, site);
  std::memcpy(&value, &data.result, sizeof(T));
  return value;
}

inline uint32_t ballot_value(uint32_t lanes, bool predicate, const Site& site) {
  BallotData data{predicate, 0};
  warp_collective(WarpOp::kBallot, lanes, &data, ballot, site);
  return data.result;
}

// Blocks run one after the other and fibers give way only in the engine: a plain update is atomic.
template <class T, class Update>
__attribute__((no_sanitize("thread"), noinline)) T atomic_update(T* target, Update update, const Site& site) {
  memory_access(target, sizeof(T), Access::kAtomic, site);
  const T old = *target;
  *target = update(old);
  return old;
}

}  // namespace cuda_cnn::emulation

#define CUDA_CNN_SHUFFLE(name, kind, argument_type)                                                 \
  template <class T>                                                                                \
  CUDA_CNN_KERNEL_CALL T name(uint32_t lanes, T value, argument_type argument, int width = 32,      \
                              CUDA_CNN_SITE) {                                                      \
    using namespace cuda_cnn::emulation;                                                            \
    return shuffle_value(lanes, value, ShuffleKind::kind, static_cast<int>(argument), width, site); \
  }
CUDA_CNN_SHUFFLE(__shfl_sync, kIndex, int)
CUDA_CNN_SHUFFLE(__shfl_up_sync, kUp, unsigned)
CUDA_CNN_SHUFFLE(__shfl_down_sync, kDown, unsigned)
CUDA_CNN_SHUFFLE(__shfl_xor_sync, kXor, int)
#undef CUDA_CNN_SHUFFLE

inline unsigned __ballot_sync(uint32_t lanes, int predicate, CUDA_CNN_SITE) {
  return cuda_cnn::emulation::ballot_value(lanes, predicate != 0, site);
}
inline int __any_sync(uint32_t lanes, int predicate, CUDA_CNN_SITE) {
  return cuda_cnn::emulation::ballot_value(lanes, predicate != 0, site) != 0;
}
inline int __all_sync(uint32_t lanes, int predicate, CUDA_CNN_SITE) {
  return cuda_cnn::emulation::ballot_value(lanes, predicate != 0, site) == lanes;
}

template <class T>
T atomicAdd(T* target, T value, CUDA_CNN_SITE) {
  return cuda_cnn::emulation::atomic_update(target, [value](T old) { return T(old + value); }, site);
}
template <class T>
T atomicMax(T* target, T value, CUDA_CNN_SITE) {
  return cuda_cnn::emulation::atomic_update(
      target, [value](T old) { return old > value ? old : value; }, site);
}

// ---- maths ----

using std::max;
using std::min;
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
template <class T, class U>
T bit_cast_to(U value) {
  static_assert(sizeof(T) == sizeof(U));
  T result;
  std::memcpy(&result, &value, sizeof(T));
  return result;
}
inline unsigned __float_as_uint(float x) { return bit_cast_to<unsigned>(x); }
inline int __float_as_int(float x) { return bit_cast_to<int>(x); }
inline float __uint_as_float(unsigned x) { return bit_cast_to<float>(x); }
inline float __int_as_float(int x) { return bit_cast_to<float>(x); }
namespace cuda_cnn::emulation {
// As far off as the hardware may be: the result moved by up to `ulps` in the last place, this way or that.
inline float inexact(float exact, int ulps) {
  const uint32_t bits = bit_cast_to<uint32_t>(exact), magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x00800000u || magnitude >= 0x7f000000u) return exact;
  const int moved = static_cast<int>((bits * 2654435761u) >> 16) % (2 * ulps + 1) - ulps;
  return bit_cast_to<float>(bits + static_cast<uint32_t>(moved));
}
}  // namespace cuda_cnn::emulation
inline float rsqrtf(float x) {
  return cuda_cnn::emulation::inexact(static_cast<float>(1. / std::sqrt(static_cast<double>(x))), 2);
}
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline float rsqrt(float x) { return rsqrtf(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __expf(float x) { return std::exp(x); }
inline float exp2f_approx(float x) { return std::exp2(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}

// ---- runtime ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? cuda_cnn::emulation::last_report() : "invalid configuration";
}
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76 };
inline cudaError_t cudaGetDevice(int* device) {
  return *device = cuda_cnn::emulation::current_gpu(), cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 7 : 5;  // older than any code of ours
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
struct cudaFuncAttributes {};
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return static_cast<cudaError_t>(cuda_cnn::emulation::attributes_error());
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute attribute, int value) {
  const bool too_large = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > 227 * 1024;
  return too_large ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (cuda_cnn::emulation::launch_error() != 0) {
    return static_cast<cudaError_t>(cuda_cnn::emulation::launch_error());
  }
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  const cuda_cnn::emulation::Launch launch{config->gridDim,
                                           config->blockDim,
                                           config->dynamicSmemBytes,
                                           [](const void* self) {
                                             std::apply(static_cast<const Call*>(self)->kernel,
                                                        static_cast<const Call*>(self)->parameters);
                                           },
                                           &call,
                                           sizeof(call)};
  return cuda_cnn::emulation::run(launch) ? cudaSuccess : cudaErrorLaunchFailure;
}
