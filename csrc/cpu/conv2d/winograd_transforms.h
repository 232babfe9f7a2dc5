// Winograd's F(4,3), F(3,4), F(2,5) and F(2,3): four outputs of a three-tap correlation, three of a four-tap
// or two of a five-tap one, with six multiplications instead of twelve or ten (Lavin, Gray 2016). With x(t),
// w(t) as polynomials their product is fixed by its values at six points; here 0, a, -a, b, -b and infinity
// with a = 3/4, b = 3/2, which round better than 0, 1, -1, 2, -2. F(2,3) has four points, 0, 1, -1 and
// infinity: four multiplications instead of six, and factors of 1 and 1/2 alone, which is what bfloat16's
// roundings bear.
//
//   y = A^T [(G w) * (B^T x)]         6 values of x, 3 (4, 5) of w, 4 (3, 2) of y
//   dw = G^T [(A dy) * (B^T x)]       its weight gradient
//
// Each function is one of these matrices times a column of vectors. B is the same for both, and so is the
// normalisation, which G holds.
#pragma once

#include "cpu/conv2d/operand.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Of products of operands E: inputs of a tile along one axis, which are as many as the points; of both axes;
// and outputs.
template <class E>
inline constexpr int kWinogradIn = 6;
template <>
inline constexpr int kWinogradIn<Bf16Pair> = 4;
template <class E>
constexpr int kWinogradPoints = kWinogradIn<E> * kWinogradIn<E>;
// Filters are in pieces of 3 taps, 2 apart, along each axis; a tap that two of them meet is the first one's,
// and 0 in the other. In float32 they are whole.
template <class E>
constexpr int64_t winograd_pieces(int64_t) {
  return 1;
}
template <>
constexpr int64_t winograd_pieces<Bf16Pair>(int64_t taps) {
  return taps / 2;
}
template <class E>
constexpr int winograd_out(int taps) {
  return kWinogradIn<E> == 4 ? 2 : kWinogradIn<E> + 1 - taps;
}

namespace winograd {

using V = Vec<float>;

constexpr float a = 0.75f, b = 1.5f;
constexpr float a2 = a * a, b2 = b * b;
constexpr float a_to[] = {1, a, a2, a2 * a, a2 * a2}, b_to[] = {1, b, b2, b2 * b, b2 * b2};
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

CUDA_CNN_INLINE void butterfly(V& sum, V& difference, V x, V y) {
  sum = x + y;
  difference = x - y;
}

// A^T: six products to the outputs.
template <int kOut>
CUDA_CNN_INLINE void output(V (&y)[kOut], const V (&m)[6]) {
  V of_a[2], of_b[2];
  butterfly(of_a[0], of_a[1], m[1], m[2]);
  butterfly(of_b[0], of_b[1], m[3], m[4]);
#pragma GCC unroll 4
  for (int i = 0; i < kOut; ++i) {
    const V product = i == 0          ? m[0] + of_a[0]
                      : i == kOut - 1 ? plus_times(m[5], a_to[i], of_a[i % 2])
                                      : times(a_to[i], of_a[i % 2]);
    y[i] = plus_times(product, b_to[i], of_b[i % 2]);
  }
}

// The sums over the even and the odd of the `kCount` powers of a point x: factor * x^i * v[i].
template <int kCount>
CUDA_CNN_INLINE void powers(V (&parts)[2], float factor, const float (&x_to)[5], const V (&v)[kCount]) {
  parts[0] = times(factor, v[0]);
  parts[1] = times(factor * x_to[1], v[1]);
#pragma GCC unroll 3
  for (int i = 2; i < kCount; ++i) parts[i % 2] = plus_times(parts[i % 2], factor * x_to[i], v[i]);
}

// The values of a polynomial at the points; at 0, a and b times a factor.
template <int kCount>
CUDA_CNN_INLINE void evaluate(V (&u)[6], float factor_0, float factor_a, float factor_b,
                              const V (&v)[kCount]) {
  V of_a[2], of_b[2];
  powers(of_a, factor_a, a_to, v);
  powers(of_b, factor_b, b_to, v);
  u[0] = times(factor_0, v[0]);
  butterfly(u[1], u[2], of_a[0], of_a[1]);
  butterfly(u[3], u[4], of_b[0], of_b[1]);
  u[5] = v[kCount - 1];
}

// G: the taps to their values at the points.
template <int kTaps>
CUDA_CNN_INLINE void filter(V (&u)[6], const V (&w)[kTaps]) {
  evaluate(u, at_0, at_a, at_b, w);
}

// A: output gradients to the points.
template <int kOut>
CUDA_CNN_INLINE void output_transposed(V (&m)[6], const V (&y)[kOut]) {
  evaluate(m, 1, 1, 1, y);
}

// G^T: six products to the taps.
template <int kTaps>
CUDA_CNN_INLINE void filter_transposed(V (&w)[kTaps], const V (&u)[6]) {
  V of_a[2], of_b[2];
  butterfly(of_a[0], of_a[1], u[1], u[2]);
  butterfly(of_b[0], of_b[1], u[3], u[4]);
#pragma GCC unroll 5
  for (int i = 0; i < kTaps; ++i) {
    w[i] = plus_times(times(at_a * a_to[i], of_a[i % 2]), at_b * b_to[i], of_b[i % 2]);
  }
  w[0] = plus_times(w[0], at_0, u[0]);
  w[kTaps - 1] += u[5];
}

// The same for the four points of F(2,3).
CUDA_CNN_INLINE void input(V (&t)[4], const V (&x)[4]) {
  t[0] = x[0] - x[2];
  butterfly(t[1], t[2], x[2], x[1]);
  t[3] = x[3] - x[1];
}
template <int kOut>
CUDA_CNN_INLINE void output(V (&y)[kOut], const V (&m)[4]) {
  butterfly(y[0], y[1], m[1], m[2]);
  y[0] += m[0];
  y[1] += m[3];
}
template <int kTaps>
CUDA_CNN_INLINE void filter(V (&u)[4], const V (&w)[kTaps]) {
  u[0] = w[0];
  butterfly(u[1], u[2], times(0.5f, w[0] + w[2]), times(0.5f, w[1]));
  u[3] = w[2];
}
template <int kOut>
CUDA_CNN_INLINE void output_transposed(V (&m)[4], const V (&y)[kOut]) {
  m[0] = y[0];
  butterfly(m[1], m[2], y[0], y[1]);
  m[3] = y[1];
}
template <int kTaps>
CUDA_CNN_INLINE void filter_transposed(V (&w)[kTaps], const V (&u)[4]) {
  V sum, difference;
  butterfly(sum, difference, times(0.5f, u[1]), times(0.5f, u[2]));
  w[0] = u[0] + sum;
  w[1] = difference;
  w[2] = sum + u[3];
}

// A square of vectors through one of these matrices on both sides: M from M^T, with from(i, j) and
// to(i, j, value). 16 registers hold a column or a row of it, one at a time; of 32 several overlap.
constexpr int kColumnsAtOnce = kLanes<float> == 16 ? 6 : 1;
template <int kTo, int kFrom, class From, class To>
CUDA_CNN_INLINE void transform_square(void (*matrix)(V (&)[kTo], const V (&)[kFrom]), const From& from,
                                      const To& to) {
  V half[kTo][kFrom];
#pragma GCC unroll kColumnsAtOnce
  for (int j = 0; j < kFrom; ++j) {
    V column[kFrom], result[kTo];
#pragma GCC unroll 6
    for (int i = 0; i < kFrom; ++i) column[i] = from(i, j);
    matrix(result, column);
#pragma GCC unroll 6
    for (int i = 0; i < kTo; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll kColumnsAtOnce
  for (int i = 0; i < kTo; ++i) {
    V row[kTo];
    matrix(row, half[i]);
#pragma GCC unroll 6
    for (int j = 0; j < kTo; ++j) to(i, j, row[j]);
  }
}

// The same for squares in an array.
template <int kTo, int kFrom>
CUDA_CNN_INLINE void both_sides(void (*matrix)(V (&)[kTo], const V (&)[kFrom]), V (&to)[kTo][kTo],
                                const V (&from)[kFrom][kFrom]) {
  transform_square<kTo, kFrom>(
      matrix, [&](int i, int j) __attribute__((always_inline)) { return from[i][j]; },
      [&](int i, int j, V value) __attribute__((always_inline)) { to[i][j] = value; });
}

}  // namespace winograd
}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
