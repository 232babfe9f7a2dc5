// The three launchers of kernels/conv2d.h: from the parameters, by the plan, to the kernels.
#include "cuda/conv2d/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda {
namespace {

using namespace conv2d;

char* workspace(const Conv2dParams& p, int64_t offset) { return static_cast<char*>(p.workspace) + offset; }

Plan plan_of(Conv2dDirection direction, const Conv2dParams& p) {
  return plan(direction, p, Forced::from_environment());
}

bool whole_quads(const void* data, int64_t pixel, const Conv2dParams& p) {
  const int64_t bytes = 4 * element_size(p.dtype);
  return reinterpret_cast<uintptr_t>(data) % (bytes < 16 ? bytes : 16) == 0 && pixel % 4 == 0;
}

// Whether four neighbouring outputs, or inputs, of a group may be read and written at once.
bool output_vectors(const Conv2dParams& p) {
  return p.K / p.groups % 4 == 0 && whole_quads(p.y, p.y_pixel, p) &&
         (!p.residual || whole_quads(p.residual, p.residual_pixel, p));
}
bool input_grad_vectors(const Conv2dParams& p) {
  return p.C / p.groups % 4 == 0 && whole_quads(p.dx, p.x_pixel, p);
}

Epilogue epilogue_of(const Conv2dParams& p, void* partials) {
  return {p.bias, p.residual, p.residual_pixel, p.relu, output_vectors(p), partials};
}

// What the products read for x: itself, or its rearranged copy, mapped and with its border.
Source source_of(const Conv2dParams& p, const Plan& plan) {
  if (!plan.rearranged()) return {p.x, p.x_pixel, int(p.H), int(p.W), int(p.C / p.groups)};
  return {workspace(p, plan.source_offset()), p.groups * plan.channels, plan.block_h.extent,
          plan.block_w.extent, plan.channels};
}

void set_axes(const Conv2dParams& p, const Plan& plan, Axis& h, Axis& w) {
  if (!plan.rearranged()) {
    h = forward_axis(p.H, p.P, p.R, p.stride_h, p.pad_h, p.dilation_h);
    w = forward_axis(p.W, p.Q, p.S, p.stride_w, p.pad_w, p.dilation_w);
    return;
  }
  const BlockAxis &bh = plan.block_h, &bw = plan.block_w;
  h = forward_axis(bh.extent, p.P, bh.taps, bh.stride, 0, p.dilation_h);
  w = forward_axis(bw.extent, p.Q, bw.taps, bw.stride, 0, p.dilation_w);
}

Prologue prologue_of(const Conv2dParams& p, const Plan& plan) {
  return plan.rearranged() ? Prologue{} : Prologue{p.in_scale, p.in_shift, p.in_relu};
}

Correlation forward_problem(const Conv2dParams& p, const Plan& plan) {
  Correlation out{};
  out.source = source_of(p, plan);
  out.weight = plan.pack_weight ? workspace(p, 0) : p.weight;
  out.weight_row = plan.weight_row;
  out.out = p.y;
  out.out_pixel = p.y_pixel;
  out.out_height = int(p.P), out.out_width = int(p.Q);
  out.images = int(p.N), out.groups = int(p.groups), out.columns = int(p.K / p.groups);
  set_axes(p, plan, out.h[0], out.w[0]);
  out.phases_h = out.phases_w = out.phases_of_row = 1;
  out.prologue = prologue_of(p, plan);
  out.epilogue = epilogue_of(p, p.mean ? workspace(p, plan.statistics_offset()) : nullptr);
  return out;
}

// At most kMaxPhases x kMaxPhases phases, from (first_h, first_w) on.
Correlation input_grad_problem(const Conv2dParams& p, const Plan& plan, int64_t first_h, int64_t first_w) {
  Correlation out{};
  out.source = {p.dy, p.y_pixel, int(p.P), int(p.Q), int(p.K / p.groups)};
  out.weight = workspace(p, (first_h * p.stride_w + first_w) * plan.weight_phase * element_size(p.dtype));
  out.weight_row = plan.weight_row;
  out.weight_phase = plan.weight_phase;
  out.out = p.dx;
  out.out_pixel = p.x_pixel;
  out.out_height = int(p.H), out.out_width = int(p.W);
  out.images = int(p.N), out.groups = int(p.groups), out.columns = int(p.C / p.groups);
  out.phases_h = int(min64(kMaxPhases, p.stride_h - first_h));
  out.phases_w = int(min64(kMaxPhases, p.stride_w - first_w));
  out.phases_of_row = int(p.stride_w);
  for (int i = 0; i < out.phases_h; ++i) {
    out.h[i] = input_grad_axis(conv2d_phase(first_h + i, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h), p.P,
                               p.stride_h);
  }
  for (int i = 0; i < out.phases_w; ++i) {
    out.w[i] = input_grad_axis(conv2d_phase(first_w + i, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w), p.Q,
                               p.stride_w);
  }
  out.epilogue.vectors = input_grad_vectors(p);
  return out;
}

WeightGradient weight_grad_problem(const Conv2dParams& p, const Plan& plan) {
  WeightGradient out{};
  out.dy = p.dy;
  out.dy_pixel = p.y_pixel;
  out.x = source_of(p, plan);
  out.sums = plan.split_bytes > 0;
  out.out = out.sums ? workspace(p, plan.split_offset()) : p.dweight;
  out.images = int(p.N), out.groups = int(p.groups), out.rows = int(p.K / p.groups), out.splits = plan.splits;
  set_axes(p, plan, out.h, out.w);
  out.prologue = prologue_of(p, plan);
  return out;
}

}  // namespace

int64_t conv2d_workspace_bytes(Conv2dDirection direction, const Conv2dParams& p) {
  return plan_of(direction, p).workspace_bytes();
}

void conv2d_forward(const Conv2dParams& p, Stream stream) {
  if (p.N * p.P * p.Q * p.K == 0) return;
  const Plan plan = plan_of(Conv2dDirection::kForward, p);
  if (plan.method == Method::kProduct) {
    if (plan.rearranged()) {
      rearrange_input(p, plan, workspace(p, plan.source_offset()), stream);
      rearrange_weight(p, plan, workspace(p, 0), stream);
    } else if (plan.pack_weight) {
      pack_forward_weight(p, plan, workspace(p, 0), stream);
    }
    const Correlation problem = forward_problem(p, plan);
    dispatch_dtype(p.dtype, [&](auto type) { correlate_product<decltype(type)>(problem, plan, stream); });
    if (p.mean) finish_statistics(p, {problem.epilogue.partials, plan.tile_rows / 2}, stream);
    return;
  }
  if (plan.method == Method::kDepthwise) {
    depthwise_forward(p, stream);
  } else if (plan.method == Method::kFewChannels) {
    few_channels_forward(p, output_vectors(p), stream);
  } else {
    direct_forward(p, stream);
  }
  if (p.mean) output_statistics(p, workspace(p, plan.statistics_offset()), stream);
}

void conv2d_input_grad(const Conv2dParams& p, Stream stream) {
  if (p.N * p.H * p.W * p.C == 0) return;
  const Plan plan = plan_of(Conv2dDirection::kInputGrad, p);
  if (plan.method == Method::kDepthwise) return depthwise_input_grad(p, stream);
  if (plan.method == Method::kFewChannels) return few_channels_input_grad(p, input_grad_vectors(p), stream);
  if (plan.method == Method::kDirect) return direct_input_grad(p, stream);
  pack_input_grad_weight(p, plan, workspace(p, 0), stream);
  for (int64_t h = 0; h < p.stride_h; h += kMaxPhases) {
    for (int64_t w = 0; w < p.stride_w; w += kMaxPhases) {
      const Correlation problem = input_grad_problem(p, plan, h, w);
      dispatch_dtype(p.dtype, [&](auto type) { correlate_product<decltype(type)>(problem, plan, stream); });
    }
  }
}

void conv2d_weight_grad(const Conv2dParams& p, Stream stream) {
  const Plan plan = plan_of(Conv2dDirection::kWeightGrad, p);
  if (p.dbias && p.K > 0) bias_gradient(p, workspace(p, plan.statistics_offset()), stream);
  if (!p.dweight || p.K * p.R * p.S * p.C == 0) return;
  if (plan.method == Method::kDepthwise) return depthwise_weight_grad(p, plan, stream);
  if (plan.method == Method::kFewChannels) return few_channels_weight_grad(p, plan, stream);
  if (plan.method == Method::kDirect) return direct_weight_grad(p, stream);
  if (plan.rearranged()) rearrange_input(p, plan, workspace(p, plan.source_offset()), stream);
  const WeightGradient problem = weight_grad_problem(p, plan);
  dispatch_dtype(p.dtype, [&](auto type) { weight_gradient_product<decltype(type)>(problem, plan, stream); });
  if (plan.rearranged()) {
    add_rearranged_splits(p, plan, problem.out, stream);
  } else if (problem.sums) {
    add_splits(p, plan.splits, problem.out, stream);
  }
}

void conv2d_statistics(const Conv2dParams& p, Stream stream) {
  const Plan plan = plan_of(Conv2dDirection::kWeightGrad, p);
  output_statistics(p, workspace(p, plan.statistics_offset()), stream);
}

}  // namespace cuda_cnn::cuda
