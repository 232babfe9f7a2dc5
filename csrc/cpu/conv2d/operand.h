// What a register tile multiplies: floats or doubles, or bfloat16 in pairs. AVX512-BF16 adds two products of
// neighbours in depth to each float of a register, in the time of one of float32.
#pragma once

#include "cpu/vec.h"

namespace cuda_cnn {

struct Bf16Pair {
  BFloat16 even, odd;  // neighbours in depth
};
template <>
struct AccumulatorOf<Bf16Pair> {
  using type = float;
};

}  // namespace cuda_cnn

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Operand E in memory: its elements, and how many of a matrix's depth one E holds.
template <class E>
struct OperandOf {
  using Element = E;
  static constexpr int64_t kDepth = 1;
};
template <>
struct OperandOf<Bf16Pair> {
  using Element = BFloat16;
  static constexpr int64_t kDepth = 2;
};
template <class E>
using Element = typename OperandOf<E>::Element;
template <class E>
constexpr int64_t kDepthOf = OperandOf<E>::kDepth;
// E of a depth, the last one filled up with 0.
template <class E>
CUDA_CNN_INLINE int64_t operands(int64_t depth) {
  return ceil_div(depth, kDepthOf<E>);
}

template <class E>
CUDA_CNN_INLINE Vec<E> broadcast_from(const E* p) {
  return broadcast(*p);
}

#if defined(CUDA_CNN_ISA_AVX512)
#define CUDA_CNN_HAS_PAIRS 1

template <class T>
inline constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;

template <>
struct VecTypes<Bf16Pair> {
  using Type = Words;
};

// At any address at which a BFloat16 may lie.
typedef uint32_t WordsUnaligned
    __attribute__((vector_size(kVectorBytes), aligned(alignof(Bf16Pair)), may_alias));

CUDA_CNN_INLINE Words load(const Bf16Pair* p) { return *reinterpret_cast<const WordsUnaligned*>(p); }
CUDA_CNN_INLINE void store(Bf16Pair* p, Words v) { *reinterpret_cast<WordsUnaligned*>(p) = v; }
template <>
CUDA_CNN_INLINE Words broadcast_from<Bf16Pair>(const Bf16Pair* p) {
  uint32_t bits;
  __builtin_memcpy(&bits, p, sizeof(bits));
  return bits - Words{};
}

// sum + a.even * b.even + a.odd * b.odd. By its name, not as an intrinsic: for that the whole file would have
// to be compiled for processors that have it.
CUDA_CNN_INLINE Vec<float> fma(Words a, Words b, Vec<float> sum) {
#if defined(CUDA_CNN_EMULATE_AVX512)
  return _mm512_dpbf16_ps(sum, a, b);
#else
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
#endif
}

// Rounded to nearest even.
CUDA_CNN_INLINE HalfWords narrow(Vec<float> v) {
  HalfWords narrowed;
#if defined(CUDA_CNN_EMULATE_AVX512)
  store(reinterpret_cast<BFloat16*>(&narrowed), v);
#else
  asm("vcvtneps2bf16 %1, %0" : "=v"(narrowed) : "v"(v));
#endif
  return narrowed;
}

// The halves of pairs, widened.
CUDA_CNN_INLINE Vec<float> even(Words pairs) { return reinterpret_cast<Vec<float>>(pairs << 16); }
CUDA_CNN_INLINE Vec<float> odd(Words pairs) { return reinterpret_cast<Vec<float>>(pairs & 0xffff0000u); }

// Pairs of two rows' neighbours: a lane of `even` and the same lane of `odd`.
CUDA_CNN_INLINE Words zip(HalfWords even, HalfWords odd) {
  return widen_words(even) | widen_words(odd) << 16;
}
// The same of floats, rounded.
CUDA_CNN_INLINE Words zip(Vec<float> even, Vec<float> odd) {
#if defined(CUDA_CNN_EMULATE_AVX512) || defined(__clang__)
  return zip(narrow(even), narrow(odd));
#else
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  Halves halves, turns;
  for (int i = 0; i < 32; ++i) turns[i] = i / 2 + i % 2 * 16;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(even), "v"(odd));
  return reinterpret_cast<Words>(__builtin_shuffle(halves, turns));
#endif
}
// The same of two rows of twice as many, to `pairs` and the vector behind.
CUDA_CNN_INLINE void zip_rows(const BFloat16* even, const BFloat16* odd, Bf16Pair* pairs) {
#if defined(CUDA_CNN_EMULATE_AVX512) || defined(__clang__)
  constexpr int kHalf = kVectorBytes / 4;
  store(pairs, zip(load_half_words(even), load_half_words(odd)));
  store(pairs + kHalf, zip(load_half_words(even + kHalf), load_half_words(odd + kHalf)));
#else
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  const Halves a = reinterpret_cast<Halves>(load(reinterpret_cast<const Bf16Pair*>(even)));
  const Halves b = reinterpret_cast<Halves>(load(reinterpret_cast<const Bf16Pair*>(odd)));
  Halves first, last;
  for (int i = 0; i < 32; ++i) first[i] = i / 2 + i % 2 * 32, last[i] = first[i] + 16;
  store(pairs, reinterpret_cast<Words>(__builtin_shuffle(a, b, first)));
  store(pairs + 16, reinterpret_cast<Words>(__builtin_shuffle(a, b, last)));
#endif
}
#endif

// body(E{}): the operands that products of T have, pairs if that is possible and `pairs`.
template <class T, class Body>
void with_operand([[maybe_unused]] bool pairs, const Body& body) {
#if defined(CUDA_CNN_HAS_PAIRS)
  if constexpr (kIsBFloat16<T>) {
    if (pairs) return body(Bf16Pair{});
  }
#endif
  body(Accumulator<T>{});
}

// A vector of a product's results: of pairs by their own instruction, which takes subnormals for 0.
template <class E, class T>
CUDA_CNN_INLINE void store_result(T* to, Vec<Accumulator<T>> v) {
#if defined(CUDA_CNN_HAS_PAIRS)
  if constexpr (kDepthOf<E> == 2) return store_half_words(to, narrow(v));
#endif
  store(to, v);
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
