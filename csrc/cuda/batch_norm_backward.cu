// Batch normalisation, backward; formulas: kernels/batch_norm.h. One pass that reads for the sums of parts,
// one kernel on channels, one pass that writes. Where no residual was added the ReLU's mask is computed again
// from x.
#include "cuda/batch_norm.cuh"

namespace cuda_cnn::cuda {
namespace batch_norm {
namespace {

template <class A>
__global__ void __launch_bounds__(kThreads)
    prepare_backward(const __grid_constant__ BatchNormBackwardParams p, Workspace<A> workspace) {
  const int64_t c = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (c >= p.shape.channels) return;
  const double mean = p.mean.at(c, 0), var = p.var.at(c, 1);
  store_map(workspace, c, batch_norm_map<A>(mean, var, p.weight.at(c, 1), p.bias.at(c, 0), p.eps));
}

template <class A>
__global__ void __launch_bounds__(kJoinThreads)
    finish_backward(const __grid_constant__ BatchNormBackwardParams p, int64_t parts,
                    Workspace<A> workspace) {
  auto& shared = shared_storage<JoinShared<Sums>>();
  const int64_t c = join_channel(), channels = p.shape.channels;
  const Sums sums = join_parts(shared, c < channels, parts, [&](int64_t part) {
    const double* pair = workspace.partials + (part * channels + c) * 2;
    return Sums{pair[0], pair[1]};
  });
  if (threadIdx.x >= kJoinChannels || c >= channels) return;
  const auto gradient = batch_norm_gradient<A>(sums.first, sums.second, p.mean.at(c, 0), p.var.at(c, 1),
                                               p.weight.at(c, 1), p.eps, p.shape.per_channel(), p.training);
  workspace.grad_scale[c] = gradient.scale;
  workspace.grad_slope[c] = gradient.slope;
  workspace.grad_offset[c] = gradient.offset;
  p.dweight.set(c, gradient.dweight);
  p.dbias.set(c, gradient.dbias);
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 3)
    apply_backward(const __grid_constant__ BatchNormBackwardParams p, int64_t packs,
                   Workspace<Accumulator<T>> workspace) {
  using A = Accumulator<T>;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= packs) return;
  const int64_t channel = channel_of<kPack>(p.shape, i);
  const bool rows = p.shape.channels_last;
  A values[kPack], grads[kPack], mean[kPack];
  load_widened<kPack, T>(values, static_cast<const T*>(p.x) + i * kPack);
  load_widened<kPack, T>(grads, static_cast<const T*>(p.dy) + i * kPack);
  load_channels(mean, workspace.mean, channel, rows);
  if (p.relu) {
    A outputs[kPack], scale[kPack], shift[kPack];
    if (p.y) load_widened<kPack, T>(outputs, static_cast<const T*>(p.y) + i * kPack);
    load_channels(scale, workspace.scale, channel, rows);
    load_channels(shift, workspace.shift, channel, rows);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      const A z = p.y ? outputs[e] : apply_map(values[e], mean[e], scale[e], shift[e]);
      if (z <= 0) grads[e] = 0;
    }
  }
  if (p.dresidual) store_narrowed<kPack, T>(static_cast<T*>(p.dresidual) + i * kPack, grads);
  if (!p.dx) return;
  A scale[kPack], slope[kPack], offset[kPack];
  load_channels(scale, workspace.grad_scale, channel, rows);
  load_channels(slope, workspace.grad_slope, channel, rows);
  load_channels(offset, workspace.grad_offset, channel, rows);
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const A from_statistics = p.training ? fma(slope[e], values[e] - mean[e], offset[e]) : A(0);
    values[e] = fma(scale[e], grads[e], from_statistics);
  }
  store_narrowed<kPack, T>(static_cast<T*>(p.dx) + i * kPack, values);
}

template <class T, int kPack>
void backward(const BatchNormBackwardParams& p, Stream stream) {
  using A = Accumulator<T>;
  const BatchNormShape& s = p.shape;
  const Workspace<A> workspace(p.workspace, s.channels);
  const Terms<T> terms{static_cast<const T*>(p.x), static_cast<const T*>(p.dy), static_cast<const T*>(p.y),
                       p.relu};
  launch(prepare_backward<A>, ceil_div(s.channels, kThreads), kThreads, 0, stream, p, workspace);
  reduce<T, kPack, true>(s, terms, workspace, stream);
  launch(finish_backward<A>, ceil_div(s.channels, kJoinChannels), kJoinThreads, sizeof(JoinShared<Sums>),
         stream, p, parts_of(s), workspace);
  if (!p.dx && !p.dresidual) return;
  const int64_t packs = s.per_channel() * s.channels / kPack;
  launch(apply_backward<T, kPack>, ceil_div(packs, kThreads), kThreads, 0, stream, p, packs, workspace);
}

}  // namespace
}  // namespace batch_norm

void batch_norm_backward(const BatchNormBackwardParams& p, Stream stream) {
  if (p.shape.per_channel() * p.shape.channels == 0) return;
  dispatch_dtype(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    batch_norm::fits_packs(p.shape, p.dy, p.x, p.y, p.dx, p.dresidual)
        ? batch_norm::backward<T, kPackSize<T>>(p, stream)
        : batch_norm::backward<T, 1>(p, stream);
  });
}

}  // namespace cuda_cnn::cuda
