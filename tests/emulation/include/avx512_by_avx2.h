// The AVX-512 intrinsics that csrc/cpu uses, by AVX2's, so that its units also run on a processor without
// AVX-512 (CUDA_CNN_EMULATE_AVX512=1 puts this ahead of each). Vectors of 64 bytes are then two registers;
// the compiler sees to the rest. An intrinsic that is not here does not compile: add it.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#define CUDA_CNN_VECTOR_REGISTER "m"

namespace emulated_avx512 {

typedef float Floats __attribute__((vector_size(64)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int Ints __attribute__((vector_size(64)));
typedef unsigned UnsignedInts __attribute__((vector_size(64)));
typedef long long Longs __attribute__((vector_size(64)));

#define EMULATED inline __attribute__((always_inline))

template <class Half, class Vector>
EMULATED Half half(const Vector& v, int which) {
  Half h;
  __builtin_memcpy(&h, reinterpret_cast<const char*>(&v) + 32 * which, 32);
  return h;
}
template <class Vector, class Half>
EMULATED Vector join(Half low, Half high) {
  Vector v;
  __builtin_memcpy(&v, &low, 32);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + 32, &high, 32);
  return v;
}
template <class To, class From>
EMULATED To bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "only the type changes");
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

EMULATED Floats fmadd(Floats a, Floats b, Floats c) {
  auto part = [&](int i) __attribute__((always_inline)) {
    return _mm256_fmadd_ps(half<__m256>(a, i), half<__m256>(b, i), half<__m256>(c, i));
  };
  return join<Floats>(part(0), part(1));
}
EMULATED Doubles fmadd(Doubles a, Doubles b, Doubles c) {
  auto part = [&](int i) __attribute__((always_inline)) {
    return _mm256_fmadd_pd(half<__m256d>(a, i), half<__m256d>(b, i), half<__m256d>(c, i));
  };
  return join<Doubles>(part(0), part(1));
}
EMULATED Floats sqrt(Floats v) {
  return join<Floats>(_mm256_sqrt_ps(half<__m256>(v, 0)), _mm256_sqrt_ps(half<__m256>(v, 1)));
}
EMULATED Doubles sqrt(Doubles v) {
  return join<Doubles>(_mm256_sqrt_pd(half<__m256d>(v, 0)), _mm256_sqrt_pd(half<__m256d>(v, 1)));
}
template <class Vector>
EMULATED Vector max(Vector a, Vector b) {
  return a > b ? a : b;
}
EMULATED Floats from_half(__m256i h) {
  return join<Floats>(_mm256_cvtph_ps(_mm256_castsi256_si128(h)),
                      _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)));
}
EMULATED __m256i to_half(Floats v) {
  return _mm256_set_m128i(_mm256_cvtps_ph(half<__m256>(v, 1), _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(half<__m256>(v, 0), _MM_FROUND_TO_NEAREST_INT));
}
EMULATED Floats load_lanes(uint16_t mask, const float* p) {
  Floats v = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) v[i] = p[i];
  }
  return v;
}
EMULATED void store_lanes(float* p, uint16_t mask, Floats v) {
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) p[i] = v[i];
  }
}
EMULATED void stream(float* p, Floats v) {
  _mm256_stream_ps(p, half<__m256>(v, 0));
  _mm256_stream_ps(p + 8, half<__m256>(v, 1));
}
template <class Lanes>
EMULATED Lanes widen(__m128i bytes) {
  typedef unsigned char Bytes __attribute__((vector_size(16)));
  const Bytes source = bits<Bytes>(bytes);
  Lanes lanes;
  for (unsigned i = 0; i < sizeof(lanes) / sizeof(lanes[0]); ++i) lanes[i] = source[i];
  return lanes;
}
template <class Lanes>
EMULATED __m128i narrow(Longs v) {
  typedef unsigned char Bytes __attribute__((vector_size(16)));
  const Lanes lanes = bits<Lanes>(v);
  Bytes result = {};
  for (unsigned i = 0; i < sizeof(lanes) / sizeof(lanes[0]); ++i) {
    result[i] = static_cast<unsigned char>(lanes[i]);
  }
  return bits<__m128i>(result);
}

// Two products of bfloat16 for each float, the odd one first.
EMULATED Floats add_pairs(Floats sum, UnsignedInts a, UnsignedInts b) {
  const UnsignedInts high = UnsignedInts{} + 0xffff0000u;
  sum = fmadd(bits<Floats>(a & high), bits<Floats>(b & high), sum);
  return fmadd(bits<Floats>(a << 16), bits<Floats>(b << 16), sum);
}

#undef EMULATED

}  // namespace emulated_avx512

#define __m512i emulated_avx512::Longs
#define _mm512_dpbf16_ps emulated_avx512::add_pairs
#define _mm512_cvtepi32_epi8 emulated_avx512::narrow<emulated_avx512::Ints>
#define _mm512_cvtepi64_epi8 emulated_avx512::narrow<emulated_avx512::Longs>
#define _mm512_cvtepu8_epi32 emulated_avx512::widen<emulated_avx512::Ints>
#define _mm512_cvtepu8_epi64 emulated_avx512::widen<emulated_avx512::Longs>
#define _mm512_cvtph_ps emulated_avx512::from_half
#define _mm512_cvtps_ph(v, rounding) emulated_avx512::to_half(v)
#define _mm512_fmadd_pd emulated_avx512::fmadd
#define _mm512_fmadd_ps emulated_avx512::fmadd
#define _mm512_mask_storeu_ps emulated_avx512::store_lanes
#define _mm512_maskz_loadu_ps emulated_avx512::load_lanes
#define _mm512_max_pd emulated_avx512::max
#define _mm512_max_ps emulated_avx512::max
#define _mm512_sqrt_pd emulated_avx512::sqrt
#define _mm512_sqrt_ps emulated_avx512::sqrt
#define _mm512_stream_ps emulated_avx512::stream
