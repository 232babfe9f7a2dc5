// Which kernel a convolution takes, with what tile, and what of the workspace it needs.
#pragma once

#include <string>

#include "cuda/conv2d/problem.h"

namespace cuda_cnn::cuda::conv2d {

enum class Method {
  kDirect,       // direct.cu: the formula, one thread a result; takes everything
  kDepthwise,    // depthwise.cu: one channel a group, as many outputs
  kFewChannels,  // few_channels.cu: all outputs of a pixel in one thread
  kProduct,      // correlate.cuh, weight_grad.cuh: an implicit matrix product
};

// What few_channels.cu was compiled for: inputs, outputs, and weights in shared memory, 32 KB of float64.
constexpr int kFewInputs = 8, kFewOutputs = 16, kFewWeights = 4096;

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
  // The input in blocks of pixels, rearrange.cu: `channels` of each group, in whole packs; 0: as it is.
  BlockAxis block_h, block_w;
  int channels;
  // Workspace, in bytes, each a multiple of 16: packed weight, sums of the splits, statistics or column sums,
  // rearranged input.
  int64_t packed_bytes, split_bytes, statistics_bytes, source_bytes;

  bool rearranged() const { return channels > 0; }
  int64_t split_offset() const { return packed_bytes; }
  int64_t statistics_offset() const { return split_offset() + split_bytes; }
  int64_t source_offset() const { return statistics_offset() + statistics_bytes; }
  int64_t workspace_bytes() const { return source_offset() + source_bytes; }
};

// What the user wants, in place of what plan() would choose; 0 and -1 leave it to plan(). A kernel that
// cannot take the case, and a tile that was not compiled for it, are not taken.
struct Forced {
  int method = -1;
  int tile_rows = 0, tile_columns = 0;  // of a product, as is the load
  int load = -1;
  bool rearrange = false;

  bool of_product() const { return tile_rows > 0 || load != -1 || rearrange; }

  // CUDA_CNN_CONV2D_KERNEL=direct|depthwise|few_channels|product, CUDA_CNN_CONV2D_TILE=128x128|128x64|64x64,
  // CUDA_CNN_CONV2D_LOAD=async|mapped|scalar|rearranged
  static Forced from_environment();
};

const char* method_name(Method method);  // as CUDA_CNN_CONV2D_KERNEL has it

// Pure: depends on the parameters alone, never on the device, so results are the same bits on every card.
Plan plan(Conv2dDirection direction, const Conv2dParams& params, const Forced& forced = {});

// In words: "few_channels", "product 128x64, async, tensor cores".
std::string describe(const Plan& plan);

// Pixels of one partial sum in channel_sums.cu.
constexpr int kSumPixels = 256;

}  // namespace cuda_cnn::cuda::conv2d
