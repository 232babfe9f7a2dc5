// Index arithmetic of the implicit products, the same on host and device (the tests call it on the host).
#pragma once

#include "kernels/conv2d.h"

namespace cuda_cnn::cuda::conv2d {

// One axis of a correlation. Output i of `count` lies at first + i*spread and reads, for tap t of `taps`, the
// source at base + i*move + t*tap; the source is zero outside [0, extent).
struct Axis {
  int count, first, spread;
  int base, move;
  int tap, taps;
  int extent;
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
  return {int(out), 0, 1, int(-pad), int(stride), int(dilation), int(kernel), int(in)};
}

// A phase of the input gradient: the source is dy, the output dx.
HOST_DEVICE Axis input_grad_axis(const Conv2dPhase& phase, int64_t out, int64_t stride) {
  return {int(phase.count),    int(phase.first), int(stride), int(phase.base), 1,
          int(-phase.dy_step), int(phase.taps),  int(out)};
}

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

// Division of 0 <= n < 2^31 by a multiplication: with 2^shift >= divisor, ceil(2^(31+shift) / divisor) is
// exact enough.
struct FastDivide {
  uint32_t divisor, magic;
  int shift;

  HOST_DEVICE static FastDivide by(uint32_t divisor) {
    int shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    return {divisor, static_cast<uint32_t>((power + divisor - 1) / divisor), shift};
  }
  HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> (31 + shift));
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
