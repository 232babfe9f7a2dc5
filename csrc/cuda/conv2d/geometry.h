// Index arithmetic of the implicit products, the same on host and device (the tests call it on the host).
#pragma once

#include "cuda/divide.h"
#include "kernels/conv2d.h"

namespace cuda_cnn::cuda::conv2d {

// One axis of a correlation. Output i of `count` lies at first + i*spread and reads, for tap t of `taps`, the
// source at base + i*move + t*tap; the source is zero outside [0, extent).
struct Axis {
  int count, first, spread;
  int base, move;
  int tap, taps;
  int extent;
  FastDivide by_count;
};

// Rows that do not exist begin here: no tap brings them back into the image, for positions are below
// kFarthest.
constexpr int kOutside = -(1 << 30);
constexpr int kFarthest = 1 << 29;

HOST_DEVICE int output_at(const Axis& axis, int i) { return axis.first + i * axis.spread; }
HOST_DEVICE int source_at(const Axis& axis, int i, int t) { return axis.base + i * axis.move + t * axis.tap; }
HOST_DEVICE bool inside(int position, int extent) {
  return static_cast<unsigned>(position) < static_cast<unsigned>(extent);
}

HOST_DEVICE Axis forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                              int64_t dilation) {
  return {int(out), 0, 1, int(-pad), int(stride), int(dilation), int(kernel), int(in), FastDivide::by(out)};
}

// A phase of the input gradient: the source is dy, the output dx.
HOST_DEVICE Axis input_grad_axis(const Conv2dPhase& phase, int64_t out, int64_t stride) {
  return {int(phase.count),
          int(phase.first),
          int(stride),
          int(phase.base),
          1,
          int(-phase.dy_step),
          int(phase.taps),
          int(out),
          FastDivide::by(phase.count)};
}

// Along one axis, an input rearranged in blocks of pixels (rearrange.cu): cell i of `extent` holds the
// source's [i*block - pad, (i + 1)*block - pad), and the convolution has `taps` blocks, without padding.
struct BlockAxis {
  int block, taps, stride, extent;
};

// Blocks as long as the stride leave a convolution of stride 1. A dilated one keeps its taps apart, and with
// a stride beyond the kernel most of a block would be moved for nothing: blocks of one.
HOST_DEVICE BlockAxis block_axis(int64_t out, int64_t kernel, int64_t stride, int64_t dilation) {
  const int64_t block = dilation == 1 && stride <= kernel ? stride : 1;
  const int64_t taps = ceil_div(kernel, block), step = stride / block;
  return {int(block), int(taps), int(step), int((out - 1) * step + (taps - 1) * dilation + 1)};
}

// What element `within` of a group's cell (i, j) of the rearranged input stems from.
struct BlockedPixels {
  int height, width, pad_h, pad_w, block_h, block_w;
  FastDivide of_row;    // elements of a block that lie in one row of the source
  FastDivide of_pixel;  // channels

  struct Element {
    bool exists;  // else a zero
    int row, column, c;
  };

  static BlockedPixels of(const Conv2dParams& p, const BlockAxis& h, const BlockAxis& w) {
    const int64_t channels = p.C / p.groups;
    return {int(p.H),
            int(p.W),
            int(p.pad_h),
            int(p.pad_w),
            h.block,
            w.block,
            FastDivide::by(w.block * channels),
            FastDivide::by(channels)};
  }
  HOST_DEVICE int channels() const { return static_cast<int>(of_pixel.divisor); }
  HOST_DEVICE Element locate(int i, int j, int within) const {
    const int u = of_row.quotient(within), in_row = within - u * of_row.divisor;
    const int v = of_pixel.quotient(in_row);
    const int row = i * block_h - pad_h + u, column = j * block_w - pad_w + v;
    return {u < block_h && inside(row, height) && inside(column, width), row, column,
            int(in_row - v * of_pixel.divisor)};
  }
};

// A filter (R, S, C) in the same order, and back.
struct FilterBlocks {
  int R, S, C;
  BlockAxis h, w;
  int channels;  // of a block

  HOST_DEVICE int64_t own_length() const { return int64_t{R} * S * C; }
  HOST_DEVICE int64_t length() const { return int64_t{h.taps} * w.taps * channels; }
  HOST_DEVICE int64_t to_blocks(int64_t i) const {
    const int c = i % C, s = i / C % S, r = i / C / S;
    const int64_t tap = int64_t{r / h.block} * w.taps + s / w.block;
    return tap * channels + (r % h.block * w.block + s % w.block) * C + c;
  }
  // -1: a zero
  HOST_DEVICE int64_t from_blocks(int64_t i) const {
    const int within = i % channels, u = within / (w.block * C), v = within / C % w.block, c = within % C;
    const int r = i / channels / w.taps * h.block + u, s = i / channels % w.taps * w.block + v;
    return u < h.block && r < R && s < S ? (int64_t{r} * S + s) * C + c : -1;
  }
};

// A position (r, s, c) in the flattened reduction r*(taps_w*channels) + s*channels + c, moved without
// divisions.
struct TapWalk {
  int r, s, c;

  HOST_DEVICE static TapWalk at(int index, int channels, int taps_w) {
    const int tap = index / channels, width = taps_w > 0 ? taps_w : 1;
    return {tap / width, tap % width, index % channels};
  }
  HOST_DEVICE void advance(int by, int channels, int taps_w) {
    c += by;
    while (c >= channels) {
      c -= channels;
      if (++s >= taps_w) {
        s = 0;
        ++r;
      }
    }
  }
};

// The same walk in a source of `width` pixels a row: where the tap lies from the first one, in rows and
// columns, and how far in memory. Additions only.
struct SourceWalk {
  int r, s, c;
  int row, column;
  int64_t offset;  // elements
  int64_t tap_step, line_step;

  HOST_DEVICE static SourceWalk at(int index, int channels, const Axis& h, const Axis& w, int width,
                                   int64_t pixel) {
    const TapWalk tap = TapWalk::at(index, channels, w.taps);
    const int row = tap.r * h.tap, column = tap.s * w.tap;
    return {tap.r,
            tap.s,
            tap.c,
            row,
            column,
            (int64_t{row} * width + column) * pixel + tap.c,
            w.tap * pixel - channels,
            (int64_t{h.tap} * width - int64_t{w.taps} * w.tap) * pixel};
  }
  HOST_DEVICE void advance(int by, int channels, const Axis& h, const Axis& w) {
    c += by;
    offset += by;
    while (c >= channels) {
      c -= channels;
      column += w.tap;
      offset += tap_step;
      if (++s >= w.taps) {
        s = column = 0;
        ++r;
        row += h.tap;
        offset += line_step;
      }
    }
  }
};

// Image, row and column of an output pixel.
struct PixelIndex {
  int image, i, j;
};
HOST_DEVICE PixelIndex pixel_index(int pixel, const FastDivide& height, const FastDivide& width) {
  const uint32_t row = width.quotient(static_cast<uint32_t>(pixel));
  const uint32_t image = height.quotient(row);
  return {int(image), int(row - image * height.divisor), int(pixel - row * width.divisor)};
}

// Part `index` of `parts` of the range [0, total): as even as can be, the longer ones first.
struct Range {
  int begin, end;
};
HOST_DEVICE Range split_range(int total, int parts, int index) {
  const int length = total / parts, longer = total % parts;
  const int begin = index * length + (index < longer ? index : longer);
  return {begin, begin + length + (index < longer ? 1 : 0)};
}

}  // namespace cuda_cnn::cuda::conv2d
