// Batch normalisation, forward; formulas: kernels/batch_norm.h. The sums of parts, one kernel on channels,
// one pass that applies scale, shift, residual and ReLU.
#include "cuda/batch_norm.cuh"

namespace cuda_cnn::cuda {
namespace batch_norm {
namespace {

template <class A>
__global__ void __launch_bounds__(kJoinThreads)
    finish_forward(const __grid_constant__ BatchNormParams p, int64_t parts, int64_t part_size,
                   Workspace<A> workspace) {
  auto& shared = shared_storage<JoinShared<Moments>>();
  const int64_t c = join_channel(), channels = p.shape.channels, count = p.shape.per_channel();
  const auto read = [&](int64_t part) {
    const double* pair = workspace.partials + (part * channels + c) * 2;
    return Moments{static_cast<double>(min64(part_size, count - part * part_size)), pair[0], pair[1]};
  };
  const Moments moments = join_parts(shared, c < channels, p.training ? parts : 0, read);
  if (threadIdx.x >= kJoinChannels || c >= channels) return;
  double mean = p.running_mean.at(c, 0), var = p.running_var.at(c, 1);
  if (p.training) {
    p.mean[c] = mean = moments.mean();
    p.var[c] = var = moments.variance();
  }
  store_map(workspace, c, batch_norm_map<A>(mean, var, p.weight.at(c, 1), p.bias.at(c, 0), p.eps));
}

template <class T, int kPack>
__global__ void __launch_bounds__(kThreads, 3)
    apply_forward(const __grid_constant__ BatchNormParams p, int64_t packs,
                  Workspace<Accumulator<T>> workspace) {
  using A = Accumulator<T>;
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= packs) return;
  const int64_t channel = channel_of<kPack>(p.shape, i);
  A values[kPack], mean[kPack], scale[kPack], shift[kPack], residual[kPack] = {};
  load_widened<kPack, T>(values, static_cast<const T*>(p.x) + i * kPack);
  if (p.residual) load_widened<kPack, T>(residual, static_cast<const T*>(p.residual) + i * kPack);
  load_channels(mean, workspace.mean, channel, p.shape.channels_last);
  load_channels(scale, workspace.scale, channel, p.shape.channels_last);
  load_channels(shift, workspace.shift, channel, p.shape.channels_last);
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    values[e] = apply_map(values[e], mean[e], scale[e], shift[e]) + residual[e];
    if (p.relu && values[e] < 0) values[e] = 0;
  }
  store_narrowed<kPack, T>(static_cast<T*>(p.y) + i * kPack, values);
}

template <class T, int kPack>
void forward(const BatchNormParams& p, Stream stream) {
  using A = Accumulator<T>;
  const BatchNormShape& s = p.shape;
  const Workspace<A> workspace(p.workspace, s.channels);
  const Terms<T> terms{static_cast<const T*>(p.x), nullptr, nullptr, false};
  if (p.training) reduce<T, kPack, false>(s, terms, workspace, stream);
  launch(finish_forward<A>, ceil_div(s.channels, kJoinChannels), kJoinThreads, sizeof(JoinShared<Moments>),
         stream, p, parts_of(s), part_size(s), workspace);
  const int64_t packs = s.per_channel() * s.channels / kPack;
  launch(apply_forward<T, kPack>, ceil_div(packs, kThreads), kThreads, 0, stream, p, packs, workspace);
}

}  // namespace
}  // namespace batch_norm

int64_t batch_norm_workspace_bytes(const BatchNormShape& s) {
  const int64_t vectors = 6 * ceil_div(s.channels, 4) * 4;
  return vectors * (s.dtype == DType::kFloat64 ? 8 : 4) + batch_norm::parts_of(s) * s.channels * 2 * 8;
}

void batch_norm_forward(const BatchNormParams& p, Stream stream) {
  if (p.shape.per_channel() * p.shape.channels == 0) return;
  dispatch_dtype(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    batch_norm::fits_packs(p.shape, p.x, p.residual, p.y) ? batch_norm::forward<T, kPackSize<T>>(p, stream)
                                                          : batch_norm::forward<T, 1>(p, stream);
  });
}

}  // namespace cuda_cnn::cuda
