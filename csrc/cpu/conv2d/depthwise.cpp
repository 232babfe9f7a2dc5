// Depthwise convolution (a filter a channel): no sums across channels, no matrix product. Lanes are channels.
//   forward, input gradient: a run of neighbouring output pixels shares each tap's weights in a register
//   weight gradient: a task sums a block of output rows for every tap and channel; blocks are added in order
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/gemm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int kRun = 8;            // output pixels at a time: 8 sums hide the multiply-adder's latency
constexpr int64_t kGrain = 65536;  // multiply-adds worth a thread
constexpr int64_t kRowTasks = 32;

template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_upto(const T* p, int64_t left) {
  return left >= kLanes<T> ? load(p) : load_first(p, left);
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

// kCount neighbouring outputs of one row, all channels; source and out point at the first one's.
template <class T, int kCount>
void run_of_outputs(const Gather<T>& g, const Scatter<T>& to, const Accumulator<T>* weights, int64_t width,
                    int64_t C, const Taps& taps, const T* source, int64_t out_pixel) {
  using Acc = Accumulator<T>;
  for (int64_t c = 0; c < C; c += kLanes<T>) {
    const int64_t left = C - c;
    Vec<Acc> sums[kCount] = {};
    for (int64_t r = taps.r_begin; r < taps.r_end; ++r) {
      for (int64_t s = taps.s_begin; s < taps.s_end; ++s) {
        const Vec<Acc> weight = load(weights + (r * g.S + s) * width + c);
        const T* x = source + (r * g.tap_h * g.W + s * g.tap_w) * g.pixel + c;
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i)
          sums[i] = fma(weight, load_upto(x + i * g.stride_w * g.pixel, left), sums[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) {
      const int64_t pixel = out_pixel + i * to.step_w;
      if (to.bias) sums[i] += load_upto(to.bias + c, left);
      if (to.residual) sums[i] += load_upto(to.residual + pixel * to.residual_pixel + c, left);
      if (to.relu) sums[i] = relu(sums[i]);
      T* out = to.out + pixel * to.pixel + c;
      if (left >= kLanes<T>) {
        store(out, sums[i]);
      } else {
        store_first(out, sums[i], left);
      }
    }
  }
}

// out[position][c] = sum over taps of weights[tap][c] * source[position, tap][c]
template <class T>
void correlate_depthwise(const Gather<T>& g, const Scatter<T>& to, const Accumulator<T>* weights,
                         int64_t width, int64_t N, int64_t C) {
  parallel_for(N * g.P, ceil_div(kGrain, g.Q * (g.R * g.S + 1) * C), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t n = row / g.P, p = row % g.P, h0 = g.base_h + p * g.stride_h;
      Taps taps;
      clip(h0, g.tap_h, g.H, g.R, &taps.r_begin, &taps.r_end);
      const int64_t out_row = (n * to.H + to.first_h + p * to.step_h) * to.W + to.first_w;
      for (int64_t q = 0; q < g.Q;) {
        const int64_t w0 = g.base_w + q * g.stride_w,
                      last = w0 + (kRun - 1) * g.stride_w + (g.S - 1) * g.tap_w;
        const T* source = g.source + ((n * g.H + h0) * g.W + w0) * g.pixel;
        if (w0 >= 0 && last < g.W && q + kRun <= g.Q) {
          taps.s_begin = 0, taps.s_end = g.S;
          run_of_outputs<T, kRun>(g, to, weights, width, C, taps, source, out_row + q * to.step_w);
          q += kRun;
        } else {
          clip(w0, g.tap_w, g.W, g.S, &taps.s_begin, &taps.s_end);
          run_of_outputs<T, 1>(g, to, weights, width, C, taps, source, out_row + q * to.step_w);
          ++q;
        }
      }
    }
  });
}

// weights[i * S' + j][c] of the filters w[c][r][s], for taps first + i * step along each axis.
template <class T>
void pack_filters(const Conv2dParams& p, const Conv2dPhase& h, const Conv2dPhase& w, int64_t width,
                  Accumulator<T>* out) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t i = h.taps - 1; i >= 0; --i) {
    for (int64_t j = w.taps - 1; j >= 0; --j, out += width) {
      const T* from = weight + (h.tap + i * h.tap_step) * p.S + w.tap + j * w.tap_step;
      for (int64_t c = 0; c < width; ++c) out[c] = c < p.C ? widen(from[c * p.R * p.S]) : 0;
    }
  }
}

}  // namespace

template <class T>
void forward_depthwise(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t width = ceil_div(p.C, kLanes<T>) * kLanes<T>;
  Acc* weights = workspace<Acc>(Workspace::kShared, p.R * p.S * width);
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t tap = 0; tap < p.R * p.S; ++tap) {
    for (int64_t c = 0; c < width; ++c)
      weights[tap * width + c] = c < p.C ? widen(weight[c * p.R * p.S + tap]) : 0;
  }
  Scatter<T> to{static_cast<T*>(p.y), p.P, p.Q, p.y_pixel};
  to.bias = static_cast<const T*>(p.bias);
  to.residual = static_cast<const T*>(p.residual);
  to.residual_pixel = p.residual_pixel;
  to.relu = p.relu;
  correlate_depthwise(forward_gather<T>(p), to, weights, width, p.N, p.C);
}

template <class T>
void input_grad_depthwise(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t width = ceil_div(p.C, kLanes<T>) * kLanes<T>;
  Acc* weights = workspace<Acc>(Workspace::kShared, p.R * p.S * width);
  for (int64_t a = 0; a < min64(p.stride_h, p.H); ++a) {
    const Conv2dPhase h = conv2d_phase(a, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    for (int64_t b = 0; b < min64(p.stride_w, p.W); ++b) {
      const Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      pack_filters<T>(p, h, w, width, weights);
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
                             p.C};
      const Scatter<T> to{
          static_cast<T*>(p.dx), p.H, p.W, p.x_pixel, h.first, w.first, p.stride_h, p.stride_w};
      correlate_depthwise(gather, to, weights, width, p.N, p.C);
    }
  }
}

namespace {

// sums[tap][c] += dy * x over one output row, for all channels.
template <class T>
void add_row(const Gather<T>& g, const T* dy, int64_t dy_pixel, int64_t row, int64_t C, int64_t width,
             Accumulator<T>* sums) {
  using Acc = Accumulator<T>;
  const int64_t n = row / g.P, p = row % g.P, h0 = g.base_h + p * g.stride_h;
  Taps taps;
  clip(h0, g.tap_h, g.H, g.R, &taps.r_begin, &taps.r_end);
  for (int64_t s = 0; s < g.S; ++s) {
    const int64_t w0 = g.base_w + s * g.tap_w;  // of output column 0
    int64_t q_begin, q_end;
    clip(w0, g.stride_w, g.W, g.Q, &q_begin, &q_end);
    for (int64_t r = taps.r_begin; r < taps.r_end; ++r) {
      const T* x = g.source + ((n * g.H + h0 + r * g.tap_h) * g.W + w0) * g.pixel;
      Acc* sum = sums + (r * g.S + s) * width;
      for (int64_t c = 0; c < C; c += kLanes<T>) {
        Vec<Acc> total[2] = {load(sum + c), Vec<Acc>{}};
        for (int64_t q = q_begin; q < q_end; ++q) {
          Vec<Acc>& part = total[q % 2];
          part = fma(load_upto(dy + (row * g.Q + q) * dy_pixel + c, C - c),
                     load_upto(x + q * g.stride_w * g.pixel + c, C - c), part);
        }
        store(sum + c, total[0] + total[1]);
      }
    }
  }
}

}  // namespace

template <class T>
void weight_grad_depthwise(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const Gather<T> gather = forward_gather<T>(p);
  const int64_t width = ceil_div(p.C, kLanes<T>) * kLanes<T>, size = p.R * p.S * width, rows = p.N * p.P;
  const int64_t work = rows * p.Q * p.R * p.S * p.C;
  const int64_t tasks = max64(1, min64(min64(rows, kRowTasks), work / kGrain));
  Acc* sums = workspace<Acc>(Workspace::kShared, tasks * size);
  parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Acc* of_task = sums + task * size;
      for (int64_t i = 0; i < size; ++i) of_task[i] = 0;
      for (int64_t row = rows * task / tasks; row < rows * (task + 1) / tasks; ++row) {
        add_row(gather, static_cast<const T*>(p.dy), p.y_pixel, row, p.C, width, of_task);
      }
    }
  });
  for (int64_t tap = 0; tap < p.R * p.S; ++tap) {
    for (int64_t c = 0; c < p.C; ++c) {
      Acc total = 0;
      for (int64_t task = 0; task < tasks; ++task) total += sums[task * size + tap * width + c];
      static_cast<T*>(p.dweight)[c * p.R * p.S + tap] = narrow<T>(total);
    }
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
