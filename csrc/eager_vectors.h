// Vectors with a value a channel: each of these is one loop where it would be a dozen of torch's operators,
// which take longer than a small layer's kernel.
#pragma once

#include "autograd/operators.h"

namespace cuda_cnn::eager {

// A running statistic moved towards a batch's: running <- running * (1 - momentum) + value * momentum *
// factor.
void follow(const at::Tensor& running, const at::Tensor& value, double momentum, double factor);

}  // namespace cuda_cnn::eager
