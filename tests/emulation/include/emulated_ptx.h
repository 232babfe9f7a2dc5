// The functions of csrc/cuda/ptx.cuh for the emulator, written from the PTX ISA.
#pragma once

#include <cuda_runtime.h>

#include "kernels/host_device.h"

namespace cuda_cnn::cuda::ptx {

using emulation::MmaType;

inline uint32_t shared_address(const void* pointer) { return emulation::shared_address(pointer); }

template <int kBytes>
CUDA_CNN_KERNEL_CALL void copy_async(uint32_t destination, const void* source, int source_bytes = kBytes,
                                     CUDA_CNN_SITE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::copy_async(destination, source, kBytes, source_bytes, site);
}

inline void copy_commit() { emulation::copy_commit(); }

template <int kPending>
void copy_wait() {
  emulation::copy_wait(kPending);
}

template <int kMatrices, bool kTranspose = false>
CUDA_CNN_KERNEL_CALL void load_matrix(uint32_t (&fragment)[kMatrices], uint32_t row_address, CUDA_CNN_SITE) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  emulation::LoadMatrixData data{row_address, kMatrices, kTranspose, fragment};
  emulation::warp_collective(emulation::WarpOp::kLoadMatrix, ~0u, &data, emulation::load_matrix, site);
}

namespace detail {
CUDA_CNN_KERNEL_CALL void mma(MmaType type, float* d, const uint32_t* a, uint32_t b0, uint32_t b1,
                              const emulation::Site& site) {
  emulation::MmaData data{d, a, {b0, b1}, type};
  emulation::warp_collective(emulation::WarpOp::kMma, ~0u, &data, emulation::mma, site);
}
}  // namespace detail

CUDA_CNN_KERNEL_CALL void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   CUDA_CNN_SITE) {
  detail::mma(MmaType::kBFloat16, d, a, b0, b1, site);
}
CUDA_CNN_KERNEL_CALL void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   CUDA_CNN_SITE) {
  detail::mma(MmaType::kFloat16, d, a, b0, b1, site);
}
CUDA_CNN_KERNEL_CALL void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                   CUDA_CNN_SITE) {
  detail::mma(MmaType::kTf32, d, a, b0, b1, site);
}

inline uint32_t round_tf32(uint32_t float_bits) {
  const uint32_t magnitude = float_bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fffffffu;  // the one NaN that the instruction gives
  return magnitude == 0x7f800000u ? float_bits : (float_bits + 0x1000u) & 0xffffe000u;
}

// Every NaN becomes the one that the conversion gives.
inline uint32_t pack_bf16(float low, float high) {
  const auto convert = [](float x) { return x != x ? 0x7fffu : uint32_t{to_bfloat16(x).bits}; };
  return convert(low) | convert(high) << 16;
}
inline uint32_t pack_fp16(float low, float high) {
  const auto convert = [](float x) { return x != x ? 0x7fffu : uint32_t{to_half(x).bits}; };
  return convert(low) | convert(high) << 16;
}
inline float unpack_fp16(uint16_t bits) { return to_float(Half{bits}); }

inline float sqrt_approx(float x) { return emulation::inexact(std::sqrt(x), 1); }

template <class T>
void keep(T&) {}

// Not seen by the instrumentation, because they report the access themselves.
template <class T>
__attribute__((no_sanitize("thread"), noinline)) T load_shared(uint32_t address, CUDA_CNN_SITE) {
  const void* pointer = emulation::shared_pointer(address, sizeof(T), site);
  emulation::memory_access(pointer, sizeof(T), emulation::Access::kRead, site);
  return *static_cast<const T*>(pointer);
}

template <class T>
__attribute__((no_sanitize("thread"), noinline)) void store_shared(uint32_t address, T value, CUDA_CNN_SITE) {
  void* pointer = emulation::shared_pointer(address, sizeof(T), site);
  emulation::memory_access(pointer, sizeof(T), emulation::Access::kWrite, site);
  *static_cast<T*>(pointer) = value;
}

}  // namespace cuda_cnn::cuda::ptx
