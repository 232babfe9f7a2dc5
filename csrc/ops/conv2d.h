// What the operators of convolution share: checks, sizes, layouts.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernels/conv2d.h"

namespace cuda_cnn::ops {

struct Geometry {
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  const char* op = "conv2d";  // for messages
};

void check_geometry(const Geometry& geometry);
void check_shapes(at::IntArrayRef x, at::IntArrayRef weight, const Geometry& geometry);

// Everything about a forward call's tensors.
void check_operands(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                    const Geometry& geometry);

// Everything about a gradient's: dy, and the operand `name` that is multiplied with it; the sizes of both
// operands.
void check_grad(const at::Tensor& dy, const at::Tensor& other, const char* name, at::IntArrayRef x,
                at::IntArrayRef weight, const Geometry& geometry);

// The sizes of a convolution and where its tensors lie, but for the pointers.
Conv2dParams make_params(const at::Tensor& any, at::IntArrayRef x, at::IntArrayRef weight,
                         const Geometry& geometry);

// CUDA: the kernels' scratch memory; to be kept until the launch.
at::Tensor attach_workspace(Conv2dDirection direction, Conv2dParams& params, const at::Tensor& any);

// CPU: the weight in the order in which the kernels read it, as conv2d_pack lays it out.
at::Tensor packed_weight(const at::Tensor& weight, int64_t groups);

at::Tensor dense_nhwc(const at::Tensor& tensor);

// The tensor as the kernels want it: channels contiguous. A slice of channels stays where it is.
at::Tensor to_nhwc(const at::Tensor& tensor, int64_t* pixel);

// What a kernel writes, NHWC in memory; with one channel, one pixel or nothing in it, contiguous is that too.
at::Tensor empty_nhwc(at::IntArrayRef size, const at::TensorOptions& options, bool channels_last);

at::Tensor in_format(const at::Tensor& nhwc, bool channels_last);

// ---- The gradients, of arguments that are checked ----

// The map on a fused convolution's load: vectors of its accumulation type, or undefined.
struct InputMap {
  at::Tensor scale, shift;
  bool relu = false;
};

at::Tensor input_gradient(const at::Tensor& dy, const at::Tensor& weight, at::IntArrayRef x,
                          const Geometry& geometry, bool channels_last);
at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, at::IntArrayRef weight,
                           const Geometry& geometry, bool channels_last, const InputMap& map = {});
// The sum of dy over its pixels.
at::Tensor bias_gradient(const at::Tensor& dy, const char* op);

}  // namespace cuda_cnn::ops
