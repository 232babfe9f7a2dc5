// A square of vectors, transposed in registers.
#pragma once

#include "cpu/vec.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

template <class Acc>
struct LaneIndexOf {
  using type = int32_t;
};
template <>
struct LaneIndexOf<double> {
  using type = int64_t;
};

// Lanes of (a, b) for one step of the transposition: blocks of kWidth lanes, taken in turn from a and b.
template <class Acc, int kWidth, bool kUpper>
CUDA_CNN_INLINE Vec<Acc> interleave(Vec<Acc> a, Vec<Acc> b) {
  constexpr int kCount = kLanes<Acc>;
#if defined(__clang__)  // has no __builtin_shuffle, and finds the shuffle in this by itself
  Vec<Acc> out = {};
  for (int i = 0; i < kCount; ++i) {
    const int lane = i - i / kWidth % 2 * kWidth + (kUpper ? kWidth : 0);
    out[i] = i / kWidth % 2 ? b[lane] : a[lane];
  }
  return out;
#else
  typedef typename LaneIndexOf<Acc>::type Index __attribute__((vector_size(kVectorBytes)));
  Index index = {};
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    const int from_b = i / kWidth % 2;
    index[i] = (i - from_b * kWidth + (kUpper ? kWidth : 0)) + from_b * kCount;
  }
  return __builtin_shuffle(a, b, index);
#endif
}

// Swaps the off-diagonal blocks of width kWidth in each square of width 2*kWidth, then the larger ones.
template <class Acc, int kWidth = 1>
CUDA_CNN_INLINE void transpose(Vec<Acc> (&rows)[kLanes<Acc>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<Acc>; ++i) {
    if (i / kWidth % 2) continue;
    const Vec<Acc> a = rows[i], b = rows[i + kWidth];
    rows[i] = interleave<Acc, kWidth, false>(a, b);
    rows[i + kWidth] = interleave<Acc, kWidth, true>(a, b);
  }
  if constexpr (kWidth * 2 < kLanes<Acc>) transpose<Acc, kWidth * 2>(rows);
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
