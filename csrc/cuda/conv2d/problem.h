// What the implicit products' kernels are given. Sizes and positions are below 2^31 (plan.cu sends the
// rest to the direct kernel); offsets in memory are 64-bit.
#pragma once

#include "cuda/conv2d/geometry.h"

namespace cuda_cnn::cuda::conv2d {

// How the operands come into shared memory: load.cuh.
enum class Load { kAsync, kMapped, kScalar };

constexpr int kMaxPhases = 4;  // along one axis, of one launch

// A gathered tensor: NHWC, `channels` of each group contiguous.
struct Source {
  const void* data;
  int64_t pixel;  // elements from one pixel to the next
  int height, width, channels;
};

// The map on load, per channel of the whole tensor; vectors of the accumulation type, or null.
struct Prologue {
  const void *scale, *shift;
  bool relu;

  HOST_DEVICE bool any() const { return scale || shift || relu; }
};

struct Epilogue {
  const void* bias;
  const void* residual;
  int64_t residual_pixel;
  bool relu;
  bool vectors;    // four neighbouring columns may be read and written at once
  void* partials;  // statistics: [row of warps][channel][sum, M2], or null
};

// Forward, and phases of the input gradient: out[pixel][column] = sum over taps and channels of
// weight[column][tap, channel] * source[pixel's tap][channel].
struct Correlation {
  Source source;
  const void* weight;  // [phase][group][column] rows of weight_row elements, a multiple of a 16-byte pack
  int64_t weight_row;
  int64_t weight_phase;  // elements from one phase to the next
  void* out;
  int64_t out_pixel;
  int out_height, out_width;
  int images, groups, columns;  // columns of one group
  Axis h[kMaxPhases], w[kMaxPhases];
  int phases_h, phases_w;
  int phases_of_row;  // weight's phase is (h's number) * phases_of_row + (w's number)
  Prologue prologue;
  Epilogue epilogue;
};

// out[row][column] = sum over pixels of dy[pixel][row] * x[pixel's tap][channel], column = (tap, channel).
struct WeightGradient {
  const void* dy;
  int64_t dy_pixel;
  Source x;
  void* out;  // [split][group][row][column]
  bool sums;  // out holds sums in the accumulation type, to be added; else it is the gradient
  int images, groups, rows, columns, splits;
  Axis h, w;
  Prologue prologue;
};

}  // namespace cuda_cnn::cuda::conv2d
