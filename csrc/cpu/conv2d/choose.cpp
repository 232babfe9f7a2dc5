// Which algorithm a convolution takes. Pure: the answer depends on the parameters and the instruction set.
#include "kernels/conv2d.h"

namespace cuda_cnn::cpu {
namespace {

// Fastest first; the last one takes everything.
constexpr Conv2dAlgorithm kOrder[] = {Conv2dAlgorithm::kWinograd,    Conv2dAlgorithm::kDepthwise,
                                      Conv2dAlgorithm::kGemmNchw,    Conv2dAlgorithm::kFewPixels,
                                      Conv2dAlgorithm::kFewChannels, Conv2dAlgorithm::kGemm,
                                      Conv2dAlgorithm::kReference};
// Products a result at which packing (taps, channels) of NCHW from a cache still beats making NHWC of it.
constexpr int64_t kNchwDepth = 512;
// Taps for which a pixel is packed there, with which it does so whatever the depth: 3x3 of stride 2. (Forward
// packs runs of a row, which then are to be long, or few.)
constexpr int64_t kNchwTaps = 3;
constexpr int64_t kNchwRow = 28;
constexpr int64_t kNchwPixels = 128;
// Products a result from which on Winograd's algorithm in blocks pays for a transposed y or dy.
constexpr int64_t kNchwSum = 256;
// A depth that gemm.cpp does not cut: its end alone may be half a pair.
constexpr int64_t kUncutDepth = 1024;
// Beyond, a packed weight is read often enough to pay for its packing.
constexpr int64_t kFewPixels = 16;
// Below, the direct weight gradient's fewer sums make up for Winograd's fewer products in pairs.
constexpr int64_t kFewRowPixels = 256;
// Outputs of a row below which the tile more that 5x5 in pieces takes outweighs its fewer products.
constexpr int64_t kFewColumns = 12;
// Elements of a weight below which each thread packs NHWC's for itself sooner than it reads what another has
// packed.
constexpr int64_t kPlanes = 262144;
// Positions of a row from which on a tile's multiply-adds outweigh its reading and writing of sums, once a
// row.
constexpr int64_t kLongRow = 16;
// Panels of filters beyond which a first layer's packed image is read often enough to pay for its packing.
constexpr int64_t kFewPanels = 4;

bool empty_sum(Conv2dDirection direction, const Conv2dParams& p) {
  switch (direction) {
    case Conv2dDirection::kForward:
      return p.R * p.S * p.C == 0;
    case Conv2dDirection::kInputGrad:
      return p.R * p.S * p.K == 0 || p.P * p.Q == 0;
    case Conv2dDirection::kWeightGrad:
      return p.N * p.P * p.Q == 0;
  }
  return true;
}

// Channels that one vector computes; 16-bit types are computed in float.
int64_t vector_lanes(DType dtype) {
  const int64_t bytes = isa() >= Isa::kAvx512 ? 64 : isa() == Isa::kAvx2 ? 32 : 16;
  return bytes / max64(4, element_size(dtype));
}

// As many filters as channels: 1, or a power of two that a kernel exists for.
bool narrow_groups(const Conv2dParams& p) {
  const int64_t channels = p.C / p.groups;
  const bool has_kernel = channels == 1 || channels == 2 || channels == 4 || channels == 8;
  return p.K == p.C && has_kernel && channels <= vector_lanes(p.dtype);
}

// A 1x1 filter at every pixel.
bool plain_1x1(const Conv2dParams& p) {
  return p.R == 1 && p.S == 1 && p.stride_h == 1 && p.stride_w == 1 && p.P == p.H && p.Q == p.W &&
         p.pad_h == 0 && p.pad_w == 0;
}

// Whether products are of bfloat16 in pairs.
bool in_pairs(const Conv2dParams& p) { return p.dtype == DType::kBFloat16 && multiplies_pairs(); }

bool strided(const Conv2dParams& p) { return p.stride_h * p.stride_w > 1; }

// Products of float32; or of bfloat16 in pairs of channels, and then of 3x3 and 5x5.
bool winograd_type(Conv2dDirection direction, const Conv2dParams& p) {
  if (p.dtype == DType::kFloat64) return false;
  if (!in_pairs(p)) return p.R >= 3 && p.R <= 5;
  if (p.R != 3 && p.R != 5) return false;
  if (direction == Conv2dDirection::kWeightGrad) return true;  // pairs of tiles
  return (direction == Conv2dDirection::kForward ? p.C : p.K) / p.groups % 2 == 0;
}

// With a stride, in blocks: one group, not in pairs, with no prologue, as padding is in the blocks.
bool winograd_applies(Conv2dDirection direction, const Conv2dParams& p) {
  const Conv2dParams b = conv2d_in_blocks(p);
  const bool in_blocks =
      direction != Conv2dDirection::kInputGrad && !in_pairs(p) && p.groups == 1 && !p.in_scale && !p.in_relu;
  return winograd_type(direction, b) && b.S == b.R && p.dilation_h == 1 && p.dilation_w == 1 &&
         !empty_sum(direction, p) && (!strided(p) || in_blocks);
}

// Whether the algorithm can compute this at all.
bool applies(Conv2dAlgorithm algorithm, Conv2dDirection direction, const Conv2dParams& p) {
  switch (algorithm) {
    case Conv2dAlgorithm::kWinograd:
      return winograd_applies(direction, p);
    case Conv2dAlgorithm::kDepthwise:
      return narrow_groups(p) && !p.in_scale && !p.in_relu && !empty_sum(direction, p);
    case Conv2dAlgorithm::kGemmNchw:
      return p.nchw && !p.in_scale && !p.in_relu && !empty_sum(direction, p) &&
             (direction != Conv2dDirection::kInputGrad || plain_1x1(p));
    case Conv2dAlgorithm::kFewPixels:
      return direction != Conv2dDirection::kWeightGrad && plain_1x1(p) && p.groups == 1 && !p.in_scale &&
             !p.in_relu && !empty_sum(direction, p);
    case Conv2dAlgorithm::kFewChannels:
      if (p.groups > 1 || p.C >= vector_lanes(p.dtype) || empty_sum(direction, p)) return false;
      if (direction == Conv2dDirection::kInputGrad) return true;
      return p.dilation_w == 1 && (direction == Conv2dDirection::kForward ? !p.residual : !p.nchw);
    case Conv2dAlgorithm::kGemm:
      return !empty_sum(direction, p);
    case Conv2dAlgorithm::kReference:
      return true;
    default:
      return false;
  }
}

// Whether it is the fastest of those from here on.
bool worthwhile(Conv2dAlgorithm algorithm, Conv2dDirection direction, const Conv2dParams& p) {
  // A single group, of a few channels, is a small matrix product.
  if (algorithm == Conv2dAlgorithm::kDepthwise) return p.groups > 1 || p.C == 1;
  // NCHW where it lies: of one tap a product's operand already, of few channels (a stem) packed from cache.
  // Else each pixel would be packed for many taps, and NHWC's whole pixels are worth two conversions.
  if (algorithm == Conv2dAlgorithm::kGemmNchw) {
    // The input gradient's weights are copied there in short runs: few pixels do not pay that back.
    if (direction == Conv2dDirection::kInputGrad && p.N * p.P * p.Q < kNchwPixels) return false;
    if (in_pairs(p)) return false;  // pairs are of neighbours in NHWC
    if (p.P * p.Q == 1) return false;
    if (p.R * p.S == 1 || p.R * p.S * p.C / p.groups <= kNchwDepth) return true;
    const bool short_runs = direction == Conv2dDirection::kForward && p.Q < kNchwRow;
    return p.R * p.S <= kNchwTaps * p.stride_h * p.stride_w &&
           (!short_runs || p.N * p.P * p.Q <= kNchwPixels);
  }
  if (algorithm == Conv2dAlgorithm::kFewPixels) return p.N * p.P * p.Q <= kFewPixels && !p.packed;
  // Forward: one tap a row is a plain matrix product.
  if (algorithm == Conv2dAlgorithm::kFewChannels && direction == Conv2dDirection::kForward) {
    return p.S > 1 && !conv2d_packs_pairs(p) && p.K <= kFewPanels * conv2d_panel_columns(p.dtype);
  }
  // Weight gradient: where taps overlap, or each element is copied once anyway.
  if (algorithm == Conv2dAlgorithm::kFewChannels && direction == Conv2dDirection::kWeightGrad) {
    return p.S > 1 && p.R * p.S > p.stride_h * p.stride_w && p.Q >= kLongRow;
  }
  if (algorithm != Conv2dAlgorithm::kWinograd) return true;
  const Conv2dParams b = conv2d_in_blocks(p);
  const int64_t tile = 7 - b.R, tiles = p.N * ceil_div(p.P, tile) * ceil_div(p.Q, tile);
  // With a stride: for at most half of the products, and of NCHW only long sums, as y or dy is transposed.
  if (strided(p)) {
    const int64_t products = p.R * p.S * p.C;
    if (2 * 36 * b.C > tile * tile * products || (p.nchw && products < kNchwSum)) return false;
  }
  // A weight gradient of a few tiles is mostly the way back of its sums, 36 for each filter and channel, or
  // 12 in pairs, for two thirds of the products.
  if (direction == Conv2dDirection::kWeightGrad &&
      (in_pairs(p) ? p.N * p.P * p.Q < kFewRowPixels : tiles < 8)) {
    return false;
  }
  // In pieces a row has one tile more than outputs for it.
  if (in_pairs(p) && p.R == 5 && (p.P < kFewColumns || p.Q < kFewColumns)) return false;
  // The transforms cost as much as some ten channels' products, and tiles must not be mostly edge.
  return p.allow_winograd && b.C / p.groups >= (strided(p) ? 12 : 16) && p.K / p.groups >= 16 && p.P >= 4 &&
         p.Q >= 4;
}

}  // namespace

bool conv2d_packs_pairs(const Conv2dParams& p) {
  const int64_t channels = p.C / p.groups;
  return in_pairs(p) && (channels % 2 == 0 || p.R * p.S * channels <= kUncutDepth);
}

Conv2dPlanes conv2d_planes(Conv2dDirection direction, const Conv2dParams& p) {
  const Conv2dAlgorithm algorithm = conv2d_choose(direction, p);
  if (algorithm == Conv2dAlgorithm::kWinograd && !in_pairs(p) && !strided(p)) {
    return Conv2dPlanes::kKeep;
  }
  const bool large = p.K * p.C / p.groups * p.R * p.S >= kPlanes;
  return direction == Conv2dDirection::kForward && algorithm == Conv2dAlgorithm::kGemm && large &&
                 p.R * p.S > 1 && !conv2d_packs_pairs(p) && conv2d_flattened(p).R == p.R
             ? Conv2dPlanes::kPack
             : Conv2dPlanes::kConvert;
}

int64_t conv2d_panel_columns(DType dtype) { return 2 * vector_lanes(dtype); }

Conv2dParams conv2d_flattened(const Conv2dParams& params) {
  Conv2dParams p = params;
  const bool covers = p.P == 1 && p.Q == 1 && p.R == p.H && p.S == p.W && p.pad_h == 0 && p.pad_w == 0 &&
                      p.dilation_h == 1 && p.dilation_w == 1 && p.groups == 1 && p.x_pixel == p.C &&
                      !p.in_scale && !p.nchw;
  if (!covers) return p;
  p.C = p.x_pixel = p.R * p.S * p.C;
  p.H = p.W = p.R = p.S = 1;
  p.stride_h = p.stride_w = 1;
  return p;
}

Conv2dParams conv2d_in_blocks(const Conv2dParams& params) {
  Conv2dParams p = params;
  if (!strided(p)) return p;
  p.R = ceil_div(p.R, p.stride_h), p.S = ceil_div(p.S, p.stride_w);
  p.H = p.P + p.R - 1, p.W = p.Q + p.S - 1;
  p.pad_h = p.pad_w = 0;
  p.C = p.x_pixel = p.stride_h * p.stride_w * p.C;
  p.stride_h = p.stride_w = 1;
  p.packed = nullptr;  // in the order of the taps
  return p;
}

Conv2dAlgorithm conv2d_choose(Conv2dDirection direction, const Conv2dParams& unflattened) {
  const Conv2dParams params = conv2d_flattened(unflattened);
  if (params.algorithm != Conv2dAlgorithm::kAuto && applies(params.algorithm, direction, params)) {
    return params.algorithm;
  }
  for (Conv2dAlgorithm algorithm : kOrder) {
    if (applies(algorithm, direction, params) && worthwhile(algorithm, direction, params)) return algorithm;
  }
  return Conv2dAlgorithm::kReference;
}

const char* conv2d_algorithm_name(Conv2dAlgorithm algorithm) {
  switch (algorithm) {
    case Conv2dAlgorithm::kAuto:
      return "auto";
    case Conv2dAlgorithm::kWinograd:
      return "winograd";
    case Conv2dAlgorithm::kDepthwise:
      return "depthwise";
    case Conv2dAlgorithm::kGemmNchw:
      return "gemm_nchw";
    case Conv2dAlgorithm::kFewPixels:
      return "few_pixels";
    case Conv2dAlgorithm::kFewChannels:
      return "few_channels";
    case Conv2dAlgorithm::kGemm:
      return "gemm";
    case Conv2dAlgorithm::kReference:
      return "reference";
  }
  return "unknown";
}

}  // namespace cuda_cnn::cpu
