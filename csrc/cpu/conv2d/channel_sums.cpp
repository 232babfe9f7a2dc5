// Reductions over the pixels of an NHWC tensor: the bias gradient, and the mean and variance of an output.
//   a task sums a block of pixels for all channels, vector by vector; blocks are added in double, in order
#include "cpu/conv2d/algorithms.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// Short chains of float, and at most a few hundred blocks for the largest maps.
constexpr int64_t kBlockPixels = 512;
constexpr int64_t kGrain = 65536;

// totals[c] = sum over pixels of f(x[c]); f maps a vector of channels from c on, `left` of them, in place.
template <class T, class Fn>
void channel_sums(const T* x, int64_t pixels, int64_t channels, int64_t pixel_step, double* totals,
                  const Fn& f) {
  using Acc = Accumulator<T>;
  constexpr int kWidth = kLanes<Acc>;
  const int64_t blocks = ceil_div(pixels, kBlockPixels), width = ceil_div(channels, kWidth) * kWidth;
  Acc* sums = workspace<Acc>(Workspace::kShared, blocks * width);
  parallel_for(blocks, ceil_div(kGrain, kBlockPixels * channels), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      Acc* sum = sums + block * width;
      for (int64_t c = 0; c < width; c += kWidth) store(sum + c, Vec<Acc>{});
      const int64_t last = min64(pixels, (block + 1) * kBlockPixels);
      for (int64_t pixel = block * kBlockPixels; pixel < last; ++pixel) {
        const T* from = x + pixel * pixel_step;
        for (int64_t c = 0; c < channels; c += kWidth) {
          const int64_t left = channels - c;
          Vec<Acc> value = left >= kWidth ? load(from + c) : load_first(from + c, left);
          f(value, c, left);
          store(sum + c, load(sum + c) + value);
        }
      }
    }
  });
  for (int64_t c = 0; c < channels; ++c) {
    totals[c] = 0;
    for (int64_t block = 0; block < blocks; ++block) totals[c] += sums[block * width + c];
  }
}

}  // namespace

template <class T>
void bias_grad(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  double* totals = workspace<double>(Workspace::kD, p.K);
  channel_sums(static_cast<const T*>(p.dy), p.N * p.P * p.Q, p.K, p.y_pixel, totals,
               [](Vec<Acc>&, int64_t, int64_t) {});
  for (int64_t k = 0; k < p.K; ++k) static_cast<T*>(p.dbias)[k] = narrow<T>(static_cast<Acc>(totals[k]));
}

// Two passes: the variance is the mean of squared differences from the mean, not a difference of large sums.
template <class T>
void output_statistics(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t pixels = p.N * p.P * p.Q;
  double* totals = workspace<double>(Workspace::kD, p.K);
  Acc *mean = static_cast<Acc*>(p.mean), *variance = static_cast<Acc*>(p.variance);
  const T* y = static_cast<const T*>(p.y);
  channel_sums(y, pixels, p.K, p.y_pixel, totals, [](Vec<Acc>&, int64_t, int64_t) {});
  for (int64_t k = 0; k < p.K; ++k) mean[k] = static_cast<Acc>(totals[k] / pixels);
  channel_sums(y, pixels, p.K, p.y_pixel, totals,
               [&](Vec<Acc>& value, int64_t c, int64_t left) __attribute__((always_inline)) {
                 value -= left >= kLanes<Acc> ? load(mean + c) : load_first(mean + c, left);
                 value *= value;
               });
  for (int64_t k = 0; k < p.K; ++k) variance[k] = static_cast<Acc>(totals[k] / pixels);
}

#define INSTANTIATE(T)                             \
  template void bias_grad<T>(const Conv2dParams&); \
  template void output_statistics<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
