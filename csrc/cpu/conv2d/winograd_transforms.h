// Winograd's F(4,3): four outputs of a three-tap correlation with six multiplications instead of twelve
// (Lavin, Gray 2016). With x(t), w(t) as polynomials their product is fixed by its values at six points; here
// 0, a, -a, b, -b and infinity with a = 3/4, b = 3/2, which round better than 0, 1, -1, 2, -2.
//
//   y = A^T [(G w) * (B^T x)]         6 values of x, 3 of w, 4 of y
//   dw = G^T [(A dy) * (B^T x)]       its weight gradient
//
// Each function is one of these matrices times a column of vectors.
#pragma once

#include "cpu/vec.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

constexpr int kWinogradOut = 4, kWinogradIn = 6, kWinogradTaps = 3;
constexpr int kWinogradPoints = kWinogradIn * kWinogradIn;

namespace winograd {

using V = Vec<float>;

constexpr float a = 0.75f, b = 1.5f;
constexpr float a2 = a * a, b2 = b * b, a3 = a2 * a, b3 = b2 * b;
// The filter's normalisation at 0, at a and at b: one over the product of the distances to the other points.
constexpr float at_0 = 1 / (a2 * b2), at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

CUDA_CNN_INLINE V times(float factor, V x) { return broadcast(factor) * x; }
CUDA_CNN_INLINE V plus_times(V sum, float factor, V x) { return fma(broadcast(factor), x, sum); }

// B^T: six inputs to their values at the points.
CUDA_CNN_INLINE void input(V (&t)[6], const V (&x)[6]) {
  const V even_a = plus_times(x[4], -b2, x[2]), odd_a = plus_times(x[3], -b2, x[1]);
  const V even_b = plus_times(x[4], -a2, x[2]), odd_b = plus_times(x[3], -a2, x[1]);
  t[0] = plus_times(plus_times(x[4], -(a2 + b2), x[2]), a2 * b2, x[0]);
  t[1] = plus_times(even_a, a, odd_a);
  t[2] = plus_times(even_a, -a, odd_a);
  t[3] = plus_times(even_b, b, odd_b);
  t[4] = plus_times(even_b, -b, odd_b);
  t[5] = plus_times(plus_times(x[5], -(a2 + b2), x[3]), a2 * b2, x[1]);
}

// A^T: six products to four outputs.
CUDA_CNN_INLINE void output(V (&y)[4], const V (&m)[6]) {
  const V even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
  y[0] = m[0] + even_a + even_b;
  y[1] = plus_times(times(a, odd_a), b, odd_b);
  y[2] = plus_times(times(a2, even_a), b2, even_b);
  y[3] = plus_times(plus_times(m[5], a3, odd_a), b3, odd_b);
}

// G: three taps to their values at the points.
CUDA_CNN_INLINE void filter(V (&u)[6], const V (&w)[3]) {
  const V even_a = plus_times(times(at_a, w[0]), at_a * a2, w[2]), odd_a = times(at_a * a, w[1]);
  const V even_b = plus_times(times(at_b, w[0]), at_b * b2, w[2]), odd_b = times(at_b * b, w[1]);
  u[0] = times(at_0, w[0]);
  u[1] = even_a + odd_a;
  u[2] = even_a - odd_a;
  u[3] = even_b + odd_b;
  u[4] = even_b - odd_b;
  u[5] = w[2];
}

// A: four output gradients to the points.
CUDA_CNN_INLINE void output_transposed(V (&m)[6], const V (&y)[4]) {
  const V even_a = plus_times(y[0], a2, y[2]), odd_a = plus_times(times(a, y[1]), a3, y[3]);
  const V even_b = plus_times(y[0], b2, y[2]), odd_b = plus_times(times(b, y[1]), b3, y[3]);
  m[0] = y[0];
  m[1] = even_a + odd_a;
  m[2] = even_a - odd_a;
  m[3] = even_b + odd_b;
  m[4] = even_b - odd_b;
  m[5] = y[3];
}

// G^T: six products to three taps.
CUDA_CNN_INLINE void filter_transposed(V (&w)[3], const V (&u)[6]) {
  const V even_a = u[1] + u[2], odd_a = u[1] - u[2], even_b = u[3] + u[4], odd_b = u[3] - u[4];
  w[0] = plus_times(plus_times(times(at_0, u[0]), at_a, even_a), at_b, even_b);
  w[1] = plus_times(times(at_a * a, odd_a), at_b * b, odd_b);
  w[2] = plus_times(plus_times(u[5], at_a * a2, even_a), at_b * b2, even_b);
}

// A square of vectors through one of these matrices on both sides: to = M from M^T.
template <int kTo, int kFrom>
CUDA_CNN_INLINE void both_sides(void (*matrix)(V (&)[kTo], const V (&)[kFrom]), V (&to)[kTo][kTo],
                                const V (&from)[kFrom][kFrom]) {
  V half[kTo][kFrom];
#pragma GCC unroll 6
  for (int j = 0; j < kFrom; ++j) {
    V column[kFrom], result[kTo];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) column[i] = from[i][j];
    matrix(result, column);
#pragma GCC unroll 6
    for (int i = 0; i < kTo; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < kTo; ++i) matrix(to[i], half[i]);
}

}  // namespace winograd
}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
