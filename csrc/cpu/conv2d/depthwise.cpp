// Depthwise convolution and narrow groups (as many filters as channels, at most a vector of them): no matrix
// product, lanes are output channels. With c channels a group,
//   y[k] = sum over taps, i < c of  w[tap][i][k] * x[k - k % c + i]
// and the vector of that x is a shuffle of the vector x[k]: itself where c = 1.
// Forward and input gradient: a few neighbouring output pixels share each tap's weights in a register, and
// two output rows the pixels that both read: of R rows of taps, R + 1 rows of the image and not 2R are
// loaded, each (R + 1) / 2 times from L2. Two vectors of channels at a time: with AVX2 that is a cache line,
// so that pixels which share a cache set (512 channels and more) are read once.
#include "cpu/conv2d/depthwise.h"

#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/gemm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// Output pixels of a row at a time: 32 registers hold two rows of 4 in two vectors, 16 registers of 3.
constexpr int kRun = kTileRows == 14 ? 4 : 3;

// A block of outputs: kRows rows of kPixels. Its first pixel's column w0 and source, the rows of the image
// that it reads, from the first tap of its first row.
template <class T>
struct Block {
  const Gather<T>& g;
  const Scatter<T>& to;
  int64_t h_begin, h_end, w0;
  const T* source;
  int64_t out_pixel;
};

// sums[row][pixel] += weights * x[pixel * step] for the rows kFirst to kLast, for the channels i and up of
// the groups; the weights of a row lie step_r before those of the row above it. At an edge, columns (from w
// on) outside the image are left out.
template <class T, int kChannels, int kFirst, int kLast, int kRows, int kPixels, int kVectors, bool kEdge,
          int i = 0>
CUDA_CNN_INLINE void add_tap(Vec<Accumulator<T>> (&sums)[kRows][kPixels][kVectors], const Gather<T>& g,
                             const T* x, int64_t w, const Accumulator<T>* weights, int64_t step_r,
                             int64_t left) {
  using Acc = Accumulator<T>;
  Vec<Acc> weight[kRows][kVectors];
#pragma GCC unroll 2
  for (int row = kFirst; row <= kLast; ++row) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) weight[row][j] = load(weights - row * step_r + j * kLanes<T>);
  }
  const int64_t step = g.stride_w * g.pixel;
#pragma GCC unroll 4
  for (int n = 0; n < kPixels; ++n) {
    const int64_t column = w + n * g.stride_w;
    const T* pixel = x + n * step;
    if (kEdge && (column < 0 || column >= g.W)) continue;
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      Vec<Acc> value = spread<Acc, kChannels, i>(load_vector<T, kVectors>(pixel, j, left));
      if (kFirst < kLast) pin(value);
#pragma GCC unroll 2
      for (int row = kFirst; row <= kLast; ++row) {
        sums[row][n][j] = fma(weight[row][j], value, sums[row][n][j]);
      }
    }
  }
  if constexpr (i + 1 < kChannels) {
    add_tap<T, kChannels, kFirst, kLast, kRows, kPixels, kVectors, kEdge, i + 1>(
        sums, g, x, w, weights + kTileColumns<Acc>, step_r, left);
  }
}

// The rows of the image from h_begin to h_end, which the rows kFirst to kLast of the block read.
template <class T, int kChannels, int kFirst, int kLast, int kRows, int kPixels, int kVectors, bool kEdge>
CUDA_CNN_INLINE void add_rows(Vec<Accumulator<T>> (&sums)[kRows][kPixels][kVectors], const Block<T>& block,
                              const NarrowFilters<Accumulator<T>>& filters, int64_t h_begin, int64_t h_end,
                              int64_t c, int64_t left) {
  const Gather<T>& g = block.g;
  h_begin = max64(h_begin, block.h_begin);
  h_end = min64(h_end, block.h_end);
  const int64_t tap_w = g.tap_w * g.pixel, tap_h = g.tap_h * g.W * g.pixel;
  const T* x_row = block.source + c + h_begin * tap_h;
  const Accumulator<T>* weights_row = filters.of_channel(c) + h_begin * filters.step_r;
  for (int64_t h = h_begin; h < h_end; ++h, x_row += tap_h, weights_row += filters.step_r) {
    const T* x = x_row;
    const Accumulator<T>* weights = weights_row;
    for (int64_t s = 0; s < g.S; ++s, x += tap_w, weights += filters.step_s) {
      opaque(x);
      add_tap<T, kChannels, kFirst, kLast, kRows, kPixels, kVectors, kEdge>(
          sums, g, x, block.w0 + s * g.tap_w, weights, filters.step_r, left);
    }
  }
}

// Bias, residual and ReLU of a block's sums: out of line, on sums in memory.
template <class T, int kRows, int kPixels, int kVectors>
__attribute__((noinline)) void finish(Vec<Accumulator<T>> (&sums)[kRows][kPixels][kVectors],
                                      const Scatter<T>& to, int64_t out_pixel, int64_t c, int64_t left) {
  for (int row = 0; row < kRows; ++row, out_pixel += to.step_h * to.W) {
    for (int n = 0; n < kPixels; ++n) {
      const int64_t residual = (out_pixel + n * to.step_w) * to.residual_pixel + c;
      for (int j = 0; j < kVectors; ++j) {
        Vec<Accumulator<T>>& value = sums[row][n][j];
        if (to.bias) value += load_vector<T, kVectors>(to.bias + c, j, left);
        if (to.residual) value += load_vector<T, kVectors>(to.residual + residual, j, left);
        if (to.relu) value = relu(value);
      }
    }
  }
}

// kVectors of channels of a block, from c on.
template <class T, int kChannels, int kRows, int kPixels, int kVectors, bool kEdge>
CUDA_CNN_INLINE void outputs(const Block<T>& block, const NarrowFilters<Accumulator<T>>& filters, int64_t c,
                             int64_t left) {
  using Acc = Accumulator<T>;
  const Scatter<T>& to = block.to;
  const int64_t R = block.g.R;
  Vec<Acc> sums[kRows][kPixels][kVectors] = {};
  if constexpr (kRows == 1) {
    add_rows<T, kChannels, 0, 0, kRows, kPixels, kVectors, kEdge>(sums, block, filters, 0, R, c, left);
  } else {  // of these R + 1 rows of the image the upper outputs alone read the first, the lower the last
    add_rows<T, kChannels, 0, 0, kRows, kPixels, kVectors, kEdge>(sums, block, filters, 0, 1, c, left);
    add_rows<T, kChannels, 0, 1, kRows, kPixels, kVectors, kEdge>(sums, block, filters, 1, R, c, left);
    add_rows<T, kChannels, 1, 1, kRows, kPixels, kVectors, kEdge>(sums, block, filters, R, R + 1, c, left);
  }
  if (to.bias || to.residual || to.relu) {  // a copy: the sums themselves stay in registers
    Vec<Acc> finished[kRows][kPixels][kVectors];
    memcpy(finished, sums, sizeof(sums));
    finish<T>(finished, to, block.out_pixel, c, left);
    memcpy(sums, finished, sizeof(sums));
  }
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row) {
    T* out = to.out + (block.out_pixel + row * to.step_h * to.W) * to.pixel + c;
#pragma GCC unroll 4
    for (int n = 0; n < kPixels; ++n, out += to.step_w * to.pixel) {
      opaque(out);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        if (kVectors > 1 || left >= kLanes<T>) {
          store(out + j * kLanes<T>, sums[row][n][j]);
        } else {
          store_first(out, sums[row][n][j], left);
        }
      }
    }
  }
}

template <class T, int kChannels, int kRows, int kPixels, bool kEdge>
void block_of_outputs(const Block<T>& block, const NarrowFilters<Accumulator<T>>& filters, int64_t C) {
  int64_t c = 0;
  for (; c + 2 * kLanes<T> <= C; c += 2 * kLanes<T>) {
    outputs<T, kChannels, kRows, kPixels, 2, kEdge>(block, filters, c, C - c);
  }
  for (; c < C; c += kLanes<T>) {
    outputs<T, kChannels, kRows, kPixels, 1, kEdge>(block, filters, c, C - c);
  }
}

// kRows output rows of image n, from row p on, kPixels at a time.
template <class T, int kChannels, int kRows, int kPixels>
void correlate_rows(const Gather<T>& g, const Scatter<T>& to, const NarrowFilters<Accumulator<T>>& filters,
                    int64_t n, int64_t p, int64_t C) {
  const int64_t h0 = g.base_h + p * g.stride_h;
  const int64_t out_row = (n * to.H + to.first_h + p * to.step_h) * to.W + to.first_w;
  Block<T> block{g, to};
  clip(h0, g.tap_h, g.H, g.R + kRows - 1, &block.h_begin, &block.h_end);
  for (int64_t q = 0; q < g.Q; q += kPixels) {
    q = min64(q, g.Q - kPixels);  // the last block overlaps the one before: some are computed twice, alike
    block.w0 = g.base_w + q * g.stride_w;
    block.source = g.source + ((n * g.H + h0) * g.W + block.w0) * g.pixel;
    block.out_pixel = out_row + q * to.step_w;
    const bool inside = block.w0 >= 0 && block.w0 + (kPixels - 1) * g.stride_w + (g.S - 1) * g.tap_w < g.W;
    if (inside) {
      block_of_outputs<T, kChannels, kRows, kPixels, false>(block, filters, C);
    } else {
      block_of_outputs<T, kChannels, kRows, kPixels, true>(block, filters, C);
    }
  }
}

// Pair `pair` of the output rows of all images: together where the lower row's taps are the upper one's, one
// further.
template <class T, int kChannels>
void correlate_pair(const Gather<T>& g, const Scatter<T>& to, const NarrowFilters<Accumulator<T>>& filters,
                    int64_t pair, int64_t C) {
  const int64_t pairs = ceil_div(g.P, 2), n = pair / pairs, begin = pair % pairs * 2;
  const int64_t end = min64(begin + 2, g.P);
  if (end - begin == 2 && g.R > 0 && g.stride_h == g.tap_h && g.Q >= kRun) {
    return correlate_rows<T, kChannels, 2, kRun>(g, to, filters, n, begin, C);
  }
  for (int64_t p = begin; p < end; ++p) {
    if (g.Q >= kRun) {
      correlate_rows<T, kChannels, 1, kRun>(g, to, filters, n, p, C);
    } else {
      correlate_rows<T, kChannels, 1, 1>(g, to, filters, n, p, C);
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

int64_t pairs_a_thread(const Conv2dParams& p, int64_t row_pixels) {
  return ceil_div(kDepthwiseGrain, 2 * row_pixels * (p.R * p.S * (p.C / p.groups) + 1) * p.C);
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
    const int64_t pairs = p.N * ceil_div(p.P, 2);
    parallel_for(pairs, pairs_a_thread(p, p.Q), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        correlate_pair<T, c.kChannels>(gather, to, filters, pair, p.C);
      }
    });
  });
}

// The rows of dx are stride_h phases, the pixels of a row stride_w: one after the other.
template <class T>
void input_grad_depthwise(const Conv2dParams& p) {
  constexpr int64_t kColumns = kTileColumns<Accumulator<T>>;
  const int64_t channels = p.C / p.groups, tap = channels * kColumns;
  const Accumulator<T>* panels = pack_narrow<T>(p, true);
  // Pair `pair` of an image's rows of phase h.
  const auto correlate_phases = [&](auto c, const Conv2dPhase& h, int64_t n, int64_t pair) {
    for (int64_t b = 0; b < min64(p.stride_w, p.W); ++b) {
      const Conv2dPhase w = conv2d_phase(b, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
      const Gather<T> gather = phase_gather<T>(p, h, w);
      const NarrowFilters<Accumulator<T>> filters{
          panels, p.R * p.S * tap,
          ((h.tap + (h.taps - 1) * h.tap_step) * p.S + w.tap + (w.taps - 1) * w.tap_step) * tap,
          -h.tap_step * p.S * tap, -w.tap_step * tap};
      correlate_pair<T, c.kChannels>(gather, phase_scatter<T>(p, h, w), filters,
                                     n * ceil_div(h.count, 2) + pair, p.C);
    }
  };
  dispatch_channels<T>(channels, [&](auto c) {
    const int64_t phases = min64(p.stride_h, p.H), pairs = ceil_div(ceil_div(p.H, phases), 2) * phases;
    const int64_t row_pixels = ceil_div(p.P * p.Q, p.H);
    parallel_for(p.N * pairs, pairs_a_thread(p, row_pixels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / pairs, pair = i % pairs / phases;
        const Conv2dPhase h = conv2d_phase(i % phases, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
        if (2 * pair < h.count) correlate_phases(c, h, n, pair);
      }
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
