// Whether the binary holds code that a GPU can run.
#pragma once

#include <string>

namespace cuda_cnn::cuda {

// Throws std::runtime_error where the current GPU can run none of the binary's code; `held` says what that
// is. A thread asks each GPU once, ahead of its first launch, without waiting for it: a graph may be
// captured.
void require_code_for_gpu(const std::string& held);

}  // namespace cuda_cnn::cuda
