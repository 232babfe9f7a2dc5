// What the two layouts' max-pooling kernels share.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"
#include "kernels/max_pool2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

void max_pool2d_nchw(const MaxPool2dParams& params);

// Lanes of integers beside Vec<Accumulator<T>>, as its comparisons give them: int32 or int64.
template <class T>
using TapLanes = decltype(Vec<Accumulator<T>>{} > Vec<Accumulator<T>>{});
template <class T>
using TapLane = decltype(+TapLanes<T>{}[0]);

// Lanes to and from memory. g++ makes scalar code of a conversion that changes the size fourfold: where
// vectors are long there are intrinsics.
template <class Lanes, class Tap>
CUDA_CNN_INLINE void read_taps(const Tap* p, Lanes& taps) {
  if constexpr (sizeof(Tap) == sizeof(taps[0])) {
    __builtin_memcpy(&taps, p, sizeof(taps));
  } else {
    for (unsigned i = 0; i < sizeof(taps) / sizeof(taps[0]); ++i) taps[i] = p[i];
  }
}
template <class Lanes, class Tap>
CUDA_CNN_INLINE void write_taps(Tap* p, Lanes taps) {
  if constexpr (sizeof(Tap) == sizeof(taps[0])) {
    __builtin_memcpy(p, &taps, sizeof(taps));
  } else {
    for (unsigned i = 0; i < sizeof(taps) / sizeof(taps[0]); ++i) p[i] = static_cast<Tap>(taps[i]);
  }
}
#if defined(CUDA_CNN_ISA_AVX512)
CUDA_CNN_INLINE void read_taps(const uint8_t* p, TapLanes<float>& taps) {
  taps = reinterpret_cast<TapLanes<float>>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
CUDA_CNN_INLINE void write_taps(uint8_t* p, TapLanes<float> taps) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(taps)));
}
CUDA_CNN_INLINE void read_taps(const uint8_t* p, TapLanes<double>& taps) {
  taps = reinterpret_cast<TapLanes<double>>(
      _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
CUDA_CNN_INLINE void write_taps(uint8_t* p, TapLanes<double> taps) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(reinterpret_cast<__m512i>(taps)));
}
#elif defined(CUDA_CNN_ISA_AVX2)
CUDA_CNN_INLINE void read_taps(const uint8_t* p, TapLanes<float>& taps) {
  taps = reinterpret_cast<TapLanes<float>>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
CUDA_CNN_INLINE void write_taps(uint8_t* p, TapLanes<float> taps) {
  const __m256i lanes = reinterpret_cast<__m256i>(taps);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
}
#endif

template <class T, class Tap>
CUDA_CNN_INLINE TapLanes<T> load_taps(const Tap* p) {
  TapLanes<T> taps;
  read_taps(p, taps);
  return taps;
}
template <class T, class Tap>
CUDA_CNN_INLINE void store_taps(Tap* p, TapLanes<T> taps) {
  write_taps(p, taps);
}

template <class T, class Tap>
CUDA_CNN_INLINE TapLanes<T> load_first_taps(const Tap* p, int64_t count) {
  TapLanes<T> taps = {};
  for (int64_t i = 0; i < count; ++i) taps[i] = p[i];
  return taps;
}
template <class T, class Tap>
CUDA_CNN_INLINE void store_first_taps(Tap* p, TapLanes<T> taps, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<Tap>(taps[i]);
}

// a > b ? a : b, lane by lane, in one instruction where there is one.
CUDA_CNN_INLINE Vec<float> greater(Vec<float> a, Vec<float> b) {
#if defined(CUDA_CNN_ISA_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(CUDA_CNN_ISA_AVX2)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
CUDA_CNN_INLINE Vec<double> greater(Vec<double> a, Vec<double> b) {
#if defined(CUDA_CNN_ISA_AVX512)
  return _mm512_max_pd(a, b);
#elif defined(CUDA_CNN_ISA_AVX2)
  return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// load_first, without the way through memory that short rows feel.
template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_part(const T* p, int64_t count) {
#if defined(CUDA_CNN_ISA_AVX2)
  if constexpr (sizeof(T) == sizeof(float)) {
    static constexpr int32_t kMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
    const void* mask = kMasks + 8 - count;
    return _mm256_maskload_ps(p, _mm256_loadu_si256(static_cast<const __m256i*>(mask)));
  } else
#endif
    return load_first(p, count);
}

template <class A>
CUDA_CNN_INLINE Vec<A> lowest() {
  return broadcast(-A(__builtin_inff()));
}

// One step of the scan: torch's rule for ties and NaN (takes_over), lane by lane. kFinite: nothing is NaN.
template <bool kTrack, bool kFinite, class V, class Taps>
CUDA_CNN_INLINE void take_greater(V value, Taps here, V& best, Taps& tap) {
  const auto takes = kFinite ? value > best : (value > best) | (value != value);
  best = kFinite ? greater(value, best) : takes ? value : best;
  if constexpr (kTrack) tap = takes ? here : tap;
}

// Tasks of one thread: enough work to pay for waking another.
CUDA_CNN_INLINE int64_t grain_of(int64_t elements_per_task) {
  return ceil_div(16384, max64(elements_per_task, 1));
}

// The one dtype and tap-width switch of a launcher: fn(T{}, Tap{}).
template <class Fn>
CUDA_CNN_INLINE void dispatch_pool(const MaxPool2dParams& params, const Fn& fn) {
  dispatch_dtype(params.dtype, [&](auto element) {
    if (params.wide_taps) {
      fn(element, int32_t{});
    } else {
      fn(element, uint8_t{});
    }
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
