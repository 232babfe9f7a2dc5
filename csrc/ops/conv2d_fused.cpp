#include "kernels/conv2d_fused.h"

#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>

#include "ops/allocate.h"
#include "ops/conv2d.h"
#include "ops/dispatch.h"
#include "ops/layout.h"

namespace cuda_cnn::ops {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

constexpr const char* kOp = "conv2d_fused";
constexpr const char* kMap = "channel_map";

at::ScalarType accumulator_of(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}
at::TensorOptions vector_options(const at::Tensor& x) {
  return x.options().dtype(accumulator_of(x)).memory_format(at::MemoryFormat::Contiguous);
}

// A vector with a value a channel, in the dtype that kernels compute x in.
void check_vector(const char* op, const char* name, const OptionalTensor& values, const at::Tensor& x,
                  int64_t channels) {
  if (!values) return;
  TORCH_CHECK(values->layout() == at::kStrided && values->device() == x.device(), op, ": expected ", name,
              " to be a dense tensor on ", x.device(), " like input, got one on ", values->device());
  TORCH_CHECK(values->scalar_type() == accumulator_of(x), op, ": expected ", name, " of dtype ",
              accumulator_of(x), " beside input of ", x.scalar_type(), ", got ", values->scalar_type());
  TORCH_CHECK(values->dim() == 1 && values->size(0) == channels, op, ": expected ", name, " of shape [",
              channels, "], got ", values->sizes());
}

at::Tensor dense_vector(const OptionalTensor& values) { return values ? values->contiguous() : at::Tensor(); }
const void* data_or_null(const at::Tensor& tensor) { return tensor.defined() ? data(tensor) : nullptr; }

void check_prologue(const OptionalTensor& in_scale, const OptionalTensor& in_shift, const at::Tensor& x) {
  check_vector(kOp, "in_scale", in_scale, x, x.size(1));
  check_vector(kOp, "in_shift", in_shift, x, x.size(1));
  TORCH_CHECK(in_scale.has_value() == in_shift.has_value(), kOp,
              ": expected in_scale and in_shift, or neither of them, got only ",
              in_scale ? "in_scale" : "in_shift");
}

int64_t pixels_of(const at::Tensor& x) { return x.size(0) * x.size(2) * x.size(3); }

PixelRowsView view_of(const at::Tensor& nhwc, int64_t pixel) {
  return {nhwc.defined() ? data(nhwc) : nullptr, pixel};
}

// The tensor as kernels want it; an undefined one stays that.
at::Tensor rows_of(const OptionalTensor& tensor, int64_t* pixel) {
  return tensor ? to_nhwc(*tensor, pixel) : at::Tensor();
}

// ---- The convolution ----

using ThreeTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Whether y can be written into `out`, which may be some channels of a wider map, and how far apart its
// pixels lie.
int64_t check_out(const char* op, const at::Tensor& out, const at::Tensor& x, at::IntArrayRef shape) {
  check_like(op, "out", out, x);
  TORCH_CHECK(out.sizes() == shape, op, ": expected out of shape ", shape, ", got ", out.sizes());
  int64_t pixel = 0;
  TORCH_CHECK(out.numel() == 0 || to_nhwc(out, &pixel).is_same(out), op,
              ": expected out to be channels of a channels_last tensor, got strides ", out.strides());
  return pixel;
}

// y, into `out` where one is given, and its statistics.
ThreeTensors fused(const at::Tensor& out, const at::Tensor& x, const at::Tensor& weight,
                   const at::Tensor& packed, const OptionalTensor& bias, const OptionalTensor& in_scale,
                   const OptionalTensor& in_shift, bool in_relu, const OptionalTensor& residual,
                   bool out_relu, bool want_stats, const Geometry& geometry) {
  check_operands(x, weight, bias, geometry);
  check_prologue(in_scale, in_shift, x);
  Conv2dParams p = make_params(x, x.sizes(), weight.sizes(), geometry);
  if (out.defined()) p.y_pixel = check_out("conv2d_packed_", out, x, {p.N, p.K, p.P, p.Q});
  const at::Tensor y = out.defined() ? out : empty_nhwc({p.N, p.K, p.P, p.Q}, x.options(), true);
  if (residual) {
    check_like(kOp, "residual", *residual, x);
    check_same_shape(kOp, "residual", *residual, y);
  }
  at::Tensor mean = at::empty({want_stats ? p.K : 0}, vector_options(x)), variance = at::empty_like(mean);
  if (y.numel() == 0) return {y, mean.zero_(), variance.zero_()};

  const at::Tensor input = to_nhwc(x, &p.x_pixel), filter = dense_nhwc(weight);
  const at::Tensor added = rows_of(residual, &p.residual_pixel);
  const at::Tensor biases = dense_vector(bias), scale = dense_vector(in_scale),
                   shift = dense_vector(in_shift);
  p.x = data(input);
  p.weight = data(filter);
  p.packed = data_or_null(packed);
  p.bias = data_or_null(biases);
  p.in_scale = data_or_null(scale);
  p.in_shift = data_or_null(shift);
  p.in_relu = in_relu;
  p.residual = data_or_null(added);
  p.relu = out_relu;
  p.y = mutable_data(y);
  if (want_stats) p.mean = mutable_data(mean), p.variance = mutable_data(variance);
  const at::Tensor workspace = attach_workspace(Conv2dDirection::kForward, p, x);
  CUDA_CNN_LAUNCH(x, conv2d_forward, p);
  return {y, mean, variance};
}

ThreeTensors conv2d_fused(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias,
                          const OptionalTensor& in_scale, const OptionalTensor& in_shift, bool in_relu,
                          const OptionalTensor& residual, bool out_relu, bool want_stats,
                          at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                          int64_t groups) {
  return fused({}, x, weight, {}, bias, in_scale, in_shift, in_relu, residual, out_relu, want_stats,
               {stride, padding, dilation, groups, kOp});
}

#if !defined(CUDA_CNN_EMULATED)

Conv2dParams packing(const at::Tensor& weight, int64_t groups) {
  Conv2dParams p{};
  p.dtype = dtype_of(weight);
  p.K = weight.size(0), p.C = weight.size(1) * groups, p.R = weight.size(2), p.S = weight.size(3);
  p.groups = groups;
  return p;
}

// As 32-bit numbers, where pairs of bfloat16 are packed, too.
std::vector<int64_t> packed_shape(const Conv2dParams& p) {
  const int64_t columns = cpu::conv2d_panel_columns(p.dtype), depth = p.R * p.S * p.C / p.groups;
  return {p.groups * ceil_div(p.K / p.groups, columns),
          cpu::conv2d_packs_pairs(p) ? ceil_div(depth, 2) : depth, columns};
}

at::ScalarType packed_type(const at::Tensor& weight, const Conv2dParams& p) {
  return cpu::conv2d_packs_pairs(p) ? at::kInt : accumulator_of(weight);
}

// The weight in the order in which a CPU's kernels read it, for conv2d_packed: inference packs once.
at::Tensor conv2d_pack(const at::Tensor& weight, int64_t groups) {
  constexpr const char* kPack = "conv2d_pack";
  check_tensor(kPack, "weight", weight);
  check_dim(kPack, "weight", weight, 4);
  check_positive(kPack, "groups", groups);
  TORCH_CHECK(weight.size(0) % groups == 0, kPack, ": expected weight of a multiple of ", groups,
              " output channels, got ", weight.size(0));
  TORCH_CHECK(weight.is_cpu(), kPack, ": expected weight on the CPU, got it on ", weight.device());
  return packed_weight(weight, groups);
}

// The packed weight, checked; none where another instruction set has packed it, with other columns or another
// type.
at::Tensor usable(const at::Tensor& packed, const at::Tensor& x, const at::Tensor& weight, int64_t groups) {
  constexpr const char* kPacked = "conv2d_packed";
  const Conv2dParams p = packing(weight, groups);
  const std::vector<int64_t> shape = packed_shape(p);
  const at::ScalarType type = packed_type(weight, p);
  check_dim(kPacked, "packed", packed, 3);
  if (packed.size(2) != shape[2] ||
      (packed.scalar_type() != type && (packed.scalar_type() == at::kInt || type == at::kInt))) {
    return {};
  }
  TORCH_CHECK(x.is_cpu() && packed.is_cpu() && packed.scalar_type() == type && packed.is_contiguous() &&
                  packed.sizes() == at::IntArrayRef(shape),
              kPacked, ": expected conv2d_pack's result for a weight of shape ", weight.sizes(), ", got ",
              packed.scalar_type(), " of shape ", packed.sizes(), " on ", packed.device());
  return packed;
}

// conv2d_fused's y, without derivatives, with the weight also packed.
at::Tensor conv2d_packed(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& packed,
                         const OptionalTensor& bias, const OptionalTensor& in_scale,
                         const OptionalTensor& in_shift, bool in_relu, const OptionalTensor& residual,
                         bool out_relu, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, int64_t groups) {
  const Geometry geometry{stride, padding, dilation, groups, "conv2d_packed"};
  check_operands(x, weight, bias, geometry);
  return std::get<0>(fused({}, x, weight, usable(packed, x, weight, groups), bias, in_scale, in_shift,
                           in_relu, residual, out_relu, false, geometry));
}

// The same into channels of a tensor that is there.
void conv2d_packed_(at::Tensor& out, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& packed,
                    const OptionalTensor& bias, const OptionalTensor& in_scale,
                    const OptionalTensor& in_shift, bool in_relu, const OptionalTensor& residual,
                    bool out_relu, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                    int64_t groups) {
  const Geometry geometry{stride, padding, dilation, groups, "conv2d_packed_"};
  check_operands(x, weight, bias, geometry);
  check_tensor(geometry.op, "out", out);
  check_dim(geometry.op, "out", out, 4);
  fused(out, x, weight, usable(packed, x, weight, groups), bias, in_scale, in_shift, in_relu, residual,
        out_relu, false, geometry);
}

#endif

// What the statistics add to y's gradient as scale and shift of y: 2*dvar/M and dmean/M - mean*2*dvar/M.
std::tuple<at::Tensor, at::Tensor> through_statistics(const OptionalTensor& dmean, const OptionalTensor& dvar,
                                                      const at::Tensor& mean, int64_t count) {
  if (!mean.is_cpu()) {
    const at::Tensor scale = dvar ? *dvar * (2. / count) : at::zeros_like(mean), by_mean = mean * scale;
    return {scale, dmean ? *dmean / count - by_mean : -by_mean};
  }
  // One loop: several of torch's operators take longer than a small layer.
  const at::Tensor scale = at::empty_like(mean), shift = at::empty_like(mean);
  const at::Tensor means = mean.contiguous(), dmeans = dense_vector(dmean), dvars = dense_vector(dvar);
  AT_DISPATCH_FLOATING_TYPES(mean.scalar_type(), kOp, [&] {
    const auto* m = means.const_data_ptr<scalar_t>();
    const auto *dm = static_cast<const scalar_t*>(data_or_null(dmeans)),
               *dv = static_cast<const scalar_t*>(data_or_null(dvars));
    auto *to_scale = scale.mutable_data_ptr<scalar_t>(), *to_shift = shift.mutable_data_ptr<scalar_t>();
    for (int64_t c = 0; c < mean.numel(); ++c) {
      to_scale[c] = dv ? dv[c] * static_cast<scalar_t>(2. / count) : 0;
      to_shift[c] = (dm ? dm[c] / count : 0) - m[c] * to_scale[c];
    }
  });
  return {scale, shift};
}

// The gradient that reaches y before its ReLU: dy, what the statistics add to it, and the mask.
//   dy + dmean/M + 2*dvar/M * (y - mean)
at::Tensor effective_gradient(const at::Tensor& dy, const OptionalTensor& dmean, const OptionalTensor& dvar,
                              const OptionalTensor& y, const OptionalTensor& mean, bool out_relu) {
  if (!dmean && !dvar && !out_relu) return dy;
  TORCH_CHECK(y, kOp, ": expected output, which the ReLU and the statistics need, got none");
  check_like(kOp, "output", *y, dy);
  check_same_shape(kOp, "output", *y, dy);
  int64_t dy_pixel = 0, y_pixel = 0;
  const at::Tensor grad = to_nhwc(dy, &dy_pixel), output = to_nhwc(*y, &y_pixel);
  at::Tensor result = empty_nhwc(dy.sizes(), dy.options(), true);
  const DType dtype = dtype_of(dy);
  if (!dmean && !dvar) {
    ChannelMapGradParams p{dtype, pixels_of(dy), dy.size(1), view_of(grad, dy_pixel)};
    p.z = view_of(output, y_pixel);
    p.relu = true;
    p.dresidual = mutable_data(result);
    CUDA_CNN_LAUNCH(dy, channel_map_grad, p);
    return result;
  }
  TORCH_CHECK(mean, kOp, ": expected mean beside the statistics' gradients, got none");
  check_vector(kOp, "mean", mean, dy, dy.size(1));
  const auto [scale, shift] = through_statistics(dmean, dvar, *mean, pixels_of(dy));
  const MapEnd end = out_relu ? MapEnd::kWhereXIsPositive : MapEnd::kNone;
  const ChannelMapParams p{
      dtype,       pixels_of(dy), dy.size(1), view_of(output, y_pixel), view_of(grad, dy_pixel),
      data(scale), data(shift),   end,        mutable_data(result),     dy.size(1)};
  CUDA_CNN_LAUNCH(dy, channel_map, p);
  return result;
}

at::Tensor map_grad_workspace([[maybe_unused]] ChannelMapGradParams& p, const at::Tensor& any) {
  at::Tensor workspace;
#if defined(CUDA_CNN_WITH_CUDA) || defined(CUDA_CNN_EMULATED)
  workspace = at::empty({cuda::channel_map_grad_workspace_bytes(p)}, any.options().dtype(at::kByte));
  p.workspace = mutable_data(workspace);
#endif
  return workspace;
}

// In place: the gradient of what the convolution read becomes that of x, plus `added`; returns (sum of g*x,
// sum of g).
std::tuple<at::Tensor, at::Tensor> through_prologue(at::Tensor& dx, const at::Tensor& x,
                                                    const at::Tensor& scale, const at::Tensor& shift,
                                                    bool in_relu, const OptionalTensor& added) {
  at::Tensor sum_g = at::empty({x.size(1)}, vector_options(x)), sum_gx = at::empty_like(sum_g);
  int64_t x_pixel = 0, added_pixel = 0;
  const at::Tensor input = to_nhwc(x, &x_pixel), others = rows_of(added, &added_pixel);
  ChannelMapGradParams p{dtype_of(x), pixels_of(x), x.size(1), view_of(dx, x.size(1)),
                         view_of(input, x_pixel)};
  p.added = view_of(others, added_pixel);
  p.scale = data_or_null(scale);
  p.shift = data_or_null(shift);
  p.relu = in_relu;
  p.dx = mutable_data(dx);
  p.sum_g = mutable_data(sum_g);
  p.sum_gx = mutable_data(sum_gx);
  const at::Tensor workspace = map_grad_workspace(p, x);
  CUDA_CNN_LAUNCH(x, channel_map_grad, p);
  return {sum_gx, sum_g};
}

// wants: x, weight, bias, in_scale and in_shift, residual. What is not wanted has no elements. added: another
// gradient of x, which dx is to hold, too.
using SixTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
SixTensors conv2d_fused_backward(const at::Tensor& dy, const OptionalTensor& dmean,
                                 const OptionalTensor& dvar, const at::Tensor& x, const at::Tensor& weight,
                                 const OptionalTensor& in_scale, const OptionalTensor& in_shift, bool in_relu,
                                 const OptionalTensor& y, const OptionalTensor& mean, bool out_relu,
                                 at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                                 int64_t groups, std::array<bool, 5> wants, const OptionalTensor& added) {
  const Geometry geometry{stride, padding, dilation, groups, kOp};
  check_like(kOp, "weight", weight, dy);
  check_dim(kOp, "weight", weight, 4);
  check_grad(dy, x, "input", x.sizes(), weight.sizes(), geometry);
  check_prologue(in_scale, in_shift, x);
  check_vector(kOp, "grad_mean", dmean, dy, dy.size(1));
  check_vector(kOp, "grad_var", dvar, dy, dy.size(1));
  if (added) {
    check_like(kOp, "added", *added, x);
    check_same_shape(kOp, "added", *added, x);
  }

  const at::TensorOptions options = dy.options().memory_format(at::MemoryFormat::Contiguous);
  const at::Tensor none = at::empty({0}, options);
  const at::Tensor scale = dense_vector(in_scale), shift = dense_vector(in_shift);
  int64_t pixel = 0;
  const at::Tensor effective = effective_gradient(dy, dmean, dvar, y, mean, out_relu);
  const at::Tensor g = to_nhwc(effective, &pixel);  // once for all
  at::Tensor dx = none, dweight = none, dbias = none;
  at::Tensor dscale = at::empty({0}, vector_options(x)), dshift = at::empty({0}, vector_options(x));
  if (wants[1]) {
    const bool channels_last = is_channels_last(format_of(weight));
    dweight = weight_gradient(g, x, weight.sizes(), geometry, channels_last, {scale, shift, in_relu});
  }
  if (wants[2]) dbias = bias_gradient(g, kOp);
  if (wants[0] || wants[3]) {
    dx = input_gradient(g, weight, x.sizes(), geometry, true);
    if (scale.defined() || in_relu) {
      std::tie(dscale, dshift) = through_prologue(dx, x, scale, shift, in_relu, added);
    } else if (added) {
      dx.add_(*added);
    }
  }
  // A result may not be an argument: where y's gradient passes unchanged, the caller has it in hand.
  return {dx,     dweight, dbias,
          dscale, dshift,  wants[4] && !effective.is_same(dy) ? g : at::empty({0}, options)};
}

// ---- Passes over maps ----

void check_map(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift) {
  check_tensor(kMap, "input", x);
  check_dim(kMap, "input", x, 4);
  check_vector(kMap, "scale", scale, x, x.size(1));
  check_vector(kMap, "shift", shift, x, x.size(1));
}

void map_into(at::Tensor& z, int64_t z_pixel, const at::Tensor& x, const at::Tensor& scale,
              const at::Tensor& shift, const OptionalTensor& residual, bool relu) {
  if (residual) {
    check_like(kMap, "residual", *residual, x);
    check_same_shape(kMap, "residual", *residual, x);
  }
  if (x.numel() == 0) return;
  int64_t x_pixel = 0, residual_pixel = 0;
  const at::Tensor input = to_nhwc(x, &x_pixel), added = rows_of(residual, &residual_pixel);
  const at::Tensor scales = scale.contiguous(), shifts = shift.contiguous();
  const ChannelMapParams p{dtype_of(x),
                           pixels_of(x),
                           x.size(1),
                           view_of(input, x_pixel),
                           view_of(added, residual_pixel),
                           data(scales),
                           data(shifts),
                           relu ? MapEnd::kRelu : MapEnd::kNone,
                           mutable_data(z),
                           z_pixel};
  CUDA_CNN_LAUNCH(x, channel_map, p);
}

at::Tensor channel_map(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                       const OptionalTensor& residual, bool relu) {
  check_map(x, scale, shift);
  at::Tensor z = empty_nhwc(x.sizes(), x.options(), true);
  map_into(z, x.size(1), x, scale, shift, residual, relu);
  return z;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> channel_map_backward(
    const at::Tensor& dz, const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
    const OptionalTensor& z, bool relu, std::array<bool, 2> wants) {
  check_map(x, scale, shift);
  check_like(kMap, "grad_output", dz, x);
  check_same_shape(kMap, "grad_output", dz, x);
  if (z) {
    check_like(kMap, "output", *z, x);
    check_same_shape(kMap, "output", *z, x);
  }
  const auto wanted = [&](bool want) {
    return want ? empty_nhwc(x.sizes(), x.options(), true)
                : at::empty({0}, x.options().memory_format(at::MemoryFormat::Contiguous));
  };
  at::Tensor dx = wanted(wants[0]), dresidual = wanted(wants[1]);
  at::Tensor sum_g = at::empty({x.size(1)}, vector_options(x)), sum_gx = at::empty_like(sum_g);
  if (x.numel() == 0) return {dx, sum_gx.zero_(), sum_g.zero_(), dresidual};
  int64_t dz_pixel = 0, x_pixel = 0, z_pixel = 0;
  const at::Tensor grad = to_nhwc(dz, &dz_pixel), input = to_nhwc(x, &x_pixel), output = rows_of(z, &z_pixel);
  const at::Tensor scales = scale.contiguous(), shifts = shift.contiguous();
  ChannelMapGradParams p{dtype_of(x), pixels_of(x), x.size(1), view_of(grad, dz_pixel),
                         view_of(input, x_pixel)};
  p.z = view_of(output, z_pixel);
  p.scale = data(scales);
  p.shift = data(shifts);
  p.relu = relu;
  p.dx = wants[0] ? mutable_data(dx) : nullptr;
  p.dresidual = wants[1] ? mutable_data(dresidual) : nullptr;
  p.sum_g = mutable_data(sum_g);
  p.sum_gx = mutable_data(sum_gx);
  const at::Tensor workspace = map_grad_workspace(p, x);
  CUDA_CNN_LAUNCH(x, channel_map_grad, p);
  return {dx, sum_gx, sum_g, dresidual};
}

std::tuple<at::Tensor, at::Tensor> channel_statistics(const at::Tensor& x) {
  constexpr const char* kName = "channel_statistics";
  check_tensor(kName, "input", x);
  check_dim(kName, "input", x, 4);
  at::Tensor mean = at::empty({x.size(1)}, vector_options(x)), variance = at::empty_like(mean);
  if (x.numel() == 0) return {mean.zero_(), variance.zero_()};
  const int64_t one[] = {1, 1}, none[] = {0, 0};
  Conv2dParams p = make_params(x, x.sizes(), {x.size(1), x.size(1), 1, 1}, {one, none, one, 1, kName});
  const at::Tensor input = to_nhwc(x, &p.y_pixel);
  p.y = const_cast<void*>(data(input));  // of this launcher an argument
  p.mean = mutable_data(mean);
  p.variance = mutable_data(variance);
  const at::Tensor workspace = attach_workspace(Conv2dDirection::kWeightGrad, p, x);
  CUDA_CNN_LAUNCH(x, conv2d_statistics, p);
  return {mean, variance};
}

}  // namespace

#if !defined(CUDA_CNN_EMULATED)
at::Tensor packed_weight(const at::Tensor& weight, int64_t groups) {
  Conv2dParams p = packing(weight, groups);
  at::Tensor packed = empty_result(packed_shape(p), vector_options(weight).dtype(packed_type(weight, p)));
  if (packed.numel() == 0) return packed;
  p.nchw = weight.is_contiguous() && !cpu::conv2d_packs_pairs(p);
  const at::Tensor filter = p.nchw ? weight : dense_nhwc(weight);
  p.weight = data(filter);
  p.y = mutable_data(packed);
  cpu::conv2d_pack(p);
  return packed;
}
#endif

#define CUDA_CNN_GEOMETRY "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"

TORCH_LIBRARY_FRAGMENT(CUDA_CNN_LIBRARY, library) {
  define(
      library,
      "conv2d_fused(Tensor x, Tensor weight, Tensor? bias, Tensor? in_scale, Tensor? in_shift, bool in_relu, "
      "Tensor? residual, bool out_relu, bool want_stats, " CUDA_CNN_GEOMETRY
      ") -> (Tensor y, Tensor mean, Tensor var)",
      &conv2d_fused);
  define(library,
         "conv2d_fused_backward(Tensor dy, Tensor? dmean, Tensor? dvar, Tensor x, Tensor weight, "
         "Tensor? in_scale, Tensor? in_shift, bool in_relu, Tensor? y, Tensor? mean, bool "
         "out_relu, " CUDA_CNN_GEOMETRY
         ", bool[5] wants, Tensor? added=None) -> "
         "(Tensor dx, Tensor dweight, Tensor dbias, Tensor dscale, Tensor dshift, Tensor dresidual)",
         &conv2d_fused_backward);
  define(library, "channel_map(Tensor x, Tensor scale, Tensor shift, Tensor? residual, bool relu) -> Tensor",
         &channel_map);
  define(library,
         "channel_map_backward(Tensor dz, Tensor x, Tensor scale, Tensor shift, Tensor? z, bool relu, "
         "bool[2] wants) -> (Tensor dx, Tensor dscale, Tensor dshift, Tensor dresidual)",
         &channel_map_backward);
  define(library, "channel_statistics(Tensor x) -> (Tensor mean, Tensor var)", &channel_statistics);
#if !defined(CUDA_CNN_EMULATED)
  define(library, "conv2d_pack(Tensor weight, int groups) -> Tensor", &conv2d_pack);
  define(library,
         "conv2d_packed(Tensor x, Tensor weight, Tensor packed, Tensor? bias, Tensor? in_scale, "
         "Tensor? in_shift, bool in_relu, Tensor? residual, bool out_relu, " CUDA_CNN_GEOMETRY ") -> Tensor",
         &conv2d_packed);
  define(library,
         "conv2d_packed_(Tensor(a!) out, Tensor x, Tensor weight, Tensor packed, Tensor? bias, "
         "Tensor? in_scale, Tensor? in_shift, bool in_relu, Tensor? residual, bool "
         "out_relu, " CUDA_CNN_GEOMETRY ") -> ()",
         &conv2d_packed_);
#endif
}

#undef CUDA_CNN_GEOMETRY

}  // namespace cuda_cnn::ops
