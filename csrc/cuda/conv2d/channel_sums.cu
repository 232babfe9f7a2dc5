// Sums over the pixels of each channel of an NHWC tensor, in an order that the shape alone decides: the
// gradient of the bias, and the mean and variance of an output whose own kernel left no partial sums.
//
//   part_sums    (sum, M2) of kSumPixels pixels, M2 = sum of squared distances from their mean
//   finish_sums  all parts joined in float64
#include "cuda/conv2d/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/moments.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda::conv2d {
namespace {

constexpr int kColumns = 32, kLines = 8;  // a block: neighbouring channels, and shares of the pixels

template <class A>
struct PartShared {
  A sum[kLines][kColumns], square[kLines][kColumns];
};

template <class A>
__device__ __forceinline__ A add_lines(const A (&lines)[kLines][kColumns], int column) {
  A sum = lines[0][column];
#pragma unroll
  for (int line = 1; line < kLines; ++line) sum += lines[line][column];
  return sum;
}

// Twice over the part, which the cache still holds: the squares are taken about its mean.
template <class T>
__global__ void __launch_bounds__(kColumns* kLines, 3)
    part_sums(int64_t pixels, int64_t channels, int64_t pixel_stride, const T* __restrict__ data,
              Accumulator<T>* __restrict__ partials) {
  using A = Accumulator<T>;
  auto& shared = shared_storage<PartShared<A>>();
  const int column = threadIdx.x % kColumns, line = threadIdx.x / kColumns;
  const int64_t stretches = ceil_div(channels, kColumns), part = blockIdx.x / stretches;
  const int64_t channel = blockIdx.x % stretches * kColumns + column, first = part * kSumPixels;
  const bool exists = channel < channels;
  const int count = exists ? static_cast<int>(min64(kSumPixels, pixels - first)) : 0;
  const T* from = data + first * pixel_stride + channel;
  A sum = 0, square = 0;
  for (int i = line; i < count; i += kLines) sum += widen_fast(from[i * pixel_stride]);
  shared.sum[line][column] = sum;
  __syncthreads();
  sum = add_lines(shared.sum, column);
  for (int i = line; i < count; i += kLines) {
    const A difference = widen_fast(from[i * pixel_stride]) - sum / count;
    square += difference * difference;
  }
  shared.square[line][column] = square;
  __syncthreads();
  if (line != 0 || !exists) return;
  A* out = partials + (part * channels + channel) * 2;
  out[0] = sum;
  out[1] = add_lines(shared.square, column);
}

template <class T>
__global__ void __launch_bounds__(kJoinThreads)
    finish_sums(int64_t pixels, int64_t channels, int64_t rows, const Accumulator<T>* __restrict__ partials,
                Accumulator<T>* __restrict__ mean, Accumulator<T>* __restrict__ variance,
                T* __restrict__ total) {
  auto& shared = shared_storage<JoinShared<Moments>>();
  const int64_t channel = join_channel();
  const Moments all = join_parts(shared, channel < channels, ceil_div(pixels, rows), [&](int64_t part) {
    const Accumulator<T>* pair = partials + (part * channels + channel) * 2;
    return Moments{static_cast<double>(min64(rows, pixels - part * rows)), pair[0], pair[1]};
  });
  if (threadIdx.x >= kJoinChannels || channel >= channels) return;
  if (mean) mean[channel] = static_cast<Accumulator<T>>(all.mean());
  if (variance) variance[channel] = static_cast<Accumulator<T>>(all.variance());
  if (total) total[channel] = narrow<T>(static_cast<Accumulator<T>>(all.sum));
}

template <class T>
void finish(const Conv2dParams& p, const ColumnPartials& partials, void* mean, void* variance, void* total,
            Stream stream) {
  using A = Accumulator<T>;
  launch(finish_sums<T>, ceil_div(p.K, kJoinChannels), kJoinThreads, sizeof(JoinShared<Moments>), stream,
         p.N * p.P * p.Q, p.K, partials.rows, static_cast<const A*>(partials.data), static_cast<A*>(mean),
         static_cast<A*>(variance), static_cast<T*>(total));
}

template <class T>
void sum_parts(const Conv2dParams& p, const void* data, void* workspace, Stream stream) {
  const int64_t blocks = ceil_div(p.N * p.P * p.Q, kSumPixels) * ceil_div(p.K, kColumns);
  launch(part_sums<T>, blocks, kColumns * kLines, sizeof(PartShared<Accumulator<T>>), stream, p.N * p.P * p.Q,
         p.K, p.y_pixel, static_cast<const T*>(data), static_cast<Accumulator<T>*>(workspace));
}

}  // namespace

void finish_statistics(const Conv2dParams& p, const ColumnPartials& partials, Stream stream) {
  dispatch_dtype(
      p.dtype, [&](auto type) { finish<decltype(type)>(p, partials, p.mean, p.variance, nullptr, stream); });
}

void output_statistics(const Conv2dParams& p, void* workspace, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) { sum_parts<decltype(type)>(p, p.y, workspace, stream); });
  finish_statistics(p, {workspace, kSumPixels}, stream);
}

void bias_gradient(const Conv2dParams& p, void* workspace, Stream stream) {
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    sum_parts<T>(p, p.dy, workspace, stream);
    finish<T>(p, {workspace, kSumPixels}, nullptr, nullptr, p.dbias, stream);
  });
}

}  // namespace cuda_cnn::cuda::conv2d
