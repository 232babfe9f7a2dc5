// Forward of a layer with few input channels (a network's first): packed for a matrix product, every element
// of the image would be copied R*S times for few products each. So a band of the image's rows is copied once,
// with its padding, and a tile reads its rows there: neighbouring positions are stride_w pixels apart, and
// each row of taps is a run of S*C elements.
#include "cpu/conv2d/gemm.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kBandBytes = 65536;  // of the image, in L2
constexpr int64_t kChain = 128;        // products summed in registers, as in gemm.cpp
constexpr int64_t kMultiplyAddsATask = 100000;

template <class T>
struct Band {
  using Acc = Accumulator<T>;

  const Gather<T>& g;
  const Scatter<T>& to;
  const Acc* panels;
  const Acc* bias;  // of whole panels, or null
  int64_t columns, row_step;

  // Output positions [q, q + rows) of a row; `out` is the first's.
  void tile(const Acc* a, int64_t panel, int64_t rows, T* out) const {
    constexpr int64_t kColumns = kTileColumns<Acc>;
    const int64_t run = g.S * g.channels, runs = max64(1, kChain / run);
    const int64_t count = min64(columns - panel * kColumns, kColumns);
    const bool direct = sizeof(T) == sizeof(Acc) && count == kColumns;
    Acc sums[kTileRows * kColumns];
    TileOutput<Acc> sum{sums, kColumns, nullptr, false, false};
    if (direct) sum.c = reinterpret_cast<Acc*>(out), sum.step = to.pixel;
    const TileOfRuns<Acc> add = find_tile_of_runs<Acc>(rows, count);
    for (int64_t r = 0; r < g.R; r += runs) {
      const bool last = r + runs >= g.R;
      sum.accumulate = r > 0;
      sum.bias = last && bias ? bias + panel * kColumns : nullptr;
      sum.relu = last && to.relu;
      add(a + r * g.tap_h * row_step, g.stride_w * g.channels, min64(runs, g.R - r), run, g.tap_h * row_step,
          panels + (panel * g.R + r) * run * kColumns, sum);
    }
    if (direct) return;
    for (int64_t i = 0; i < rows; ++i, out += to.pixel) {
      for (int64_t j = 0; j < count; j += kLanes<Acc>) {
        const Vec<Acc> value = load(sums + i * kColumns + j);
        if (count - j >= kLanes<Acc>) {
          store(out + j, value);
        } else {
          store_first(out + j, value, count - j);
        }
      }
    }
  }

  // Output rows [begin, end) of image n, whose first row's first tap is at `image`.
  void rows(int64_t n, int64_t begin, int64_t end, const Acc* image) const {
    constexpr int64_t kColumns = kTileColumns<Acc>;
    const int64_t tiles = ceil_div(g.Q, kTileRows);  // of even sizes: one of a row or two keeps few sums
    for (int64_t p = begin; p < end; ++p, image += g.stride_h * row_step) {
      for (int64_t panel = 0; panel * kColumns < columns; ++panel) {
        T* out = to.out + (n * g.P + p) * g.Q * to.pixel + panel * kColumns;
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t q = g.Q * t / tiles, q_end = g.Q * (t + 1) / tiles;
          tile(image + q * g.stride_w * g.channels, panel, q_end - q, out + q * to.pixel);
        }
      }
    }
  }
};

}  // namespace

template <class T>
void correlate_few_channels(const Gather<T>& g, const Scatter<T>& to, const Filters<T>& filters, int64_t N) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t columns = filters.columns(), panels = ceil_div(columns, kColumns);
  const Gather<T> image = rows_of_image(g);
  const int64_t row_step = ceil_div(image.depth(), kLanes<Acc>) * kLanes<Acc> + kLanes<Acc>;
  const int64_t rows_bytes = row_step * g.stride_h * static_cast<int64_t>(sizeof(Acc));
  const int64_t most = max64(1, min64(g.P, kBandBytes / rows_bytes)), threads = num_threads();
  const int64_t bands = min64(g.P, ceil_div(ceil_div(g.P, most), threads) * threads);  // even loads
  const int64_t band = ceil_div(g.P, bands);

  Acc* bias = to.bias ? workspace<Acc>(Workspace::kC, panels * kColumns) : nullptr;
  for (int64_t k = 0; to.bias && k < panels * kColumns; ++k) {
    bias[k] = k < columns ? widen(to.bias[k]) : 0;
  }
  const int64_t products = band * g.Q * g.depth() * columns;
  parallel_for(N * bands, ceil_div(kMultiplyAddsATask, products), [&](int64_t begin, int64_t end) {
    const int64_t most_rows = (band - 1) * g.stride_h + (g.R - 1) * g.tap_h + 1;
    Acc* rows = workspace<Acc>(Workspace::kA, most_rows * row_step);
    Acc* own = filters.packed ? nullptr : workspace<Acc>(Workspace::kB, panels * g.depth() * kColumns);
    for (int64_t i = 0; own && i < panels; ++i) {  // each thread's: another's would come from its cache
      pack_filters(filters, 0, i * kColumns, 0, g.depth(), own + i * g.depth() * kColumns);
    }
    const Band<T> work{g, to, own ? own : filters.packed, bias, columns, row_step};
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / bands, p = g.P * (task % bands) / bands,
                    p_end = g.P * (task % bands + 1) / bands;
      const int64_t count = (p_end - p - 1) * g.stride_h + (g.R - 1) * g.tap_h + 1;
      pack_positions(image, n * image.P + p * g.stride_h, count, 0, image.depth(), rows, row_step);
      work.rows(n, p, p_end, rows);
    }
  });
}

#define INSTANTIATE(T) \
  template void correlate_few_channels(const Gather<T>&, const Scatter<T>&, const Filters<T>&, int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
