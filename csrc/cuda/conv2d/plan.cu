// The choice of a convolution's kernel. Every number has its reason beside it.
#include "cuda/conv2d/plan.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cuda/grid.h"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda::conv2d {
namespace {

// Blocks that keep a card busy: the multiprocessors of an H100; an A100 has 108.
constexpr int64_t kFullGrid = 132;
// Weight gradients have few tiles and a long reduction: two blocks a multiprocessor, whatever the card.
constexpr int64_t kSplitGrid = 264;
constexpr int64_t kMaxSplits = 128;  // bounds the workspace, and the time of adding them up
constexpr int64_t kMaxPixels = (int64_t{1} << 31) - 65536;  // a tile past the end must not wrap around
constexpr int64_t kMaxReduction = int64_t{1} << 30;
constexpr int64_t kMaxStrides = 1024;      // every phase has weights of its own
constexpr int64_t kMaxDepthwiseTaps = 64;  // they lie in shared memory
// On tensor cores a product computes 8 times the multiply-adds a clock, for 64 outputs and packs of 8 inputs:
// as fast as few_channels.cu at C*K = 8*64/8. Up to LeNet's 6 to 16 (c3) the latter still saves the packing's
// launch; its 16 to 120 (c5, one output a plane) are a matrix product of any dtype.
constexpr int64_t kFewProducts = 96;
// Zeros that rearranging may add, as a multiple of the real channels: a stem's 3 become 8 of 16 bits.
constexpr int64_t kMaxPadding = 3;

int64_t round_up(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Whether every position in and around the image, every number of a pixel, and the elements of one fit into
// 32-bit arithmetic.
bool fits_int32(const Conv2dParams& p) {
  const auto reach = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad,
                        int64_t dilation) {
    return in + out * stride + kernel * dilation + (pad < 0 ? -pad : pad);
  };
  return p.N * p.H * p.W < kMaxPixels && p.N * p.P * p.Q < kMaxPixels && p.x_pixel < kMaxPixels &&
         p.y_pixel < kMaxPixels && reach(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h) < kFarthest &&
         reach(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w) < kFarthest;
}

bool fits_product(Conv2dDirection direction, const Conv2dParams& p) {
  if (p.C == 0 || p.K == 0 || !fits_int32(p)) return false;
  const bool phased = direction == Conv2dDirection::kInputGrad;
  const int64_t phases = phased ? kMaxPhases * kMaxPhases : 1;
  if (phased && (p.stride_h * p.stride_w > kMaxStrides || p.R * p.S > kMaxGrid)) return false;
  return p.R * p.S * max64(p.C, p.K) < kMaxReduction && p.groups * phases <= kMaxGrid;
}

bool is_depthwise(const Conv2dParams& p) {
  // A block takes 16 channels at least, the grid's y a stretch of them.
  return p.C > 0 && p.C == p.groups && p.K == p.groups && p.R * p.S <= kMaxDepthwiseTaps && fits_int32(p) &&
         p.C <= 16 * kMaxGrid;
}

// Filters of inputs x 16 outputs (forward) and of outputs x 8 inputs (gradient) in shared memory.
bool has_few_channels(const Conv2dParams& p) {
  return p.groups == 1 && p.C > 0 && p.C <= kFewInputs && p.K > 0 && p.K <= kFewOutputs && fits_int32(p) &&
         p.R * p.S * max64(p.C * kFewOutputs, p.K * kFewInputs) <= kFewWeights;
}

bool uses_tensor_cores(const Conv2dParams& p) {
  return p.dtype == DType::kFloat32 ? p.allow_tf32 : p.dtype != DType::kFloat64;
}

bool takes(Method method, Conv2dDirection direction, const Conv2dParams& p) {
  switch (method) {
    case Method::kDepthwise:
      return is_depthwise(p);
    case Method::kFewChannels:
      return has_few_channels(p);
    case Method::kProduct:
      return fits_product(direction, p);
    default:
      return true;
  }
}

// What the user named, or -1.
int wanted_method(const Conv2dParams& p, const Forced& forced) {
  if (forced.method != -1) return forced.method;
  if (p.algorithm == Conv2dAlgorithm::kReference) return int(Method::kDirect);
  if (p.algorithm == Conv2dAlgorithm::kDepthwise) return int(Method::kDepthwise);
  return p.algorithm == Conv2dAlgorithm::kGemm || forced.of_product() ? int(Method::kProduct) : -1;
}

Method choose_method(Conv2dDirection direction, const Conv2dParams& p, const Forced& forced) {
  const auto possible = [&](Method method) { return takes(method, direction, p); };
  const int wanted = wanted_method(p, forced);
  if (wanted != -1 && possible(static_cast<Method>(wanted))) return static_cast<Method>(wanted);
  // A product with one column a group would use one of 64.
  if (possible(Method::kDepthwise)) return Method::kDepthwise;
  const bool few = !uses_tensor_cores(p) || p.C * p.K <= kFewProducts;
  if (few && possible(Method::kFewChannels)) return Method::kFewChannels;
  return possible(Method::kProduct) ? Method::kProduct : Method::kDirect;
}

// Whether the operand's channels come in whole, aligned 16-byte chunks.
bool in_chunks(const void* data, int64_t pixel, int64_t group_channels, DType dtype) {
  const int64_t bytes = element_size(dtype);
  return is_aligned(data, pixel * bytes) && group_channels * bytes % 16 == 0;
}

bool has_prologue(const Conv2dParams& p) { return p.in_scale || p.in_shift || p.in_relu; }

void choose_load(Plan& plan, Conv2dDirection direction, const Conv2dParams& p, int forced) {
  const bool x = in_chunks(p.x, p.x_pixel, p.C / p.groups, p.dtype);
  const bool dy = in_chunks(p.dy, p.y_pixel, p.K / p.groups, p.dtype);
  const bool chunks = direction == Conv2dDirection::kForward     ? x
                      : direction == Conv2dDirection::kInputGrad ? dy
                                                                 : x && dy;
  const bool map = direction != Conv2dDirection::kInputGrad && has_prologue(p);
  const bool vectors = is_aligned(p.in_scale) && is_aligned(p.in_shift);
  plan.load = !chunks || (map && !vectors) ? Load::kScalar : map ? Load::kMapped : Load::kAsync;
  // Scalar loads take every operand, mapped ones every operand in chunks.
  if (forced == int(Load::kScalar) || (forced == int(Load::kMapped) && plan.load == Load::kAsync)) {
    plan.load = static_cast<Load>(forced);
  }
  // One instance for what is rare: float64, and a prologue in strict float32.
  if (p.dtype == DType::kFloat64 || (plan.load == Load::kMapped && !plan.tensor_cores))
    plan.load = Load::kScalar;
}

// Scalar loads gather every element for each tap; one pass that brings the channels into packs first (and
// maps them, and takes the stride away) costs less, unless most of a pack were zeros.
void choose_rearrangement(Plan& plan, Conv2dDirection direction, const Conv2dParams& p,
                          const Forced& forced) {
  const bool gradient = direction == Conv2dDirection::kWeightGrad;
  const bool possible = direction != Conv2dDirection::kInputGrad && p.dtype != DType::kFloat64 &&
                        !(gradient && !p.dweight) &&
                        !(gradient && !in_chunks(p.dy, p.y_pixel, p.K / p.groups, p.dtype));
  const bool useful = forced.load == -1 && !in_chunks(p.x, p.x_pixel, p.C / p.groups, p.dtype);
  if (!possible || !(useful || forced.rearrange)) return;
  const BlockAxis h = block_axis(p.P, p.R, p.stride_h, p.dilation_h);
  const BlockAxis w = block_axis(p.Q, p.S, p.stride_w, p.dilation_w);
  const int64_t bytes = element_size(p.dtype), real = int64_t{h.block} * w.block * (p.C / p.groups);
  const int64_t channels = round_up(real, 16 / bytes), pixels = p.N * h.extent * w.extent;
  const bool fits = pixels < kMaxPixels && pixels * channels * p.groups * bytes / 16 < kMaxPixels &&
                    int64_t{h.taps} * w.taps * channels < kMaxReduction;
  if (!fits || (channels > kMaxPadding * real && !forced.rearrange)) return;
  plan.block_h = h, plan.block_w = w, plan.channels = static_cast<int>(channels);
  plan.load = Load::kAsync;
  plan.source_bytes = pixels * channels * p.groups * bytes;
}

// The largest tile (most products a byte of shared memory) that still gives every multiprocessor a block.
void choose_tile(Plan& plan, int64_t rows, int64_t columns, int64_t batch, bool weight_grad, DType dtype) {
  const auto blocks = [&](int r, int c) { return ceil_div(rows, r) * ceil_div(columns, c) * batch; };
  const auto set = [&](int r, int c) { plan.tile_rows = r, plan.tile_columns = c; };
  if (dtype == DType::kFloat64) return set(64, 64);  // twice the registers a sum
  if (!plan.tensor_cores) return set(128, 64);       // 8 x 8 sums a thread
  if (weight_grad) {
    // Splitting fills the grid; the smaller tile is for the small layers that a large one would mostly pad.
    if (plan.load == Load::kMapped) return set(128, 64);  // registers hold the next tile
    return plan.load == Load::kAsync && (rows > 64 || columns > 512) ? set(128, 128) : set(64, 64);
  }
  if (plan.load != Load::kAsync) return set(128, 64);  // registers hold the next tile
  if (columns > 64 && blocks(128, 128) >= kFullGrid) return set(128, 128);
  if (blocks(128, 64) >= kFullGrid) return set(128, 64);
  set(64, 64);
}

// The forced tile, where it was compiled: asynchronous loads on tensor cores, square ones for weight
// gradients.
void force_tile(Plan& plan, const Forced& forced, bool weight_grad) {
  const bool exists = plan.tensor_cores && plan.load == Load::kAsync &&
                      !(weight_grad && forced.tile_rows != forced.tile_columns);
  if (forced.tile_rows == 0 || !exists) return;
  plan.tile_rows = forced.tile_rows;
  plan.tile_columns = forced.tile_columns;
}

// Terms of the sum over taps and channels; columns of the weight gradient.
int64_t reduction_of(const Plan& plan, const Conv2dParams& p) {
  return plan.rearranged() ? int64_t{plan.block_h.taps} * plan.block_w.taps * plan.channels
                           : p.R * p.S * (p.C / p.groups);
}

void plan_weight(Plan& plan, Conv2dDirection direction, const Conv2dParams& p) {
  const int64_t bytes = element_size(p.dtype), pack = 16 / bytes;
  if (direction == Conv2dDirection::kForward) {
    const int64_t row = p.R * p.S * (p.C / p.groups), rearranged = reduction_of(plan, p);
    plan.weight_row = round_up(rearranged, pack);
    plan.pack_weight = plan.rearranged() || row != plan.weight_row || !is_aligned(p.weight);
    plan.weight_phase = 0;
    plan.packed_bytes = plan.pack_weight ? p.K * plan.weight_row * bytes : 0;
  } else if (direction == Conv2dDirection::kInputGrad) {
    // Transposed, and the taps of each phase together; a phase has the most taps where step = stride / gcd.
    const Conv2dPhase h = conv2d_phase(0, 1, p.R, p.stride_h, 0, p.dilation_h);
    const Conv2dPhase w = conv2d_phase(0, 1, p.S, p.stride_w, 0, p.dilation_w);
    const int64_t taps = ceil_div(p.R, h.tap_step) * ceil_div(p.S, w.tap_step);
    plan.pack_weight = true;
    plan.weight_row = round_up(taps * (p.K / p.groups), pack);
    plan.weight_phase = p.C * plan.weight_row;
    plan.packed_bytes = p.stride_h * p.stride_w * plan.weight_phase * bytes;
  }
  plan.packed_bytes = round_up(plan.packed_bytes, 16);
}

// Of the kernels that are no product: `blocks` for each share of the pixels, 512 of which are worth a block.
void plan_plain_splits(Plan& plan, const Conv2dParams& p, int64_t blocks) {
  const int64_t pixels = p.N * p.P * p.Q, weights = p.K * p.R * p.S * (p.C / p.groups);
  plan.splits = int(max64(1, min64(min64(ceil_div(4 * kSplitGrid, blocks), kMaxSplits), pixels / 512)));
  plan.split_bytes = round_up(plan.splits * weights * (p.dtype == DType::kFloat64 ? 8 : 4), 16);
}

void plan_splits(Plan& plan, const Conv2dParams& p) {
  const int64_t columns = reduction_of(plan, p), rows = p.K / p.groups;
  const int64_t blocks = ceil_div(rows, plan.tile_rows) * ceil_div(columns, plan.tile_columns) * p.groups;
  const int64_t tiles = ceil_div(p.N * p.P * p.Q, 64 / element_size(p.dtype));
  // A split should add at least 8 tiles, or its sums cost more than they save.
  const int64_t wanted = min64(min64(ceil_div(kSplitGrid, max64(blocks, 1)), kMaxSplits), tiles / 8);
  plan.splits = static_cast<int>(max64(wanted, 1));
  const int64_t sum_bytes = p.dtype == DType::kFloat64 ? 8 : 4;
  // A rearranged gradient is not yet the weight's: add_splits brings it into order.
  if (plan.splits > 1 || plan.rearranged()) {
    plan.split_bytes = round_up(plan.splits * p.K * columns * sum_bytes, 16);
  }
}

}  // namespace

const char* method_name(Method method) {
  switch (method) {
    case Method::kDirect:
      return "direct";
    case Method::kDepthwise:
      return "depthwise";
    case Method::kFewChannels:
      return "few_channels";
    default:
      return "product";
  }
}

Forced Forced::from_environment() {
  Forced forced;
  if (const char* kernel = std::getenv("CUDA_CNN_CONV2D_KERNEL")) {
    for (int i = 0; i <= int(Method::kProduct); ++i) {
      if (!std::strcmp(kernel, method_name(static_cast<Method>(i)))) forced.method = i;
    }
  }
  if (const char* tile = std::getenv("CUDA_CNN_CONV2D_TILE")) {
    int rows = 0, columns = 0;
    const bool known = std::sscanf(tile, "%dx%d", &rows, &columns) == 2 && (rows == 128 || rows == 64) &&
                       (columns == 128 || columns == 64) && rows >= columns;
    if (known) forced.tile_rows = rows, forced.tile_columns = columns;
  }
  if (const char* load = std::getenv("CUDA_CNN_CONV2D_LOAD")) {
    forced.load = !std::strcmp(load, "mapped")   ? int(Load::kMapped)
                  : !std::strcmp(load, "scalar") ? int(Load::kScalar)
                                                 : -1;
    forced.rearrange = !std::strcmp(load, "rearranged");
  }
  return forced;
}

Plan plan(Conv2dDirection direction, const Conv2dParams& p, const Forced& forced) {
  const bool weight_grad = direction == Conv2dDirection::kWeightGrad;
  Plan plan{};
  plan.method = choose_method(direction, p, forced);
  plan.tensor_cores = uses_tensor_cores(p);
  plan.splits = 1;
  const int64_t sum_bytes = p.dtype == DType::kFloat64 ? 8 : 4;
  // A column has two sums for every kSumPixels pixels, or rows of a warp's tile: 32 of them at least.
  if (p.mean || p.dbias) {
    plan.statistics_bytes = round_up(ceil_div(p.N * p.P * p.Q, 32) * p.K * 2 * sum_bytes, 16);
  }
  if (weight_grad && p.dweight && plan.method == Method::kDepthwise) {
    plan_plain_splits(plan, p, ceil_div(p.C, 128) * p.R * p.S);  // about 128 channels, one tap
  }
  if (weight_grad && p.dweight && plan.method == Method::kFewChannels) {
    plan_plain_splits(plan, p, ceil_div(p.R * p.S * p.C, 128));  // 128 weights of each output
  }
  if (plan.method != Method::kProduct) return plan;
  choose_load(plan, direction, p, forced.load);
  choose_rearrangement(plan, direction, p, forced);
  const int64_t group_c = p.C / p.groups, group_k = p.K / p.groups;
  switch (direction) {
    case Conv2dDirection::kForward:
      choose_tile(plan, p.N * p.P * p.Q, group_k, p.groups, false, p.dtype);
      break;
    case Conv2dDirection::kInputGrad:
      choose_tile(plan, ceil_div(p.N * p.H * p.W, p.stride_h * p.stride_w), group_c,
                  p.groups * p.stride_h * p.stride_w, false, p.dtype);
      break;
    case Conv2dDirection::kWeightGrad:
      choose_tile(plan, group_k, reduction_of(plan, p), p.groups, true, p.dtype);
      break;
  }
  force_tile(plan, forced, weight_grad);
  if (weight_grad) {
    if (p.dweight) plan_splits(plan, p);
  } else {
    plan_weight(plan, direction, p);
  }
  return plan;
}

std::string describe(const Plan& plan) {
  std::string text = method_name(plan.method);
  if (plan.method != Method::kProduct) return text;
  constexpr const char* kLoads[] = {"async", "mapped", "scalar"};
  text += " " + std::to_string(plan.tile_rows) + "x" + std::to_string(plan.tile_columns) + ", ";
  text += plan.rearranged() ? "rearranged" : kLoads[int(plan.load)];
  return text + (plan.tensor_cores ? ", tensor cores" : "");
}

}  // namespace cuda_cnn::cuda::conv2d
