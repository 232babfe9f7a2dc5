// Which kernel a convolution takes, with what tile, and what of the workspace it needs.
#pragma once

#include "cuda/conv2d/problem.h"

namespace cuda_cnn::cuda::conv2d {

enum class Method {
  kDirect,     // direct.cu: the formula, one thread a result; takes everything
  kDepthwise,  // depthwise.cu: one channel a group, as many outputs
  kProduct,    // correlate.cuh, weight_grad.cuh: an implicit matrix product
};

struct Plan {
  Method method;
  bool tensor_cores;  // else multiply-add in the type itself
  Load load;
  int tile_rows, tile_columns;
  // The weight as the product reads it: rows of weight_row elements, packed into the workspace or where it
  // is.
  bool pack_weight;
  int64_t weight_row, weight_phase;
  int splits;  // of a weight gradient's pixels
  // Workspace, in bytes: packed weight, then sums of the splits, then statistics or column sums.
  int64_t packed_bytes, split_bytes, statistics_bytes;

  int64_t workspace_bytes() const { return packed_bytes + split_bytes + statistics_bytes; }
};

// What the user wants, in place of what plan() would choose; 0 and -1 leave it to plan(). A tile that was not
// compiled for the case is not taken.
struct Forced {
  int tile_rows = 0, tile_columns = 0;
  int load = -1;

  // CUDA_CNN_CONV2D_TILE=128x128|128x64|64x64, CUDA_CNN_CONV2D_LOAD=async|mapped|scalar
  static Forced from_environment();
};

// Pure: depends on the parameters alone, never on the device, so results are the same bits on every card.
Plan plan(Conv2dDirection direction, const Conv2dParams& params, const Forced& forced = {});

// Pixels of one partial sum in channel_sums.cu.
constexpr int kSumPixels = 256;

}  // namespace cuda_cnn::cuda::conv2d
