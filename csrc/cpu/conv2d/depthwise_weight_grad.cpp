// Weight gradient of a depthwise convolution and of narrow groups: a task sums a block of output rows for a
// part of the channels, for every tap; blocks are added in order. What a row gives is summed on its own
// first: chains stay short.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/depthwise.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int kTapRun = 3;  // taps of a row at a time
// The cut depends on the shape alone. Many channels need fewer blocks of rows, each of which has sums of its
// own.
constexpr int64_t kTasks = 32;
constexpr int64_t kPartChannels = 128;

// sums[tap][vector] += dy * x over output columns [q_begin, q_end); sums lie sum_step apart, taps x_tap.
template <class T, int kChannels, int i, int kTaps, int kVectors>
CUDA_CNN_INLINE void add_columns(const T* dy, int64_t dy_pixel, const T* x, int64_t x_step, int64_t x_tap,
                                 int64_t q_begin, int64_t q_end, int64_t left, Accumulator<T>* sums,
                                 int64_t sum_step) {
  using Acc = Accumulator<T>;
  if (q_begin >= q_end) return;
  Vec<Acc> totals[kTaps][kVectors] = {};
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
    for (int j = 0; j < kVectors; ++j) {
      Acc* to = sums + s * sum_step + j * kLanes<T>;
      store(to, load(to) + totals[s][j]);
    }
  }
}

// One row of taps and kVectors of channels, for the channels i and up of the groups: first the output columns
// where every tap of a run is inside the image, then each tap's others.
template <class T, int kChannels, int kVectors, int i = 0>
void add_tap_row(const Gather<T>& g, const T* dy, int64_t dy_pixel, const T* x, int64_t left,
                 Accumulator<T>* sums) {
  const int64_t x_step = g.stride_w * g.pixel, x_tap = g.tap_w * g.pixel,
                sum_step = kChannels * kTileColumns<Accumulator<T>>;
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
    Accumulator<T>* to = sums + i * kTileColumns<Accumulator<T>> + s * sum_step;
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
    add_tap_row<T, kChannels, kVectors, i + 1>(g, dy, dy_pixel, x, left, sums);
  }
}

// One task's sums [panel][tap][i][kTileColumns] += dy * x over one output row.
template <class T, int kChannels>
void add_row(const Gather<T>& g, const T* dy, int64_t dy_pixel, int64_t row, int64_t N, int64_t C,
             Accumulator<T>* sums) {
  constexpr int64_t kColumns = kTileColumns<Accumulator<T>>;
  const int64_t n = row / g.P, h0 = g.base_h + row % g.P * g.stride_h;
  int64_t r_begin, r_end;
  clip(h0, g.tap_h, g.H, g.R, &r_begin, &r_end);
  const T* dy_row = dy + row * g.Q * dy_pixel;
  Prefetch next_x = prefetch_next_rows(g, row, N, C);
  Prefetch next_dy = prefetch_rows(dy_row + g.Q * dy_pixel, dy_pixel, C, row + 1 < N * g.P ? g.Q : 0);
  const int64_t steps = ceil_div(C, kColumns) * max64(1, r_end - r_begin);
  const int64_t x_lines = ceil_div(next_x.count(), steps), dy_lines = ceil_div(next_dy.count(), steps);
  for (int64_t c = 0, vectors; c < C; c += vectors * kLanes<T>) {
    vectors = C - c >= 2 * kLanes<T> ? 2 : 1;
    for (int64_t r = r_begin; r < r_end; ++r) {
      const T* x = g.source + ((n * g.H + h0 + r * g.tap_h) * g.W + g.base_w) * g.pixel + c;
      Accumulator<T>* to = sums + (c / kColumns * g.R + r) * g.S * kChannels * kColumns + c % kColumns;
      const auto add = vectors == 2 ? add_tap_row<T, kChannels, 2> : add_tap_row<T, kChannels, 1>;
      next_x.lines(x_lines);
      next_dy.lines(dy_lines);
      add(g, dy_row + c, dy_pixel, x, C - c, to);
    }
  }
}

}  // namespace

template <class T>
void weight_grad_depthwise(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const Gather<T> gather = forward_gather<T>(p);
  const T* dy = static_cast<const T*>(p.dy);
  const int64_t channels = p.C / p.groups, rows = p.N * p.P, panels = ceil_div(p.C, kColumns);
  const int64_t depth = p.R * p.S * channels, panel_size = depth * kColumns, size = panels * panel_size;
  const int64_t tasks = max64(1, min64(kTasks, rows * p.Q * depth * p.C / kDepthwiseGrain));
  const int64_t parts = min64(tasks, ceil_div(p.C, kPartChannels)), blocks = min64(rows, tasks / parts);
  Acc* sums = workspace<Acc>(Workspace::kShared, blocks * size);
  parallel_for(blocks * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t block = task / parts, part = task % parts;
      const int64_t panel = panels * part / parts, panel_end = panels * (part + 1) / parts;
      const int64_t c = panel * kColumns, count = min64(p.C, panel_end * kColumns) - c;
      Acc* of_task = sums + block * size + panel * panel_size;
      for (int64_t i = 0; i < (panel_end - panel) * panel_size; i += kLanes<T>)
        store(of_task + i, Vec<Acc>{});
      Gather<T> of_part = gather;
      of_part.source += c;
      dispatch_channels<T>(channels, [&](auto group) {
        for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) {
          add_row<T, group.kChannels>(of_part, dy + c, p.y_pixel, row, p.N, count, of_task);
        }
      });
    }
  });
  parallel_for(panels, ceil_div(kDepthwiseGrain, blocks * panel_size), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      Acc* of_panel = sums + panel * panel_size;
      for (int64_t block = 1; block < blocks; ++block) {
        for (int64_t i = 0; i < panel_size; i += kLanes<T>) {
          store(of_panel + i, load(of_panel + i) + load(of_panel + block * size + i));
        }
      }
      unpack_panel_transposed(of_panel, p.K - panel * kColumns, depth,
                              static_cast<T*>(p.dweight) + panel * panel_size, depth);
    }
  });
}

template void weight_grad_depthwise<float>(const Conv2dParams&);
template void weight_grad_depthwise<double>(const Conv2dParams&);
template void weight_grad_depthwise<BFloat16>(const Conv2dParams&);
template void weight_grad_depthwise<Half>(const Conv2dParams&);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
