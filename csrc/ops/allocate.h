// The memory of results.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

namespace cuda_cnn::ops {

// at::empty for a result of a kernel; a CPU's large ones come from memory that is kept from one to the next.
at::Tensor empty_result(at::IntArrayRef shape, const at::TensorOptions& options);

// Gives the system back what no result lies in.
void empty_cache();

}  // namespace cuda_cnn::ops
