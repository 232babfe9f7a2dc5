// Correlations of 3x3 to 5x5 taps and stride 1 by Winograd's algorithm: see winograd.cpp,
// winograd_transforms.h.
#pragma once

#include "cpu/conv2d/filters.h"
#include "cpu/conv2d/gemm.h"
#include "cpu/conv2d/winograd_transforms.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// As correlate() of gemm.h; taps are neighbours, and the outputs fill their image. E is float, or pairs of
// channels, of which a group then has an even number.
template <class T, class E>
void correlate_winograd(const Gather<T>& gather, const Scatter<T>& scatter, const Filters<T, E>& filters,
                        int64_t N, int64_t groups);

// The inputs of tiles [begin, end) at the points of operands E:
// out[point * point_step + (tile - begin) * tile_step + channel], zero up to a whole vector.
template <class E, class T>
void winograd_inputs(const Gather<T>& gather, int64_t begin, int64_t end, Element<E>* out, int64_t point_step,
                     int64_t tile_step);

// The weight gradient by sums of float, to dweight, laid out as p.weight_planes says.
template <class T, class To>
void weight_grad_winograd_sums(const Conv2dParams& p, To* dweight);
#if defined(CUDA_CNN_HAS_PAIRS)
// The weight gradient of 3x3 and 5x5 filters in pairs: winograd_rows.cpp.
void weight_grad_winograd_rows(const Conv2dParams& p);
#endif

// The prologue of one vector of channels.
struct WinogradPrologue {
  Vec<float> scale, shift;
  bool rectify;

  template <class T>
  WinogradPrologue(const Gather<T>& g, int64_t channel, int64_t left)
      : scale(broadcast(1.0f)), shift(Vec<float>{}), rectify(g.relu) {
    if (!g.scale) return;
    scale = left >= kLanes<float> ? load(g.scale + channel) : load_first(g.scale + channel, left);
    shift = left >= kLanes<float> ? load(g.shift + channel) : load_first(g.shift + channel, left);
  }
  CUDA_CNN_INLINE Vec<float> operator()(Vec<float> x) const {
    x = fma(x, scale, shift);
    return rectify ? relu(x) : x;
  }
};

// The values of operands, a vector for each of their depth; and the inverse.
CUDA_CNN_INLINE void split(Vec<float> (&values)[1], Vec<float> operand) { values[0] = operand; }
CUDA_CNN_INLINE Vec<float> join(const Vec<float> (&values)[1]) { return values[0]; }
#if defined(CUDA_CNN_HAS_PAIRS)
CUDA_CNN_INLINE void split(Vec<float> (&values)[2], Words pairs) {
  values[0] = even(pairs), values[1] = odd(pairs);
}
CUDA_CNN_INLINE Words join(const Vec<float> (&values)[2]) { return zip(values[0], values[1]); }
#endif

// body(T{}, E{}) of the elements, and what Winograd's algorithm multiplies: float, or bfloat16 in pairs.
template <class Body>
void with_winograd_types(DType dtype, const Body& body) {
  if (dtype == DType::kFloat16) return body(Half{}, float{});
  if (dtype != DType::kBFloat16) return body(float{}, float{});
#if defined(CUDA_CNN_HAS_PAIRS)
  if (multiplies_pairs()) return body(BFloat16{}, Bf16Pair{});
#endif
  body(BFloat16{}, float{});
}

// The tiles of an image: `outputs` rows that have outputs, and behind each row and below them those whose
// inputs alone count, as a filter's piece after the first meets the next tile's.
template <class E>
struct WinogradGrid {
  int64_t out, outputs, rows, columns;

  template <class T>
  explicit WinogradGrid(const Gather<T>& g)
      : out(winograd_out<E>(g.R)),
        outputs(ceil_div(g.P, out)),
        rows(outputs + winograd_pieces<E>(g.R) - 1),
        columns(ceil_div(g.Q, out) + winograd_pieces<E>(g.S) - 1) {}
  int64_t tiles() const { return rows * columns; }
};
struct WinogradTile {
  int64_t n, p, q;  // of its first output
};
template <class E, class T>
CUDA_CNN_INLINE WinogradTile winograd_tile(const Gather<T>& g, int64_t tile) {
  const WinogradGrid<E> grid(g);
  return {tile / grid.tiles(), tile / grid.columns % grid.rows * grid.out, tile % grid.columns * grid.out};
}
template <class E, class T>
CUDA_CNN_INLINE int64_t winograd_tiles(const Gather<T>& g, int64_t N) {
  return N * WinogradGrid<E>(g).tiles();
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
