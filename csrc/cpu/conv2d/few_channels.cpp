// Input gradient of a layer with few input channels (a network's first): of a direct sum's columns, the
// channels, most lanes would be empty. So every product comes first, with a column a (tap, channel),
//   Y[n,p,q][(r,s,c)] = sum over k of  dy[n,p,q,k] * w[k,r,s,c]
// which is a matrix product on dy as it lies, and then each pixel adds up what its taps gave:
//   dx[n,h,w,c] = sum over r, s of  Y[n,p,q][(r,s,c)]     for the p and q that h and w stem from
// Of Y only the rows that the next row of dx needs exist, in a ring of rows that stays in L2.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/gemm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kBatchPixels = 96;  // rows of Y are made so many pixels at a time, or one by one
constexpr int64_t kMultiplyAddsAThread = 100000;

// The taps that meet index h of dx on one axis: tap, tap + tap_step, … (`count`), at p = at, at - dy_step, …
struct Reach {
  int64_t tap, at, count;
};

Reach reach(int64_t index, int64_t in, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
            int64_t out) {
  const Conv2dPhase phase = conv2d_phase(index % stride, in, kernel, stride, pad, dilation);
  const int64_t first = phase.base + index / stride;
  const int64_t begin = first >= out ? ceil_div(first - out + 1, phase.dy_step) : 0;
  const int64_t end = first < 0 ? 0 : min64(phase.taps, first / phase.dy_step + 1);
  return {phase.tap + begin * phase.tap_step, first - begin * phase.dy_step, max64(end - begin, 0)};
}

// Where a column of dx finds its summands in a row of Y: `count` of them, from `offset` on.
struct Column {
  int64_t offset, count;
};

template <class T>
struct FewChannels {
  using Acc = Accumulator<T>;

  const Conv2dParams& p;
  const Acc* panels;
  const Column* columns;
  int64_t width;        // of Y: taps and channels, up to whole panels
  int64_t batch, ring;  // rows of Y; the ring has whole batches
  Conv2dPhase h, w;     // of which only the steps are used

  int64_t row_size() const { return p.Q * width; }

  // Rows [first, first + count) of image n.
  void multiply(int64_t n, int64_t first, int64_t count, Acc* y) const {
    const T* dy = static_cast<const T*>(p.dy) + (n * p.P + first) * p.Q * p.y_pixel;
    const int64_t pixels = count * p.Q;
    int64_t pixel = p.y_pixel;
    const Acc* rows;
    if constexpr (sizeof(T) == sizeof(Acc)) {
      rows = dy;
    } else {
      const Gather<T> gather{dy, 1, pixels, pixel, 1, pixels, 1, 1, 0, 0, 1, 1, 1, 1, p.K};
      pixel = ceil_div(p.K, kLanes<Acc>) * kLanes<Acc> + kLanes<Acc>;
      Acc* packed = workspace<Acc>(Workspace::kD, pixels * pixel);
      pack_positions(gather, 0, pixels, 0, p.K, packed, pixel);
      rows = packed;
    }
    const Gather<Acc> gather{rows, 1, pixels, pixel, 1, pixels, 1, 1, 0, 0, 1, 1, 1, 1, p.K};
    const Filters<Acc> filters{nullptr, 1, 1, p.K, width, false, {}, {}, panels};
    correlate(gather, Scatter<Acc>{y + first % ring * row_size(), 1, pixels, width}, filters, 1, 1);
  }

  void sum_row(int64_t n, int64_t row, const Acc* y) const {
    const Reach taps = reach(row, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h, p.P);
    const int64_t step = w.tap_step * p.C - w.dy_step * width;
    T* to = static_cast<T*>(p.dx) + (n * p.H + row) * p.W * p.x_pixel;
    // A whole vector spills into the pixels to the right, which are written later.
    const int64_t whole = p.x_pixel == p.C ? p.W * p.C - kLanes<T> : -1;
    for (int64_t j = 0; j < p.W; ++j, to += p.x_pixel) {
      Vec<Acc> total = {};
      for (int64_t i = 0; i < taps.count; ++i) {
        const Acc* from = y + (taps.at - i * h.dy_step) % ring * row_size() +
                          (taps.tap + i * h.tap_step) * p.S * p.C + columns[j].offset;
        for (int64_t k = 0; k < columns[j].count; ++k) total += load(from + k * step);
      }
      if (j * p.C <= whole) {
        store(to, total);
      } else {
        store_first(to, total, p.C);
      }
    }
  }

  // Rows [begin, end) of all images' dx.
  void run(int64_t begin, int64_t end) const {
    Acc* y = workspace<Acc>(Workspace::kC, ring * row_size() + kLanes<Acc>);
    for (int64_t i = begin, next = 0; i < end; ++i) {
      const int64_t n = i / p.H, row = i % p.H;
      if (i == begin || row == 0) {
        next = max64(0, row + p.pad_h - (p.R - 1) * p.dilation_h) / p.stride_h / batch * batch;
      }
      for (; next < p.P && next * p.stride_h <= row + p.pad_h; next += batch) {
        multiply(n, next, min64(batch, p.P - next), y);
      }
      sum_row(n, row, y);
    }
  }
};

}  // namespace

template <class T>
void input_grad_few_channels(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t filter = p.R * p.S * p.C, width = ceil_div(filter, kColumns) * kColumns;
  Acc* panels = workspace<Acc>(Workspace::kShared, width * p.K + p.W * sizeof(Column) / sizeof(Acc));
  for (int64_t i = 0; i < width; i += kColumns) {
    pack_panel(static_cast<const T*>(p.weight) + i, filter, filter - i, p.K, panels + i * p.K);
  }
  Column* columns = reinterpret_cast<Column*>(panels + width * p.K);
  for (int64_t j = 0; j < p.W; ++j) {
    const Reach taps = reach(j, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w, p.Q);
    columns[j] = {taps.at * width + taps.tap * p.C, taps.count};
  }
  FewChannels<T> gradient{p, panels, columns, width};
  gradient.h = conv2d_phase(0, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
  gradient.w = conv2d_phase(0, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
  gradient.batch = min64(p.P, ceil_div(kBatchPixels, p.Q));
  // A row of dx stems from rows of dy at most so far apart.
  const int64_t span = (p.R - 1) * p.dilation_h / p.stride_h + 2;
  gradient.ring = ceil_div(min64(p.P, span + gradient.batch), gradient.batch) * gradient.batch;
  parallel_for(p.N * p.H, ceil_div(kMultiplyAddsAThread * p.H, p.P * p.Q * p.K * width),
               [&](int64_t begin, int64_t end) { gradient.run(begin, end); });
}

template void input_grad_few_channels<float>(const Conv2dParams&);
template void input_grad_few_channels<double>(const Conv2dParams&);
template void input_grad_few_channels<BFloat16>(const Conv2dParams&);
template void input_grad_few_channels<Half>(const Conv2dParams&);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
