// Vectors of one register: 64 bytes with AVX-512, 32 with AVX2, 16 elsewhere (SSE2, NEON).
//
// Vec<float> and Vec<double> are the compiler's vector types, so + - * / < ?: work on them lane by lane; the
// functions here add what the operators lack. Loads and stores need no alignment. bfloat16 and float16 exist
// in memory only: load() widens them to Vec<float>, store() rounds to nearest even.
//
// g++ does not redefine __AVX2__ and its like at a `#pragma GCC target`, so the build says which set this is.
#pragma once

#include "kernels/host_device.h"

#if defined(CUDA_CNN_X86_VARIANTS)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

#if defined(CUDA_CNN_ISA_AVX512)
constexpr int kVectorBytes = 64;
#elif defined(CUDA_CNN_ISA_AVX2)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define CUDA_CNN_INLINE inline __attribute__((always_inline))

// How inline assembly calls a vector register.
#if defined(CUDA_CNN_VECTOR_REGISTER)  // the emulation of AVX-512 has its own word
#elif defined(CUDA_CNN_ISA_AVX512)
#define CUDA_CNN_VECTOR_REGISTER "v"
#elif defined(__x86_64__)
#define CUDA_CNN_VECTOR_REGISTER "x"
#elif defined(__aarch64__)
#define CUDA_CNN_VECTOR_REGISTER "w"
#endif

template <class T, int kBytes = kVectorBytes>
struct VecTypes {
  static constexpr int kLanes = kBytes / sizeof(T);
  typedef T Type __attribute__((vector_size(kBytes)));
  typedef T Unaligned __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};
template <class T>
using Vec = typename VecTypes<T>::Type;
// Lanes of the register that computes for T: as many for bfloat16 and float16 as for float.
template <class T>
constexpr int kLanes = VecTypes<Accumulator<T>>::kLanes;

template <class T>
CUDA_CNN_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};
}

CUDA_CNN_INLINE Vec<float> load(const float* p) {
  return *reinterpret_cast<const VecTypes<float>::Unaligned*>(p);
}
CUDA_CNN_INLINE Vec<double> load(const double* p) {
  return *reinterpret_cast<const VecTypes<double>::Unaligned*>(p);
}
CUDA_CNN_INLINE void store(float* p, Vec<float> v) { *reinterpret_cast<VecTypes<float>::Unaligned*>(p) = v; }
CUDA_CNN_INLINE void store(double* p, Vec<double> v) {
  *reinterpret_cast<VecTypes<double>::Unaligned*>(p) = v;
}

// A store to an aligned address past the caches, where the processor has one; another thread may read it
// after end_of_stream().
CUDA_CNN_INLINE void stream(float* p, Vec<float> v) {
#if defined(CUDA_CNN_ISA_AVX512)
  _mm512_stream_ps(p, v);
#elif defined(CUDA_CNN_ISA_AVX2)
  _mm256_stream_ps(p, v);
#elif defined(CUDA_CNN_X86_VARIANTS)
  _mm_stream_ps(p, v);
#else
  store(p, v);
#endif
}
CUDA_CNN_INLINE void end_of_stream() {
#if defined(CUDA_CNN_X86_VARIANTS)
  _mm_sfence();
#endif
}

typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));
typedef uint16_t HalfWordsUnaligned __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

CUDA_CNN_INLINE HalfWords load_half_words(const void* p) {
  return *static_cast<const HalfWordsUnaligned*>(p);
}
CUDA_CNN_INLINE void store_half_words(void* p, HalfWords v) { *static_cast<HalfWordsUnaligned*>(p) = v; }

// Each half word as a word, and back: a word's upper half is 0. Intrinsics, as g++ converts in pieces,
// through memory.
#if defined(CUDA_CNN_ISA_AVX512) && !defined(CUDA_CNN_EMULATE_AVX512)
CUDA_CNN_INLINE Words widen_words(HalfWords v) {
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
}
CUDA_CNN_INLINE HalfWords narrow_words(Words v) {
  return reinterpret_cast<HalfWords>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
}
#elif defined(CUDA_CNN_ISA_AVX2)
CUDA_CNN_INLINE Words widen_words(HalfWords v) {
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
}
CUDA_CNN_INLINE HalfWords narrow_words(Words v) {
  const __m256i words = reinterpret_cast<__m256i>(v);
  return reinterpret_cast<HalfWords>(
      _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
#else
CUDA_CNN_INLINE Words widen_words(HalfWords v) { return __builtin_convertvector(v, Words); }
CUDA_CNN_INLINE HalfWords narrow_words(Words v) { return __builtin_convertvector(v, HalfWords); }
#endif

CUDA_CNN_INLINE Vec<float> load(const BFloat16* p) {
  return reinterpret_cast<Vec<float>>(widen_words(load_half_words(p)) << 16);
}
CUDA_CNN_INLINE void store(BFloat16* p, Vec<float> v) {
  const Words bits = reinterpret_cast<Words>(v);
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words quiet = (bits >> 16) | 0x40u;
  const Words result = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  store_half_words(p, narrow_words(result));
}

#if defined(CUDA_CNN_ISA_AVX512)
CUDA_CNN_INLINE Vec<float> load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
CUDA_CNN_INLINE void store(Half* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(CUDA_CNN_ISA_AVX2)
CUDA_CNN_INLINE Vec<float> load(const Half* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
CUDA_CNN_INLINE void store(Half* p, Vec<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
CUDA_CNN_INLINE Vec<float> load(const Half* p) {
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_float(p[i]);
  return v;
}
CUDA_CNN_INLINE void store(Half* p, Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) p[i] = to_half(v[i]);
}
#endif

// The first `count` lanes (0 < count < kLanes); the others are 0, and their memory is not touched.
template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_first(const T* p, int64_t count) {
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
CUDA_CNN_INLINE void store_first(T* p, Vec<Accumulator<T>> v, int64_t count) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];
}
#if defined(CUDA_CNN_ISA_AVX512)
template <>
CUDA_CNN_INLINE Vec<float> load_first<float>(const float* p, int64_t count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
template <>
CUDA_CNN_INLINE void store_first<float>(float* p, Vec<float> v, int64_t count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), v);
}
#if !defined(CUDA_CNN_EMULATE_AVX512)
template <>
CUDA_CNN_INLINE Vec<float> load_first<Half>(const Half* p, int64_t count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), p));
}
template <>
CUDA_CNN_INLINE void store_first<Half>(Half* p, Vec<float> v, int64_t count) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << count) - 1),
                           _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#endif
#elif defined(CUDA_CNN_ISA_AVX2)
template <>
CUDA_CNN_INLINE Vec<float> load_first<float>(const float* p, int64_t count) {
  static constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_maskload_ps(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - count)));
}
// In halves: AMD's masked store takes longer than these three.
template <>
CUDA_CNN_INLINE void store_first<float>(float* p, Vec<float> v, int64_t count) {
  __m128 half = _mm256_castps256_ps128(v);
  if (count & 4) {
    _mm_storeu_ps(p, half);
    half = _mm256_extractf128_ps(v, 1);
    p += 4;
  }
  if (count & 2) {
    _mm_storel_pi(reinterpret_cast<__m64*>(p), half);
    half = _mm_movehl_ps(half, half);
    p += 2;
  }
  if (count & 1) _mm_store_ss(p, half);
}
#endif

// a * b + c, rounded once where the instruction set has it.
#if defined(CUDA_CNN_ISA_AVX512)
CUDA_CNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
CUDA_CNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm512_fmadd_pd(a, b, c);
}
CUDA_CNN_INLINE Vec<float> sqrt(Vec<float> v) { return _mm512_sqrt_ps(v); }
CUDA_CNN_INLINE Vec<double> sqrt(Vec<double> v) { return _mm512_sqrt_pd(v); }
#elif defined(CUDA_CNN_ISA_AVX2)
CUDA_CNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
CUDA_CNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return _mm256_fmadd_pd(a, b, c);
}
CUDA_CNN_INLINE Vec<float> sqrt(Vec<float> v) { return _mm256_sqrt_ps(v); }
CUDA_CNN_INLINE Vec<double> sqrt(Vec<double> v) { return _mm256_sqrt_pd(v); }
#else
#if defined(__ARM_NEON)
CUDA_CNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return vfmaq_f32(c, a, b); }
CUDA_CNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return vfmaq_f64(c, a, b); }
#else
CUDA_CNN_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
CUDA_CNN_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
#endif
CUDA_CNN_INLINE Vec<float> sqrt(Vec<float> v) {
  for (int i = 0; i < kLanes<float>; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
}
CUDA_CNN_INLINE Vec<double> sqrt(Vec<double> v) {
  for (int i = 0; i < kLanes<double>; ++i) v[i] = __builtin_sqrt(v[i]);
  return v;
}
#endif

// max(v, 0); a NaN stays a NaN, as torch.relu has it.
template <class V>
CUDA_CNN_INLINE V relu(V v) {
  return v < 0 ? V{} : v;
}

// The lanes' sum, half onto half: in an order that is the same every time, and a short chain.
template <class T, int kBytes>
CUDA_CNN_INLINE T sum_halves(typename VecTypes<T, kBytes>::Type v) {
  if constexpr (kBytes == 2 * sizeof(T)) {
    return v[0] + v[1];
  } else {
    typename VecTypes<T, kBytes / 2>::Type halves[2];
    memcpy(halves, &v, kBytes);
    return sum_halves<T, kBytes / 2>(halves[0] + halves[1]);
  }
}
CUDA_CNN_INLINE float sum(Vec<float> v) { return sum_halves<float, kVectorBytes>(v); }
CUDA_CNN_INLINE double sum(Vec<double> v) { return sum_halves<double, kVectorBytes>(v); }

// Hides a pointer from the optimiser: in a long unrolled loop g++ would otherwise keep every address in a
// register of its own, and spill the accumulators.
template <class T>
CUDA_CNN_INLINE void opaque(T*& p) {
  asm volatile("" : "+r"(p));
}

// The same for a vector: it is loaded here, once, and no instruction reads it from memory again.
template <class V>
CUDA_CNN_INLINE void pin(V& v) {
#if defined(CUDA_CNN_VECTOR_REGISTER)
  asm volatile("" : "+" CUDA_CNN_VECTOR_REGISTER(v));
#endif
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
