// Packing: what the register tiles read, in the order in which they read it, widened to Acc.
#pragma once

#include "cpu/conv2d/tile.h"
#include "kernels/conv2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Which elements of an NHWC source an output position reads: tap (r, s) of position (n, p, q) reads pixel
// (n, base_h + p*stride_h + r*tap_h, base_w + q*stride_w + s*tap_w), all `channels` of it; 0 outside the
// image. The matrix of a convolution has a row a position and a column a (r, s, channel): its "depth".
template <class T>
struct Gather {
  const T* source;  // the group's first channel
  int64_t H, W, pixel;
  int64_t P, Q;
  int64_t stride_h, stride_w, base_h, base_w;
  int64_t R, S, tap_h, tap_w;
  int64_t channels;
  const Accumulator<T>* scale = nullptr;  // prologue, a value a channel
  const Accumulator<T>* shift = nullptr;
  bool relu = false;

  int64_t depth() const { return R * S * channels; }
  // Whether position i reads pixel i alone.
  bool of_pixels() const {
    return R * S == 1 && stride_h == 1 && stride_w == 1 && base_h == 0 && base_w == 0 && P == H && Q == W;
  }
  // Whether the source itself is a matrix of operands E: rows `pixel` apart, nothing to convert.
  template <class E>
  bool is_matrix() const {
    return sizeof(T) == sizeof(Element<E>) && channels % kDepthOf<E> == 0 && pixel % kDepthOf<E> == 0 &&
           of_pixels() && !scale && !relu;
  }
  Gather of_group(int64_t group) const {
    Gather of_group = *this;
    of_group.source += group * channels;
    if (scale) of_group.scale += group * channels, of_group.shift += group * channels;
    return of_group;
  }
};

// The image and taps that y of these parameters is made from, with its prologue.
template <class T>
Gather<T> forward_gather(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  return {static_cast<const T*>(p.x),
          p.H,
          p.W,
          p.x_pixel,
          p.P,
          p.Q,
          p.stride_h,
          p.stride_w,
          -p.pad_h,
          -p.pad_w,
          p.R,
          p.S,
          p.dilation_h,
          p.dilation_w,
          p.C / p.groups,
          static_cast<const Acc*>(p.in_scale),
          static_cast<const Acc*>(p.in_shift),
          p.in_relu};
}

// The image with its padding: a position a row, which has a tap a pixel, as far as any tap of g reads.
template <class T>
Gather<T> rows_of_image(const Gather<T>& g) {
  Gather<T> image = g;
  image.P = (g.P - 1) * g.stride_h + (g.R - 1) * g.tap_h + 1, image.Q = 1, image.stride_h = 1, image.R = 1;
  image.S = (g.Q - 1) * g.stride_w + g.S;
  return image;
}

// Rows [position, position + count) and columns [depth_begin, depth_end) of the matrix, `step` elements
// apart; step has room for a vector behind the columns. To is Accumulator<T>, or T itself.
template <class T, class To>
void pack_positions(const Gather<T>& gather, int64_t position, int64_t count, int64_t depth_begin,
                    int64_t depth_end, To* out, int64_t step);

// A panel [depth][kTileColumns] of operands E of a matrix with rows[column][depth]: its columns are rows of
// memory, `pitch` apart.
template <class T, class E>
void pack_panel_transposed(const T* rows, int64_t pitch, int64_t columns, int64_t depth, E* panel);

// The same of rows that are [channel][tap], with the channels of a tap in order and the taps tap_step apart.
template <class T, class E>
void pack_panel_of_planes(const T* rows, int64_t pitch, int64_t columns, int64_t channels, int64_t taps,
                          int64_t tap_step, E* panel);

// A panel of a matrix [depth][columns] with rows `pitch` apart.
template <class T, class E>
void pack_panel(const T* rows, int64_t pitch, int64_t columns, int64_t depth, E* panel);

#if defined(CUDA_CNN_HAS_PAIRS)
// Pairs of two rows' neighbours, written up to a whole vector; no `odd` is a row of 0.
void pack_pairs(const BFloat16* even, const BFloat16* odd, int64_t count, Bf16Pair* out);
#endif

// The inverses, narrowing: rows[column][depth] of a panel, and rows that are [channel][tap].
template <class T>
void unpack_panel_transposed(const Accumulator<T>* panel, int64_t columns, int64_t depth, T* rows,
                             int64_t pitch);
template <class T>
void unpack_panel_to_planes(const Accumulator<T>* panel, int64_t columns, int64_t channels, int64_t taps,
                            int64_t tap_step, T* rows, int64_t pitch);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
