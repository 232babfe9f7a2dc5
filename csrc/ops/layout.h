// Memory formats: which one a result has, and how a kernel sees a tensor in it.
#pragma once

#include <ATen/core/Tensor.h>

namespace cuda_cnn::ops {

// The format that torch's operators would give a result computed from this input. Rank 3 has no
// channels_last.
inline at::MemoryFormat format_of(const at::Tensor& input) { return input.suggest_memory_format(); }

inline bool is_channels_last(at::MemoryFormat format) {
  return format == at::MemoryFormat::ChannelsLast || format == at::MemoryFormat::ChannelsLast3d;
}

}  // namespace cuda_cnn::ops
