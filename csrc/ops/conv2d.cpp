#include "ops/conv2d.h"

#include <ATen/Context.h>

#include "ops/allocate.h"
#include "ops/dispatch.h"
#include "ops/layout.h"

#if defined(CUDA_CNN_WITH_CUDA) || defined(CUDA_CNN_EMULATED)
#include "cuda/conv2d/plan.h"
#endif

namespace cuda_cnn::ops {
namespace {

constexpr const char* kOp = "conv2d";

std::atomic<int>& forced_algorithm() {
  static std::atomic<int> algorithm{static_cast<int>(Conv2dAlgorithm::kAuto)};
  return algorithm;
}
std::atomic<bool>& winograd_allowed() {
  static std::atomic<bool> allowed{true};
  return allowed;
}

// A contiguous CPU tensor's values in the other of NCHW and NHWC; elsewhere false, and torch copies.
bool transpose_layout(const at::Tensor& from, const at::Tensor& to, int64_t rows, int64_t columns) {
#if !defined(CUDA_CNN_EMULATED)
  if (!from.is_cuda()) {
    cpu::conv2d_transpose({dtype_of(from), from.size(0), rows, columns, data(from), mutable_data(to)});
    return true;
  }
#endif
  return false;
}

at::TensorOptions contiguous(const at::Tensor& like) {
  return like.options().memory_format(at::MemoryFormat::Contiguous);
}

// Whether a kernel reads these NCHW tensors and writes NCHW: else they are made NHWC, and the result is made
// NCHW again. A gradient's bits, and so the choice, are to be the same for every layout of dy.
bool stays_nchw(Conv2dDirection direction, Conv2dParams& p, bool channels_last,
                std::initializer_list<at::Tensor> operands) {
#if !defined(CUDA_CNN_EMULATED)
  p.nchw = !channels_last;
  for (const at::Tensor& t : operands) p.nchw = p.nchw && t.is_cpu() && t.is_contiguous();
  p.nchw = p.nchw && cpu::conv2d_choose(direction, p) == Conv2dAlgorithm::kGemmNchw;
#endif
  return p.nchw;
}

// For forward or the input gradient on NHWC: p.weight and, of forward, p.packed. What they point to is in the
// tensors that are returned.
std::pair<at::Tensor, at::Tensor> attach_weight([[maybe_unused]] Conv2dDirection direction, Conv2dParams& p,
                                                const at::Tensor& weight) {
  at::Tensor filter = weight, packed;
#if !defined(CUDA_CNN_EMULATED)
  const bool planes = !p.nchw && weight.is_cpu() && weight.is_contiguous();
  const auto use = planes ? cpu::conv2d_planes(direction, p) : cpu::Conv2dPlanes::kConvert;
  p.weight_planes = use == cpu::Conv2dPlanes::kKeep;
  if (use == cpu::Conv2dPlanes::kPack) packed = packed_weight(weight, p.groups);
  if (use == cpu::Conv2dPlanes::kConvert && !p.nchw)
#endif
    filter = dense_nhwc(weight);
  p.weight = data(filter);
  p.packed = packed.defined() ? data(packed) : nullptr;
  return {filter, packed};
}

}  // namespace

void check_geometry(const Geometry& g) {
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(g.stride[axis] > 0, g.op, ": expected stride > 0, got ", g.stride);
    TORCH_CHECK(g.padding[axis] >= 0, g.op, ": expected padding >= 0, got ", g.padding);
    TORCH_CHECK(g.dilation[axis] > 0, g.op, ": expected dilation > 0, got ", g.dilation);
    // Far beyond any image, and small enough that no index below can overflow.
    TORCH_CHECK(std::max({g.stride[axis], g.padding[axis], g.dilation[axis]}) < (int64_t{1} << 31), g.op,
                ": expected stride, padding and dilation below 2^31, got ", g.stride, ", ", g.padding, ", ",
                g.dilation);
  }
  TORCH_CHECK(g.groups > 0, g.op, ": expected groups > 0, got ", g.groups);
}

void check_shapes(at::IntArrayRef x, at::IntArrayRef weight, const Geometry& g) {
  TORCH_CHECK(weight[2] > 0 && weight[3] > 0, g.op,
              ": expected a kernel of at least 1 x 1, got weight of shape ", weight);
  TORCH_CHECK(weight[2] < (int64_t{1} << 31) && weight[3] < (int64_t{1} << 31), g.op,
              ": expected a kernel below 2^31, got weight of shape ", weight);
  TORCH_CHECK(weight[0] >= g.groups && weight[0] % g.groups == 0, g.op, ": expected output channels in ",
              g.groups, " groups of equal size, got weight of shape ", weight);
  TORCH_CHECK(x[1] == weight[1] * g.groups, g.op, ": expected input of ", weight[1] * g.groups,
              " channels (weight of shape ", weight, ", ", g.groups, " groups), got ", x[1], " (shape ", x,
              ")");
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t room = x[2 + axis] + 2 * g.padding[axis],
                  reach = g.dilation[axis] * (weight[2 + axis] - 1) + 1;
    TORCH_CHECK(room >= reach, g.op, ": expected a kernel no larger than the padded input, got ", reach,
                " against ", room, " (input of shape ", x, ", weight of shape ", weight, ")");
  }
}

void check_operands(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const Geometry& g) {
  check_tensor(g.op, "input", x);
  check_dim(g.op, "input", x, 4);
  check_like(g.op, "weight", weight, x);
  check_dim(g.op, "weight", weight, 4);
  check_geometry(g);
  check_shapes(x.sizes(), weight.sizes(), g);
  if (!bias) return;
  check_like(g.op, "bias", *bias, x);
  TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), g.op, ": expected bias of shape [",
              weight.size(0), "], got ", bias->sizes());
}

void check_grad(const at::Tensor& dy, const at::Tensor& other, const char* name, at::IntArrayRef x,
                at::IntArrayRef weight, const Geometry& g) {
  check_tensor(g.op, "grad_output", dy);
  check_dim(g.op, "grad_output", dy, 4);
  check_like(g.op, name, other, dy);
  check_dim(g.op, name, other, 4);
  TORCH_CHECK(x.size() == 4 && weight.size() == 4, g.op, ": expected sizes of 4 dimensions, got ", x, " and ",
              weight);
  check_geometry(g);
  check_shapes(x, weight, g);
  const Conv2dParams p = make_params(dy, x, weight, g);
  const int64_t expected[] = {p.N, p.K, p.P, p.Q};
  TORCH_CHECK(dy.sizes() == at::IntArrayRef(expected), g.op, ": expected grad_output of shape ",
              at::IntArrayRef(expected), ", got ", dy.sizes());
}

Conv2dParams make_params(const at::Tensor& any, at::IntArrayRef x, at::IntArrayRef weight,
                         const Geometry& g) {
  Conv2dParams p{};
  p.dtype = dtype_of(any);
  p.N = x[0], p.C = x[1], p.H = x[2], p.W = x[3];
  p.K = weight[0], p.R = weight[2], p.S = weight[3];
  p.stride_h = g.stride[0], p.stride_w = g.stride[1];
  p.pad_h = g.padding[0], p.pad_w = g.padding[1];
  p.dilation_h = g.dilation[0], p.dilation_w = g.dilation[1];
  p.groups = g.groups;
  p.P = conv2d_output_extent(p.H, 2 * p.pad_h, p.R, p.stride_h, p.dilation_h);
  p.Q = conv2d_output_extent(p.W, 2 * p.pad_w, p.S, p.stride_w, p.dilation_w);
  p.x_pixel = p.C;
  p.y_pixel = p.K;
  p.algorithm = static_cast<Conv2dAlgorithm>(forced_algorithm().load());
  p.allow_winograd = winograd_allowed().load();
  p.allow_tf32 = uses_cuda_kernels(any) && at::globalContext().allowTF32CuDNN();
  return p;
}

at::Tensor dense_nhwc(const at::Tensor& t) {
  if (t.is_contiguous(at::MemoryFormat::ChannelsLast)) return t;
  if (!t.is_contiguous()) return t.contiguous(at::MemoryFormat::ChannelsLast);
  at::Tensor out = empty_result(t.sizes(), t.options().memory_format(at::MemoryFormat::ChannelsLast));
  if (!transpose_layout(t, out, t.size(1), t.size(2) * t.size(3))) out.copy_(t);
  return out;
}

at::Tensor to_nhwc(const at::Tensor& t, int64_t* pixel) {
  *pixel = t.size(1);
  const auto s = t.strides();
  if (t.numel() > 0 && s[1] == 1 && s[3] >= t.size(1) && s[2] == t.size(3) * s[3] &&
      s[0] == t.size(2) * s[2]) {
    *pixel = s[3];
    return t;
  }
  return dense_nhwc(t);
}

at::Tensor empty_nhwc(at::IntArrayRef size, const at::TensorOptions& options, bool channels_last) {
  const bool both = size[0] * size[1] == 0 || size[1] == 1 || size[2] * size[3] <= 1;
  return empty_result(size, options.memory_format(channels_last || !both ? at::MemoryFormat::ChannelsLast
                                                                         : at::MemoryFormat::Contiguous));
}

at::Tensor in_format(const at::Tensor& nhwc, bool channels_last) {
  if (channels_last || nhwc.is_contiguous()) return nhwc;
  at::Tensor out = empty_result(nhwc.sizes(), nhwc.options());
  if (!transpose_layout(nhwc, out, nhwc.size(2) * nhwc.size(3), nhwc.size(1))) out.copy_(nhwc);
  return out;
}

#if defined(CUDA_CNN_WITH_CUDA) || defined(CUDA_CNN_EMULATED)
at::Tensor attach_workspace(Conv2dDirection direction, Conv2dParams& p, const at::Tensor& any) {
  const int64_t bytes = cuda::conv2d_workspace_bytes(direction, p);
  at::Tensor workspace = at::empty({bytes}, any.options().dtype(at::kByte));
  p.workspace = workspace.mutable_data_ptr();
  return workspace;
}
#else
at::Tensor attach_workspace(Conv2dDirection, Conv2dParams&, const at::Tensor&) { return {}; }
#endif

at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef x,
                          const Geometry& geometry, bool channels_last) {
  Conv2dParams p = make_params(dy, x, weight.sizes(), geometry);
  const bool nchw = stays_nchw(Conv2dDirection::kInputGrad, p, channels_last, {weight});
  at::Tensor dx = nchw ? empty_result(x, contiguous(dy)) : empty_nhwc(x, dy.options(), channels_last);
  if (dx.numel() == 0) return in_format(dx, channels_last);
  const at::Tensor grad = nchw ? dy.contiguous() : to_nhwc(dy, &p.y_pixel);
  const auto filter = attach_weight(Conv2dDirection::kInputGrad, p, weight);
  p.dy = data(grad);
  p.dx = mutable_data(dx);
  const at::Tensor workspace = attach_workspace(Conv2dDirection::kInputGrad, p, dy);
  CUDA_CNN_LAUNCH(dy, conv2d_input_grad, p);
  return in_format(dx, channels_last);
}

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef weight,
                           const Geometry& geometry, bool channels_last, const InputMap& map) {
  Conv2dParams p = make_params(dy, x.sizes(), weight, geometry);
  p.in_relu = map.relu;
  p.in_scale = map.scale.defined() ? data(map.scale) : nullptr;
  p.in_shift = map.shift.defined() ? data(map.shift) : nullptr;
  const bool nchw = stays_nchw(Conv2dDirection::kWeightGrad, p, channels_last, {x});
#if !defined(CUDA_CNN_EMULATED)
  p.weight_planes = !nchw && !channels_last && dy.is_cpu() &&
                    cpu::conv2d_planes(Conv2dDirection::kWeightGrad, p) == cpu::Conv2dPlanes::kKeep;
#endif
  at::Tensor dweight = nchw || p.weight_planes ? empty_result(weight, contiguous(dy))
                                               : empty_nhwc(weight, dy.options(), channels_last);
  if (dweight.numel() == 0) return in_format(dweight, channels_last);
  const at::Tensor grad = nchw ? dy.contiguous() : to_nhwc(dy, &p.y_pixel),
                   input = nchw ? x : to_nhwc(x, &p.x_pixel);
  p.dy = data(grad);
  p.x = data(input);
  p.dweight = mutable_data(dweight);
  const at::Tensor workspace = attach_workspace(Conv2dDirection::kWeightGrad, p, dy);
  CUDA_CNN_LAUNCH(dy, conv2d_weight_grad, p);
  return in_format(dweight, channels_last);
}

at::Tensor bias_gradient(const at::Tensor& dy, const char* op) {
  at::Tensor dbias = at::empty({dy.size(1)}, dy.options());
  if (dbias.numel() == 0) return dbias;
  const int64_t one[] = {1, 1}, none[] = {0, 0};
  Conv2dParams p = make_params(dy, dy.sizes(), {dy.size(1), dy.size(1), 1, 1}, {one, none, one, 1, op});
  const at::Tensor grad = to_nhwc(dy, &p.y_pixel);
  p.dy = data(grad);
  p.dbias = mutable_data(dbias);
  const at::Tensor workspace = attach_workspace(Conv2dDirection::kWeightGrad, p, dy);
  CUDA_CNN_LAUNCH(dy, conv2d_weight_grad, p);
  return dbias;
}

namespace {

at::Tensor conv2d(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  const Geometry geometry{stride, padding, dilation, groups};
  check_operands(x, weight, bias, geometry);
  Conv2dParams p = make_params(x, x.sizes(), weight.sizes(), geometry);
  const bool channels_last =
      x.numel() > 0 && (is_channels_last(format_of(x)) || is_channels_last(format_of(weight)));
  const int64_t shape[] = {p.N, p.K, p.P, p.Q};
  const bool nchw = stays_nchw(Conv2dDirection::kForward, p, channels_last, {x, weight});
  at::Tensor y = nchw ? empty_result(shape, contiguous(x)) : empty_nhwc(shape, x.options(), channels_last);
  if (y.numel() == 0) return in_format(y, channels_last);
  const at::Tensor input = nchw ? x : to_nhwc(x, &p.x_pixel);
  const auto filter = attach_weight(Conv2dDirection::kForward, p, weight);
  const at::Tensor shift = bias ? bias->contiguous() : at::Tensor();
  p.x = data(input);
  p.bias = bias ? data(shift) : nullptr;
  p.y = mutable_data(y);
  const at::Tensor workspace = attach_workspace(Conv2dDirection::kForward, p, x);
  CUDA_CNN_LAUNCH(x, conv2d_forward, p);
  return in_format(y, channels_last);
}

at::Tensor conv2d_input_grad(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef input_size,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                             int64_t groups, bool channels_last) {
  const Geometry geometry{stride, padding, dilation, groups};
  check_grad(dy, weight, "weight", input_size, weight.sizes(), geometry);
  return input_gradient(dy, weight, input_size, geometry, channels_last);
}

at::Tensor conv2d_weight_grad(const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef weight_size,
                              at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                              int64_t groups, bool channels_last) {
  const Geometry geometry{stride, padding, dilation, groups};
  check_grad(dy, x, "input", x.sizes(), weight_size, geometry);
  return weight_gradient(dy, x, weight_size, geometry, channels_last);
}

at::Tensor conv2d_bias_grad(const at::Tensor& dy) {
  check_tensor(kOp, "grad_output", dy);
  check_dim(kOp, "grad_output", dy, 4);
  return bias_gradient(dy, kOp);
}

// For "forward", "input_grad" or "weight_grad": which, and a call with these sizes, dense NHWC, with or
// without the fused form's map on the load.
std::pair<Conv2dDirection, Conv2dParams> named_call(c10::string_view direction, at::IntArrayRef x,
                                                    at::IntArrayRef weight, const Geometry& geometry,
                                                    at::ScalarType dtype, bool mapped) {
  TORCH_CHECK(x.size() == 4 && weight.size() == 4, kOp, ": expected sizes of 4 dimensions, got ", x, " and ",
              weight);
  check_geometry(geometry);
  check_shapes(x, weight, geometry);
  const Conv2dDirection which = direction == "forward"      ? Conv2dDirection::kForward
                                : direction == "input_grad" ? Conv2dDirection::kInputGrad
                                                            : Conv2dDirection::kWeightGrad;
  Conv2dParams p = make_params(at::empty({0}, dtype), x, weight, geometry);
  p.in_relu = mapped;
  return {which, p};
}

// The name of the algorithm that a CPU would take.
std::string conv2d_algorithm(c10::string_view direction, at::IntArrayRef input_size,
                             at::IntArrayRef weight_size, at::IntArrayRef stride, at::IntArrayRef padding,
                             at::IntArrayRef dilation, int64_t groups, at::ScalarType dtype, bool mapped,
                             bool nchw) {
  auto [which, p] =
      named_call(direction, input_size, weight_size, {stride, padding, dilation, groups}, dtype, mapped);
  p.nchw = nchw;
  return cpu::conv2d_algorithm_name(cpu::conv2d_choose(which, p));
}

#if defined(CUDA_CNN_WITH_CUDA) || defined(CUDA_CNN_EMULATED)
// The kernel that a GPU would take, in words.
std::string conv2d_cuda_kernel(c10::string_view direction, at::IntArrayRef input_size,
                               at::IntArrayRef weight_size, at::IntArrayRef stride, at::IntArrayRef padding,
                               at::IntArrayRef dilation, int64_t groups, at::ScalarType dtype, bool mapped) {
  using namespace cuda::conv2d;
  auto [which, p] =
      named_call(direction, input_size, weight_size, {stride, padding, dilation, groups}, dtype, mapped);
  p.allow_tf32 = at::globalContext().allowTF32CuDNN();
  p.dweight = &p;  // wanted
  return describe(plan(which, p, Forced::from_environment()));
}
#endif

// Settings of this process, for cuda_cnn.backends. An unknown name is refused with false.
bool conv2d_set_algorithm(c10::string_view name) {
  for (int i = 0; i <= static_cast<int>(Conv2dAlgorithm::kReference); ++i) {
    if (name == cpu::conv2d_algorithm_name(static_cast<Conv2dAlgorithm>(i))) {
      forced_algorithm() = i;
      return true;
    }
  }
  return false;
}

void conv2d_allow_winograd(bool allowed) { winograd_allowed() = allowed; }

}  // namespace

#define CUDA_CNN_GEOMETRY "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"

TORCH_LIBRARY_FRAGMENT(CUDA_CNN_LIBRARY, library) {
  define(library, "conv2d(Tensor x, Tensor weight, Tensor? bias, " CUDA_CNN_GEOMETRY ") -> Tensor", &conv2d);
  define(library,
         "conv2d_input_grad(Tensor dy, Tensor weight, SymInt[] input_size, " CUDA_CNN_GEOMETRY
         ", bool channels_last) -> Tensor",
         &conv2d_input_grad);
  define(library,
         "conv2d_weight_grad(Tensor dy, Tensor x, SymInt[] weight_size, " CUDA_CNN_GEOMETRY
         ", bool channels_last) -> Tensor",
         &conv2d_weight_grad);
  define(library, "conv2d_bias_grad(Tensor dy) -> Tensor", &conv2d_bias_grad);
#if defined(CUDA_CNN_WITH_CUDA) || defined(CUDA_CNN_EMULATED)
  library.def(
      "conv2d_cuda_kernel(str direction, int[] input_size, int[] weight_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, ScalarType dtype, bool mapped=False) -> str",
      &conv2d_cuda_kernel);
#endif
#if !defined(CUDA_CNN_EMULATED)
  library.def(
      "conv2d_algorithm(str direction, int[] input_size, int[] weight_size, int[2] stride, int[2] padding, "
      "int[2] dilation, int groups, ScalarType dtype, bool mapped=False, bool nchw=False) -> str",
      &conv2d_algorithm);
  library.def("conv2d_set_algorithm(str name) -> bool", &conv2d_set_algorithm);
  library.def("conv2d_allow_winograd(bool allowed) -> ()", &conv2d_allow_winograd);
#endif
}

#undef CUDA_CNN_GEOMETRY

}  // namespace cuda_cnn::ops
