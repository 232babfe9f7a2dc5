// Depthwise convolution and narrow groups (as many filters as channels, at most a vector of them): no matrix
// product, lanes are output channels. With c channels a group,
//   y[k] = sum over taps, i < c of  w[tap][i][k] * x[k - k % c + i]
// and the vector of that x is a shuffle of the vector x[k]: itself where c = 1.
//   forward, input gradient: a few neighbouring output pixels share each tap's weights in a register
//   weight gradient: a task sums a block of output rows for every tap and channel; blocks are added in order
// Two vectors of channels at a time: with AVX2 that is a cache line, so that pixels which share a cache set
// (512 channels and more) are read once.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/gemm.h"
#include "cpu/conv2d/transpose.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int kRun = 4;            // output pixels at a time; two vectors of them hide the latency
constexpr int kTapRun = 3;         // taps of a row at a time in the weight gradient
constexpr int64_t kGrain = 65536;  // multiply-adds worth a thread
constexpr int64_t kRowTasks = 32;

// p[j] for the vectors of a step, `left` channels of them in use.
template <class T, int kVectors>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_vector(const T* p, int j, int64_t left) {
  p += j * kLanes<T>;
  return kVectors > 1 || left >= kLanes<T> ? load(p) : load_first(p, left);
}

// Lane k holds lane i of the kChannels lanes around k.
template <class Acc, int kChannels, int i>
CUDA_CNN_INLINE Vec<Acc> spread(Vec<Acc> x) {
  if constexpr (kChannels == 1) {
    return x;
  } else {
#if defined(__clang__)  // has no __builtin_shuffle, and finds the shuffle in this by itself
    Vec<Acc> out = {};
    for (int k = 0; k < kLanes<Acc>; ++k) out[k] = x[k / kChannels * kChannels + i];
    return out;
#else
    typedef typename LaneIndexOf<Acc>::type Index __attribute__((vector_size(kVectorBytes)));
    Index index = {};
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<Acc>; ++k) index[k] = k / kChannels * kChannels + i;
    return __builtin_shuffle(x, index);
#endif
  }
}

// The range of taps whose input lies inside [0, extent), for an output that starts to read at `start`.
CUDA_CNN_INLINE void clip(int64_t start, int64_t step, int64_t extent, int64_t taps, int64_t* begin,
                          int64_t* end) {
  *begin = start < 0 ? min64(ceil_div(-start, step), taps) : 0;
  *end = start >= extent ? *begin : max64(*begin, min64(taps, (extent - 1 - start) / step + 1));
}

struct Taps {
  int64_t r_begin, r_end, s_begin, s_end;
};

// sums[pixel] += weights * x[pixel * step], for the channels i and up of the groups.
template <class T, int kChannels, int kPixels, int kVectors, int i = 0>
CUDA_CNN_INLINE void add_tap(Vec<Accumulator<T>> (&sums)[kPixels][kVectors], const T* x, int64_t step,
                             const Accumulator<T>* weights, int64_t width, int64_t left) {
  using Acc = Accumulator<T>;
  Vec<Acc> weight[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) weight[j] = load(weights + j * kLanes<T>);
  const T* pixel = x;
#pragma GCC unroll 4
  for (int n = 0; n < kPixels; ++n, pixel += step) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const Vec<Acc> value = spread<Acc, kChannels, i>(load_vector<T, kVectors>(pixel, j, left));
      sums[n][j] = fma(weight[j], value, sums[n][j]);
    }
  }
  if constexpr (i + 1 < kChannels) {
    add_tap<T, kChannels, kPixels, kVectors, i + 1>(sums, x, step, weights + width, width, left);
  }
}

// kPixels neighbouring outputs of one row, kVectors of channels from c on; source and out_pixel are the
// first.
template <class T, int kChannels, int kPixels, int kVectors>
void outputs(const Gather<T>& g, const Scatter<T>& to, const Accumulator<T>* weights, int64_t width,
             int64_t c, int64_t left, const Taps& taps, const T* source, int64_t out_pixel) {
  using Acc = Accumulator<T>;
  Vec<Acc> sums[kPixels][kVectors] = {};
  for (int64_t r = taps.r_begin; r < taps.r_end; ++r) {
    for (int64_t s = taps.s_begin; s < taps.s_end; ++s) {
      add_tap<T, kChannels, kPixels, kVectors>(sums, source + (r * g.tap_h * g.W + s * g.tap_w) * g.pixel + c,
                                               g.stride_w * g.pixel,
                                               weights + (r * g.S + s) * kChannels * width + c, width, left);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < kPixels; ++n) {
    const int64_t pixel = out_pixel + n * to.step_w;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      Vec<Acc> value = sums[n][j];
      if (to.bias) value += load_vector<T, kVectors>(to.bias + c, j, left);
      if (to.residual) {
        value += load_vector<T, kVectors>(to.residual + pixel * to.residual_pixel + c, j, left);
      }
      if (to.relu) value = relu(value);
      T* out = to.out + pixel * to.pixel + c + j * kLanes<T>;
      if (kVectors > 1 || left >= kLanes<T>) {
        store(out, value);
      } else {
        store_first(out, value, left);
      }
    }
  }
}

template <class T, int kChannels, int kPixels>
void run_of_outputs(const Gather<T>& g, const Scatter<T>& to, const Accumulator<T>* weights, int64_t width,
                    int64_t C, const Taps& taps, const T* source, int64_t out_pixel) {
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= C; c += 2 * kLanes<T>) {
    outputs<T, kChannels, kPixels, 2>(g, to, weights, width, c, C - c, taps, source, out_pixel);
  }
  for (; c < C; c += kLanes<T>) {
    outputs<T, kChannels, kPixels, 1>(g, to, weights, width, c, C - c, taps, source, out_pixel);
  }
}

template <class T, int kChannels>
void correlate_narrow(const Gather<T>& g, const Scatter<T>& to, const Accumulator<T>* weights, int64_t width,
                      int64_t N, int64_t C) {
  const int64_t row_work = g.Q * (g.R * g.S * kChannels + 1) * C;
  parallel_for(N * g.P, ceil_div(kGrain, row_work), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / g.P, p = row % g.P, h0 = g.base_h + p * g.stride_h;
      Taps taps;
      clip(h0, g.tap_h, g.H, g.R, &taps.r_begin, &taps.r_end);
      const int64_t out_row = (n * to.H + to.first_h + p * to.step_h) * to.W + to.first_w;
      for (int64_t q = 0; q < g.Q;) {
        const int64_t w0 = g.base_w + q * g.stride_w,
                      last = w0 + (kRun - 1) * g.stride_w + (g.S - 1) * g.tap_w;
        const T* source = g.source + ((n * g.H + h0) * g.W + w0) * g.pixel;
        const int64_t out = out_row + q * to.step_w;
        if (w0 >= 0 && last < g.W && q + kRun <= g.Q) {
          taps.s_begin = 0, taps.s_end = g.S;
          run_of_outputs<T, kChannels, kRun>(g, to, weights, width, C, taps, source, out);
          q += kRun;
        } else {
          clip(w0, g.tap_w, g.W, g.S, &taps.s_begin, &taps.s_end);
          run_of_outputs<T, kChannels, 1>(g, to, weights, width, C, taps, source, out);
          ++q;
        }
      }
    }
  });
}

// The channels of a group that a kernel is made for: fn(a type with kChannels).
template <int kCount>
struct Channels {
  static constexpr int kChannels = kCount;
};
template <class T, class Fn>
void dispatch_channels(int64_t channels, const Fn& fn) {
  constexpr int kMost = kLanes<T>;
  if (channels == 1) return fn(Channels<1>{});
  if (channels == 2) return fn(Channels<2>{});
  if constexpr (kMost >= 4) {
    if (channels == 4) return fn(Channels<4>{});
  }
  if constexpr (kMost >= 8) {
    if (channels == 8) return fn(Channels<8>{});
  }
}

// to[tap][i][k] = w[k][tap][i] of the filters; for the input gradient with k and i exchanged, taps backwards.
template <class T>
void pack_weights(const Conv2dParams& p, bool transposed, const Conv2dPhase& h, const Conv2dPhase& w,
                  int64_t width, Accumulator<T>* to) {
  const T* weight = static_cast<const T*>(p.weight);
  const int64_t channels = p.C / p.groups;
  for (int64_t a = 0; a < h.taps; ++a) {
    for (int64_t b = 0; b < w.taps; ++b) {
      const int64_t r = transposed ? h.tap + (h.taps - 1 - a) * h.tap_step : a;
      const int64_t s = transposed ? w.tap + (w.taps - 1 - b) * w.tap_step : b;
      for (int64_t i = 0; i < channels; ++i, to += width) {
        for (int64_t k = 0; k < width; ++k) {
          const int64_t filter = transposed ? k / channels * channels + i : k;
          const int64_t channel = transposed ? k % channels : i;
          to[k] = k < p.C ? widen(weight[((filter * p.R + r) * p.S + s) * channels + channel]) : 0;
        }
      }
    }
  }
}

template <class T>
int64_t padded_width(int64_t C) {
  return ceil_div(C, kLanes<T>) * kLanes<T>;
}

}  // namespace

template <class T>
void forward_depthwise(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t width = padded_width<T>(p.C), channels = p.C / p.groups;
  Acc* weights = workspace<Acc>(Workspace::kShared, p.R * p.S * channels * width);
  const Conv2dPhase h{0, 0, 0, 1, p.R, 0, 0}, w{0, 0, 0, 1, p.S, 0, 0};
  pack_weights<T>(p, false, h, w, width, weights);
  Scatter<T> to{static_cast<T*>(p.y), p.P, p.Q, p.y_pixel};
  to.bias = static_cast<const T*>(p.bias);
  to.residual = static_cast<const T*>(p.residual);
  to.residual_pixel = p.residual_pixel;
  to.relu = p.relu;
  dispatch_channels<T>(channels, [&](auto c) {
    correlate_narrow<T, c.kChannels>(forward_gather<T>(p), to, weights, width, p.N, p.C);
  });
}

template <class T>
void input_grad_depthwise(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t width = padded_width<T>(p.C), channels = p.C / p.groups;
  Acc* weights = workspace<Acc>(Workspace::kShared, p.R * p.S * channels * width);
  for (int64_t a = 0; a < min64(p.stride_h, p.H); ++a) {
    const Conv2dPhase h = conv2d_phase(a, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    for (int64_t b = 0; b < min64(p.stride_w, p.W); ++b) {
      const Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      pack_weights<T>(p, true, h, w, width, weights);
      const Gather<T> gather{static_cast<const T*>(p.dy),
                             p.P,
                             p.Q,
                             p.y_pixel,
                             h.count,
                             w.count,
                             1,
                             1,
                             h.base - (h.taps - 1) * h.dy_step,
                             w.base - (w.taps - 1) * w.dy_step,
                             h.taps,
                             w.taps,
                             h.dy_step,
                             w.dy_step,
                             channels};
      const Scatter<T> to{
          static_cast<T*>(p.dx), p.H, p.W, p.x_pixel, h.first, w.first, p.stride_h, p.stride_w};
      dispatch_channels<T>(
          channels, [&](auto c) { correlate_narrow<T, c.kChannels>(gather, to, weights, width, p.N, p.C); });
    }
  }
}

namespace {

// sums[tap][vector] += dy * x over output columns [q_begin, q_end); sums lie sum_step apart, taps x_tap.
template <class T, int kChannels, int i, int kTaps, int kVectors>
CUDA_CNN_INLINE void add_columns(const T* dy, int64_t dy_pixel, const T* x, int64_t x_step, int64_t x_tap,
                                 int64_t q_begin, int64_t q_end, int64_t left, Accumulator<T>* sums,
                                 int64_t sum_step) {
  using Acc = Accumulator<T>;
  Vec<Acc> totals[kTaps][kVectors];
#pragma GCC unroll 3
  for (int s = 0; s < kTaps; ++s) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) totals[s][j] = load(sums + s * sum_step + j * kLanes<T>);
  }
  dy += q_begin * dy_pixel;
  x += q_begin * x_step;
  for (int64_t q = q_begin; q < q_end; ++q, dy += dy_pixel, x += x_step) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const Vec<Acc> gradient = load_vector<T, kVectors>(dy, j, left);
#pragma GCC unroll 3
      for (int s = 0; s < kTaps; ++s) {
        const Vec<Acc> value = spread<Acc, kChannels, i>(load_vector<T, kVectors>(x + s * x_tap, j, left));
        totals[s][j] = fma(gradient, value, totals[s][j]);
      }
    }
  }
#pragma GCC unroll 3
  for (int s = 0; s < kTaps; ++s) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) store(sums + s * sum_step + j * kLanes<T>, totals[s][j]);
  }
}

// One row of taps and kVectors of channels, for the channels i and up of the groups: first the output columns
// where every tap of a run is inside the image, then each tap's others.
template <class T, int kChannels, int kVectors, int i = 0>
void add_tap_row(const Gather<T>& g, const T* dy, int64_t dy_pixel, const T* x, int64_t left,
                 Accumulator<T>* sums, int64_t width) {
  const int64_t x_step = g.stride_w * g.pixel, x_tap = g.tap_w * g.pixel, sum_step = kChannels * width;
  for (int64_t s = 0; s < g.S; s += kTapRun) {
    const int64_t taps = min64(kTapRun, g.S - s);
    int64_t begin[kTapRun], end[kTapRun], inner_begin = 0, inner_end = g.Q;
    for (int64_t t = 0; t < taps; ++t) {
      clip(g.base_w + (s + t) * g.tap_w, g.stride_w, g.W, g.Q, &begin[t], &end[t]);
      inner_begin = max64(inner_begin, begin[t]);
      inner_end = min64(inner_end, end[t]);
    }
    const bool inner = taps == kTapRun && inner_begin < inner_end;
    const T* from = x + s * x_tap;
    Accumulator<T>* to = sums + i * width + s * sum_step;
    if (inner) {
      add_columns<T, kChannels, i, kTapRun, kVectors>(dy, dy_pixel, from, x_step, x_tap, inner_begin,
                                                      inner_end, left, to, sum_step);
    }
    for (int64_t t = 0; t < taps; ++t, from += x_tap, to += sum_step) {
      const int64_t middle = inner ? inner_begin : end[t];
      add_columns<T, kChannels, i, 1, kVectors>(dy, dy_pixel, from, x_step, x_tap, begin[t], middle, left, to,
                                                sum_step);
      if (!inner) continue;
      add_columns<T, kChannels, i, 1, kVectors>(dy, dy_pixel, from, x_step, x_tap, inner_end, end[t], left,
                                                to, sum_step);
    }
  }
  if constexpr (i + 1 < kChannels) {
    add_tap_row<T, kChannels, kVectors, i + 1>(g, dy, dy_pixel, x, left, sums, width);
  }
}

// sums[tap][i][k] += dy * x over one output row, for all channels.
template <class T, int kChannels>
void add_row(const Gather<T>& g, const T* dy, int64_t dy_pixel, int64_t row, int64_t C, int64_t width,
             Accumulator<T>* sums) {
  const int64_t n = row / g.P, p = row % g.P, h0 = g.base_h + p * g.stride_h;
  int64_t r_begin, r_end;
  clip(h0, g.tap_h, g.H, g.R, &r_begin, &r_end);
  const T* dy_row = dy + row * g.Q * dy_pixel;
  for (int64_t c = 0, vectors; c < C; c += vectors * kLanes<T>) {
    vectors = C - c >= 2 * kLanes<T> ? 2 : 1;
    for (int64_t r = r_begin; r < r_end; ++r) {
      const T* x = g.source + ((n * g.H + h0 + r * g.tap_h) * g.W + g.base_w) * g.pixel + c;
      Accumulator<T>* to = sums + r * g.S * kChannels * width + c;
      const auto add = vectors == 2 ? add_tap_row<T, kChannels, 2> : add_tap_row<T, kChannels, 1>;
      add(g, dy_row + c, dy_pixel, x, C - c, to, width);
    }
  }
}

}  // namespace

template <class T>
void weight_grad_depthwise(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const Gather<T> gather = forward_gather<T>(p);
  const int64_t width = padded_width<T>(p.C), channels = p.C / p.groups, rows = p.N * p.P;
  const int64_t size = p.R * p.S * channels * width, work = rows * p.Q * p.R * p.S * channels * p.C;
  const int64_t tasks = max64(1, min64(min64(rows, kRowTasks), work / kGrain));
  Acc* sums = workspace<Acc>(Workspace::kShared, tasks * size);
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Acc* of_task = sums + task * size;
      for (int64_t i = 0; i < size; ++i) of_task[i] = 0;
      dispatch_channels<T>(channels, [&](auto c) {
        for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) {
          add_row<T, c.kChannels>(gather, static_cast<const T*>(p.dy), p.y_pixel, row, p.C, width, of_task);
        }
      });
    }
  });
  T* dweight = static_cast<T*>(p.dweight);
  for (int64_t task = 1; task < tasks; ++task) {
    for (int64_t i = 0; i < size; i += kLanes<T>)
      store(sums + i, load(sums + i) + load(sums + task * size + i));
  }
  for (int64_t k = 0; k < p.K; ++k) {
    for (int64_t i = 0; i < p.R * p.S * channels; ++i) *dweight++ = narrow<T>(sums[i * width + k]);
  }
}

#define INSTANTIATE(T)                                        \
  template void forward_depthwise<T>(const Conv2dParams&);    \
  template void input_grad_depthwise<T>(const Conv2dParams&); \
  template void weight_grad_depthwise<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
