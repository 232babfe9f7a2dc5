// Every inline-assembly statement of the CUDA kernels: asynchronous copies, ldmatrix, mma.sync, conversions.
// Fragment layouts are those of the PTX ISA, "Warp-level matrix instructions". g = lane / 4, t = lane % 4:
//   16-bit, m16n8k16   a[0] = A[g][2t..2t+1]   a[1] = A[g+8][2t..]   a[2] = A[g][2t+8..]   a[3] =
//   A[g+8][2t+8..]
//                      b0 = B[2t..2t+1][g]     b1 = B[2t+8..][g]     (lower half of a register: lower index)
//   TF32, m16n8k8      a[0] = A[g][t]          a[1] = A[g+8][t]      a[2] = A[g][t+4]      a[3] = A[g+8][t+4]
//                      b0 = B[t][g]            b1 = B[t+4][g]
//   both               d[0..1] = D[g][2t..2t+1]                      d[2..3] = D[g+8][2t..2t+1]
// A build for the tests' emulator takes the same functions from there.
#pragma once

#if defined(CUDA_CNN_EMULATED)
#include <emulated_ptx.h>
#else

#include <cuda_runtime.h>

#include <cstdint>

namespace cuda_cnn::cuda::ptx {

// The 32-bit address of an object in shared memory, which the functions below take.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Asynchronous copy of kBytes from global to shared memory, both aligned to kBytes; the bytes past
// source_bytes become zero, and with source_bytes == 0 the source is not read, and may lie
// anywhere.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source,
                                           int source_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(kBytes),
                 "r"(source_bytes)
                 : "memory");
  }
}

// Closes a group: all copies that this thread started since the last call.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's newest groups are in flight.
// The data of other threads is visible only after a barrier that follows their wait.
template <int kPending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// kMatrices 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r (16 bytes) of matrix
// i, and receives elements 2t, 2t+1 of row g of matrix i in fragment[i]; kTranspose: elements g of rows 2t,
// 2t+1. All lanes of the warp must call it, each with an address inside shared memory.
template <int kMatrices, bool kTranspose = false>
__device__ __forceinline__ void load_matrix(uint32_t (&fragment)[kMatrices], uint32_t row_address) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  uint32_t* r = fragment;
  if constexpr (kMatrices == 4 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
  } else if constexpr (kMatrices == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row_address)
                 : "memory");
  } else if constexpr (kMatrices == 2 && !kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row_address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(row_address)
                 : "memory");
  } else if constexpr (!kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(row_address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(row_address)
                 : "memory");
  }
}

// D += A · B on tensor cores, accumulated in float32: A 16 x 16, B 16 x 8 (TF32: 16 x 8 and 8 x 8), D 16 x 8.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The operands are float32 bits that round_tf32 has rounded; without it the hardware truncates.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds float32 bits to TF32 (10 fraction bits), to nearest, ties away from zero.
__device__ __forceinline__ uint32_t round_tf32(uint32_t float_bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "r"(float_bits));
  return rounded;
}

// Two float32 rounded to nearest even as one register of two 16-bit elements, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// One binary16 element widened.
__device__ __forceinline__ float unpack_fp16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Square root to one unit in the last place; of 0 and infinity exactly.
__device__ __forceinline__ float sqrt_approx(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}

// Holds the value in a register from here on: what was worked out before a loop is not worked out again
// inside.
__device__ __forceinline__ void keep(int& value) { asm volatile("" : "+r"(value)); }
template <class T>
__device__ __forceinline__ void keep(T*& pointer) {
  asm volatile("" : "+l"(pointer));
}

// Plain accesses by a 32-bit shared address; the address is aligned to the size of T (4, 8 or 16 bytes).
template <class T>
__device__ __forceinline__ T load_shared(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

template <class T>
__device__ __forceinline__ void store_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

}  // namespace cuda_cnn::cuda::ptx

#endif
