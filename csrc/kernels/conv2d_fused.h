// The passes over NHWC maps that stand beside a fused convolution's kernels. Vectors hold a value a channel.
//
//   map       z = f(scale[c] * x + shift[c] + residual), f: the identity, max(., 0), or zero where x <= 0
//   gradient  g = dz, or 0 where z <= 0;  dx = scale[c] * g + added,  dresidual = g,
//             sum_g[c] = sum of g over the pixels,  sum_gx[c] = sum of g * x
//
// A map's element is normalised and rectified here by the same arithmetic as on a convolution's load, so the
// gradient finds the ReLU's mask again from x.
#pragma once

#include "cpu/isa.h"
#include "kernels/host_device.h"

namespace cuda_cnn {

enum class MapEnd : int32_t { kNone, kRelu, kWhereXIsPositive };

// A map in memory: pixels `pixel` elements apart, channels contiguous. data may be null.
struct PixelRowsView {
  const void* data;
  int64_t pixel;
};

struct ChannelMapParams {
  DType dtype;  // of the maps; vectors are of its accumulation type
  int64_t pixels, channels;
  PixelRowsView x, residual;
  const void *scale, *shift;
  MapEnd end;
  void* z;  // pixels z_pixel apart; may be x or residual
  int64_t z_pixel;
};

struct ChannelMapGradParams {
  DType dtype;
  int64_t pixels, channels;
  PixelRowsView dz, x;
  PixelRowsView z;            // null: z = scale * x + shift
  PixelRowsView added;        // null: nothing
  const void *scale, *shift;  // null: 1 and 0
  bool relu;
  void* dx;              // dense, may be dz where that is dense; null: not wanted
  void* dresidual;       // likewise
  void *sum_g, *sum_gx;  // null: not wanted; both or none
  void* workspace;       // CUDA: channel_map_grad_workspace_bytes, from torch's allocator
};

// Of one element, or of a vector of them.
template <class V>
HOST_DEVICE V channel_map_end(V value, V x, MapEnd end) {
  if (end == MapEnd::kRelu) return value < 0 ? V{} : value;
  if (end == MapEnd::kWhereXIsPositive) return x <= 0 ? V{} : value;
  return value;
}

namespace cuda {
int64_t channel_map_grad_workspace_bytes(const ChannelMapGradParams& params);
void channel_map(const ChannelMapParams& params, Stream stream);
void channel_map_grad(const ChannelMapGradParams& params, Stream stream);
}  // namespace cuda

}  // namespace cuda_cnn

CUDA_CNN_CPU_KERNEL(channel_map, ChannelMapParams)
CUDA_CNN_CPU_KERNEL(channel_map_grad, ChannelMapGradParams)
