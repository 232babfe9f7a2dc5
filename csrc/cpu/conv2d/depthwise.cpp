// Depthwise convolution and narrow groups (as many filters as channels, at most a vector of them): no matrix
// product, lanes are output channels. With c channels a group,
//   y[k] = sum over taps, i < c of  w[tap][i][k] * x[k - k % c + i]
// and the vector of that x is a shuffle of the vector x[k]: itself where c = 1.
// Forward and input gradient: a few neighbouring output pixels share each tap's weights in a register. Two
// vectors of channels at a time: with AVX2 that is a cache line, so that pixels which share a cache set (512
// channels and more) are read once. Memory is the bound, and the rows that come next are asked for meanwhile.
#include "cpu/conv2d/depthwise.h"

#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/gemm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int kRun = 4;  // output pixels at a time; two vectors of them hide the latency

// A run of outputs: its first pixel's column w0 and source, the rows of taps inside the image.
template <class T>
struct Run {
  const Gather<T>& g;
  const Scatter<T>& to;
  int64_t r_begin, r_end, w0;
  const T* source;
  int64_t out_pixel;
};

// sums[pixel] += weights * x[pixel * step], for the channels i and up of the groups. At an edge, columns
// (from w on) outside the image are left out.
template <class T, int kChannels, int kPixels, int kVectors, bool kEdge, int i = 0>
CUDA_CNN_INLINE void add_tap(Vec<Accumulator<T>> (&sums)[kPixels][kVectors], const Gather<T>& g, const T* x,
                             int64_t w, const Accumulator<T>* weights, int64_t left) {
  using Acc = Accumulator<T>;
  Vec<Acc> weight[kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) weight[j] = load(weights + j * kLanes<T>);
  const int64_t step = g.stride_w * g.pixel;
#pragma GCC unroll 4
  for (int n = 0; n < kPixels; ++n) {
    const int64_t column = w + n * g.stride_w;
    const T* pixel = x + n * step;
    if (kEdge && (column < 0 || column >= g.W)) continue;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const Vec<Acc> value = spread<Acc, kChannels, i>(load_vector<T, kVectors>(pixel, j, left));
      sums[n][j] = fma(weight[j], value, sums[n][j]);
    }
  }
  if constexpr (i + 1 < kChannels) {
    add_tap<T, kChannels, kPixels, kVectors, kEdge, i + 1>(sums, g, x, w, weights + kTileColumns<Acc>, left);
  }
}

// Bias, residual and ReLU of vector j of a pixel.
template <class T, int kVectors>
CUDA_CNN_INLINE Vec<Accumulator<T>> finished(const Scatter<T>& to, Vec<Accumulator<T>> value, int64_t pixel,
                                             int64_t c, int j, int64_t left) {
  if (to.bias) value += load_vector<T, kVectors>(to.bias + c, j, left);
  if (to.residual) value += load_vector<T, kVectors>(to.residual + pixel * to.residual_pixel + c, j, left);
  return to.relu ? relu(value) : value;
}

// Asks for the rows of the source that the outputs below these will read first.
template <class T, int kPixels>
CUDA_CNN_INLINE void prefetch_below(const Gather<T>& g, const T* x) {
  const int64_t row_step = g.W * g.pixel, step = g.stride_w * g.pixel;
  x += ((g.R - 1) * g.tap_h + 1) * row_step;
  for (int64_t h = 0; h < g.stride_h; ++h, x += row_step) {
#pragma GCC unroll 4
    for (int n = 0; n < kPixels; ++n) __builtin_prefetch(x + n * step);
    if (g.stride_w == 1) continue;
#pragma GCC unroll 4
    for (int n = 0; n < kPixels; ++n) __builtin_prefetch(x + g.pixel + n * step);
  }
}

// kPixels outputs, kVectors of channels from c on.
template <class T, int kChannels, int kPixels, int kVectors, bool kEdge>
CUDA_CNN_INLINE void outputs(const Run<T>& run, const NarrowFilters<Accumulator<T>>& filters, int64_t c,
                             int64_t left) {
  using Acc = Accumulator<T>;
  const Gather<T>& g = run.g;
  const Scatter<T>& to = run.to;
  prefetch_below<T, kPixels>(g, run.source + c);
  Vec<Acc> sums[kPixels][kVectors] = {};
  const int64_t tap_w = g.tap_w * g.pixel, tap_h = g.tap_h * g.W * g.pixel;
  const T* x_row = run.source + c + run.r_begin * tap_h;
  const Acc* weights_row = filters.of_channel(c) + run.r_begin * filters.step_r;
  for (int64_t r = run.r_begin; r < run.r_end; ++r, x_row += tap_h, weights_row += filters.step_r) {
    const T* x = x_row;
    const Acc* weights = weights_row;
    for (int64_t s = 0; s < g.S; ++s, x += tap_w, weights += filters.step_s) {
      opaque(x);
      add_tap<T, kChannels, kPixels, kVectors, kEdge>(sums, g, x, run.w0 + s * g.tap_w, weights, left);
    }
  }
  T* out = to.out + run.out_pixel * to.pixel + c;
  const int64_t out_step = to.step_w * to.pixel, out_below = to.step_h * to.W * to.pixel;
  const bool mapped = to.bias || to.residual || to.relu;
#pragma GCC unroll 4
  for (int n = 0; n < kPixels; ++n, out += out_step) {
    opaque(out);
    __builtin_prefetch(out + out_below, 1);
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const Vec<Acc> value =
          mapped ? finished<T, kVectors>(to, sums[n][j], run.out_pixel + n * to.step_w, c, j, left)
                 : sums[n][j];
      if (kVectors > 1 || left >= kLanes<T>) {
        store(out + j * kLanes<T>, value);
      } else {
        store_first(out, value, left);
      }
    }
  }
}

template <class T, int kChannels, int kPixels, bool kEdge>
void run_of_outputs(const Run<T>& run, const NarrowFilters<Accumulator<T>>& filters, int64_t C) {
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= C; c += 2 * kLanes<T>) {
    outputs<T, kChannels, kPixels, 2, kEdge>(run, filters, c, C - c);
  }
  for (; c < C; c += kLanes<T>) outputs<T, kChannels, kPixels, 1, kEdge>(run, filters, c, C - c);
}

// Output row `row` of all images' rows.
template <class T, int kChannels>
void correlate_row(const Gather<T>& g, const Scatter<T>& to, const NarrowFilters<Accumulator<T>>& filters,
                   int64_t row, int64_t C) {
  const int64_t n = row / g.P, p = row % g.P, h0 = g.base_h + p * g.stride_h;
  const int64_t out_row = (n * to.H + to.first_h + p * to.step_h) * to.W + to.first_w;
  Run<T> run{g, to};
  clip(h0, g.tap_h, g.H, g.R, &run.r_begin, &run.r_end);
  // The last run overlaps the one before: some outputs are computed twice, alike.
  for (int64_t q = 0; q < g.Q; q += g.Q >= kRun ? kRun : 1) {
    if (g.Q >= kRun) q = min64(q, g.Q - kRun);
    run.w0 = g.base_w + q * g.stride_w;
    run.source = g.source + ((n * g.H + h0) * g.W + run.w0) * g.pixel;
    run.out_pixel = out_row + q * to.step_w;
    const bool inside = run.w0 >= 0 && run.w0 + (kRun - 1) * g.stride_w + (g.S - 1) * g.tap_w < g.W;
    if (g.Q < kRun) {
      run_of_outputs<T, kChannels, 1, true>(run, filters, C);
    } else if (inside) {
      run_of_outputs<T, kChannels, kRun, false>(run, filters, C);
    } else {
      run_of_outputs<T, kChannels, kRun, true>(run, filters, C);
    }
  }
}

// Panels [tap][i][k] = w[k][tap][i]; for the input gradient with k and i of a group exchanged.
template <class T>
const Accumulator<T>* pack_narrow(const Conv2dParams& p, bool transposed) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t channels = p.C / p.groups, taps = p.R * p.S, depth = taps * channels;
  const T* weight = static_cast<const T*>(p.weight);
  if (transposed && channels > 1) {
    T* exchanged = workspace<T>(Workspace::kA, p.K * depth);
    for (int64_t k = 0; k < p.K; ++k) {
      const T* from = weight + k / channels * channels * depth + k % channels;
      for (int64_t i = 0; i < depth; ++i) {
        exchanged[k * depth + i] = from[i % channels * depth + i / channels * channels];
      }
    }
    weight = exchanged;
  }
  const int64_t panels = ceil_div(p.C, kColumns), panel_size = depth * kColumns;
  Acc* packed = workspace<Acc>(Workspace::kShared, panels * panel_size);
  for (int64_t i = 0; i < panels; ++i) {
    pack_panel_transposed(weight + i * panel_size, depth, p.C - i * kColumns, depth, packed + i * panel_size);
  }
  return packed;
}

int64_t rows_a_thread(const Conv2dParams& p, int64_t row_pixels) {
  return ceil_div(kDepthwiseGrain, row_pixels * (p.R * p.S * (p.C / p.groups) + 1) * p.C);
}

}  // namespace

template <class T>
void forward_depthwise(const Conv2dParams& p) {
  constexpr int64_t kColumns = kTileColumns<Accumulator<T>>;
  const int64_t channels = p.C / p.groups, tap = channels * kColumns;
  const NarrowFilters<Accumulator<T>> filters{pack_narrow<T>(p, false), p.R * p.S * tap, 0, p.S * tap, tap};
  const Gather<T> gather = forward_gather<T>(p);
  Scatter<T> to{static_cast<T*>(p.y), p.P, p.Q, p.y_pixel};
  to.bias = static_cast<const T*>(p.bias);
  to.residual = static_cast<const T*>(p.residual);
  to.residual_pixel = p.residual_pixel;
  to.relu = p.relu;
  dispatch_channels<T>(channels, [&](auto c) {
    parallel_for(p.N * p.P, rows_a_thread(p, p.Q), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        correlate_row<T, c.kChannels>(gather, to, filters, row, p.C);
      }
    });
  });
}

// A row of dx is stride_w phases, one after the other.
template <class T>
void input_grad_depthwise(const Conv2dParams& p) {
  constexpr int64_t kColumns = kTileColumns<Accumulator<T>>;
  const int64_t channels = p.C / p.groups, tap = channels * kColumns;
  const Accumulator<T>* panels = pack_narrow<T>(p, true);
  const auto correlate_phases = [&](auto c, int64_t n, int64_t row) {
    const Conv2dPhase h = conv2d_phase(row % p.stride_h, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    for (int64_t b = 0; b < min64(p.stride_w, p.W); ++b) {
      const Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      const Gather<T> gather = phase_gather<T>(p, h, w);
      const NarrowFilters<Accumulator<T>> filters{
          panels, p.R * p.S * tap,
          ((h.tap + (h.taps - 1) * h.tap_step) * p.S + w.tap + (w.taps - 1) * w.tap_step) * tap,
          -h.tap_step * p.S * tap, -w.tap_step * tap};
      correlate_row<T, c.kChannels>(gather, phase_scatter<T>(p, h, w), filters,
                                    n * h.count + row / p.stride_h, p.C);
    }
  };
  dispatch_channels<T>(channels, [&](auto c) {
    const int64_t row_pixels = ceil_div(p.P * p.Q, p.H);
    parallel_for(p.N * p.H, rows_a_thread(p, row_pixels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) correlate_phases(c, i / p.H, i % p.H);
    });
  });
}

#define INSTANTIATE(T)                                     \
  template void forward_depthwise<T>(const Conv2dParams&); \
  template void input_grad_depthwise<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
