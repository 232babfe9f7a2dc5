// Global memory in packs of up to 16 bytes, widened to float (double stays double) and narrowed back.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "kernels/host_device.h"

namespace cuda_cnn::cuda {

template <class T>
constexpr int kPackSize = 16 / sizeof(T);

// Whether packs of kBytes may be used at this address and with this distance between rows.
template <int kBytes = 16>
inline bool is_aligned(const void* pointer, int64_t row_bytes = 0) {
  return reinterpret_cast<uintptr_t>(pointer) % kBytes == 0 && row_bytes % kBytes == 0;
}

// kCount elements in registers: 1, or as many as fill 4, 8 or 16 bytes (two accesses for wider packs).
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  T elements[kCount];
};

template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, kCount>*>(source);
}

template <class T, int kCount>
__device__ __forceinline__ void store_pack(T* destination, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(destination) = pack;
}

// widen and narrow of host_device.h in the instructions the device has for them.
__device__ __forceinline__ float widen_fast(Half value) { return ptx::unpack_fp16(value.bits); }
template <class T>
__device__ __forceinline__ Accumulator<T> widen_fast(T value) {
  return widen(value);
}

template <class T>
__device__ __forceinline__ T narrow_fast(Accumulator<T> value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 narrow_fast<BFloat16>(float value) {
  return {static_cast<uint16_t>(ptx::pack_bf16(value, 0.f))};
}
template <>
__device__ __forceinline__ Half narrow_fast<Half>(float value) {
  return {static_cast<uint16_t>(ptx::pack_fp16(value, 0.f))};
}

// Two neighbours of a 16-bit type in one register, `low` first in memory.
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t narrow_pair<BFloat16>(float low, float high) {
  return ptx::pack_bf16(low, high);
}
template <>
__device__ __forceinline__ uint32_t narrow_pair<Half>(float low, float high) {
  return ptx::pack_fp16(low, high);
}

// values[i] = source[i]
template <int kCount, class T>
__device__ __forceinline__ void load_widened(Accumulator<T> (&values)[kCount], const T* source) {
  const Pack<T, kCount> pack = load_pack<kCount>(source);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = widen_fast(pack.elements[i]);
}

// destination[i] = values[i]
template <int kCount, class T>
__device__ __forceinline__ void store_narrowed(T* destination, const Accumulator<T> (&values)[kCount]) {
  if constexpr (sizeof(T) == 2 && kCount % 2 == 0) {
    Pack<uint32_t, kCount / 2> pack;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) pack.elements[i] = narrow_pair<T>(values[2 * i], values[2 * i + 1]);
    store_pack(reinterpret_cast<uint32_t*>(destination), pack);
  } else {
    Pack<T, kCount> pack;
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.elements[i] = narrow_fast<T>(values[i]);
    store_pack(destination, pack);
  }
}

}  // namespace cuda_cnn::cuda
