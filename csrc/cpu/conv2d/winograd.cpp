// Winograd's F(4x4,3x3), F(3x3,4x4) and F(2x2,5x5), forward and input gradient: 36 products for 16 outputs
// where a direct sum takes 144, for 9 where it takes 144, or for 4 where it takes 100. With bfloat16 in pairs
// F(2x2,3x3): 16 products for 4 outputs where a direct sum takes 36. Of it 5x5 is made, too, in 2x2 pieces:
// the piece (a, b) meets the inputs of the tile a rows and b columns on, and its first tap, where that is
// another piece's, is 0, and so is its value at the first point: 49 products where a direct sum takes 100.
//   a block of tiles is transformed (V), as many small matrix products with the transformed filters (U) give
//   M, and the inverse transform adds bias and residual, rectifies and stores. V and M stay in L2 or near it:
//   the transformed activations never exist as a whole.
// Two schedules:
//   tiles over threads: many tiles for the filters
//   filters over threads: many filters for the tiles
// U is kept where it is small; else a panel's is made just before its use, for a block of many tiles. What
// several threads read, U or V, each makes for itself: another core's lines may come more slowly than they
// are made anew, by half of the whole layer's time.
#include "cpu/conv2d/winograd.h"

#include "cpu/conv2d/prefetch.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

using winograd::V;
constexpr int kLane = kLanes<float>;
constexpr int64_t kColumns = kTileColumns<float>;
constexpr int64_t kTilesAlone = 8;      // not worth a second thread
constexpr int64_t kTilesAhead = 2;      // whose outputs are asked for: they are stored in many short runs
constexpr int64_t kKeptU = 4194304;     // bytes, a thread's
constexpr int64_t kOwnV = 4915200;      // bytes of a block, in a thread's part of L3
constexpr int64_t kTilesAtOnce = 56;    // with M of 36 * 56 * 32 * 4 bytes = 252 KiB of L2
constexpr int64_t kTilesOfM = 84;       // whose M of one panel, 378 KiB, stays in L2 while U passes by
constexpr int64_t kStepBytes = 475136;  // of U, which then is in L2 from its making to its use
constexpr int64_t kTapsAhead = 6;       // channels of them: nine streams, too many to be foreseen
constexpr int64_t kPad = 16;            // keeps the streams of a transform off one another's cache sets

// U of one panel: [a][point][b][channel][kTileColumns] of operands for the pieces (a, b), points u_step
// apart.
template <class E>
CUDA_CNN_INLINE int64_t u_step(int64_t channels, int64_t pieces) {
  return pieces * operands<E>(channels) * kColumns + kPad;
}
CUDA_CNN_INLINE int64_t v_tile_step(int64_t channels) { return ceil_div(channels, kLane) * kLane + kPad; }

// kTaps x kTaps taps of a panel, its rows row_step apart and taps tap_step, of `channels`; of a piece's first
// row or column, where it is not its own, 0. The points are u_step apart.
template <class E, int kTaps>
void transform_panel(const E* panel, int64_t row_step, int64_t tap_step, bool own_row, bool own_column,
                     int64_t channels, int64_t u_step, E* u) {
  constexpr int kIn = kWinogradIn<E>, kDepth = kDepthOf<E>;
  for (int64_t c = 0; c < operands<E>(channels); ++c) {
    for (int tap = 0; tap < kTaps * kTaps; ++tap) {
      const E* ahead = panel + tap / kTaps * row_step + tap % kTaps * tap_step + (c + kTapsAhead) * kColumns;
      for (int j = 0; j < kTileVectors; ++j) __builtin_prefetch(ahead + j * kLane);
    }
    for (int j = 0; j < kTileVectors; ++j) {
      V taps[kDepth][kTaps][kTaps], points[kDepth][kIn][kIn];
      for (int r = 0; r < kTaps; ++r) {
        for (int s = 0; s < kTaps; ++s) {
          V values[kDepth] = {};
          if ((r > 0 || own_row) && (s > 0 || own_column)) {
            split(values, load(panel + r * row_step + s * tap_step + c * kColumns + j * kLane));
          }
          for (int k = 0; k < kDepth; ++k) taps[k][r][s] = values[k];
        }
      }
      for (int k = 0; k < kDepth; ++k) winograd::both_sides(winograd::filter<kTaps>, points[k], taps[k]);
      E* to = u + c * kColumns + j * kLane;
#pragma GCC unroll 6
      for (int r = 0; r < kIn; ++r) {
#pragma GCC unroll 6
        for (int s = 0; s < kIn; ++s) {
          V values[kDepth];
          for (int k = 0; k < kDepth; ++k) values[k] = points[k][r][s];
          store(to + (r * kIn + s) * u_step, join(values));
        }
      }
    }
  }
}

// Channels [begin, end) of the filters from `column` on.
template <class T, class E>
void transform_filters(const Filters<T, E>& filters, int64_t group, int64_t column, int64_t channels,
                       int64_t begin, int64_t end, E* u) {
  const int64_t taps = filters.R * filters.R, depth = operands<E>(channels) * kColumns;
  const E* panel = filters.packed;
  int64_t tap_step = depth;
  if (panel) {
    panel += (group * ceil_div(filters.columns(), kColumns) + column / kColumns) * taps * depth;
    panel += operands<E>(begin) * kColumns;
  } else {
    tap_step = operands<E>(end - begin) * kColumns;
    E* packed = workspace<E>(Workspace::kC, taps * tap_step);
    if (filters.planes) pack_filter_planes(filters, group, column, begin, end, packed);
    for (int64_t tap = 0; tap < taps && !filters.planes; ++tap) {
      pack_filters(filters, group, column, tap * channels + begin, tap * channels + end,
                   packed + tap * tap_step);
    }
    panel = packed;
  }
  const int64_t pieces = winograd_pieces<E>(filters.R), step = u_step<E>(end - begin, pieces);
  const int64_t row_step = filters.R * tap_step;
  auto transform = transform_panel<E, 3>;
  if constexpr (kWinogradIn<E> == 6) {
    if (filters.R == 4) transform = transform_panel<E, 4>;
    if (filters.R == 5) transform = transform_panel<E, 5>;
  }
  for (int64_t a = 0; a < pieces; ++a) {
    for (int64_t b = 0; b < pieces; ++b) {
      transform(panel + 2 * a * row_step + 2 * b * tap_step, row_step, tap_step, a == 0, b == 0, end - begin,
                step, u + a * kWinogradPoints<E> * step + b * operands<E>(end - begin) * kColumns);
    }
  }
}

// One vector of channels of one tile: m[point * point_step] to its outputs.
template <class E, int kOut, class T>
void transform_outputs(const Gather<T>& g, const Scatter<T>& to, const WinogradTile& tile, const float* m,
                       int64_t point_step, int64_t channel, int64_t left) {
  constexpr int kIn = kWinogradIn<E>;
  const bool whole = left >= kLane;
  const V bias = !to.bias ? V{} : whole ? load(to.bias + channel) : load_first(to.bias + channel, left);
  const int64_t pixel = (tile.n * to.H + tile.p) * to.W + tile.q;
  const int64_t rows = g.P - tile.p, columns = g.Q - tile.q;
  T* const out = to.out + pixel * to.pixel + channel;
  const T* const residual = to.residual ? to.residual + pixel * to.residual_pixel + channel : nullptr;
  winograd::transform_square<kOut, kIn>(
      winograd::output<kOut>,
      [&](int i, int j) __attribute__((always_inline)) { return load(m + (i * kIn + j) * point_step); },
      [&](int i, int j, V value) __attribute__((always_inline)) {
        if (i >= rows || j >= columns) return;
        const int64_t at = i * to.W + j;
        value += bias;
        if (residual) {
          const T* from = residual + at * to.residual_pixel;
          value += whole ? load(from) : load_first(from, left);
        }
        if (to.relu) value = relu(value);
        if (whole) {
          store_result<E>(out + at * to.pixel, value);
        } else {
          store_first(out + at * to.pixel, value, left);
        }
      });
}

// Steps of M [point][tile][kTileColumns].
CUDA_CNN_INLINE int64_t m_step(int64_t tiles) { return tiles * kColumns + kPad; }

// M of one panel, or what `channels` more add to it, of tiles [begin, end) whose V starts at v. Pieces side
// by side are runs of a register tile's depth.
template <class E>
void multiply_panel(const WinogradGrid<E>& grid, int64_t pieces, const E* u, const Element<E>* v,
                    int64_t v_point_step, int64_t v_tile_step, int64_t channels, int64_t columns,
                    int64_t begin, int64_t end, bool accumulate, float* m) {
  constexpr int64_t kIn = kWinogradIn<E>, kPoints = kWinogradPoints<E>;
  const int64_t depth = operands<E>(channels), tile = v_tile_step / kDepthOf<E>;
  const int64_t with_outputs = grid.outputs * grid.columns;
  for (int64_t point = 0; point < kPoints; ++point) {
    const int64_t rows = point / kIn > 0 ? pieces : 1, runs = point % kIn > 0 ? pieces : 1;
    for (int64_t t = begin, count; t < end; t += count) {
      count = min64(end - t, kTileRows);
      if (pieces > 1) {
        const int64_t at = t % grid.tiles();
        count = min64(count, (at < with_outputs ? with_outputs : grid.tiles()) - at);
        if (at >= with_outputs) continue;
      }
      const Element<E>* a = v + point * v_point_step + (t - begin) * v_tile_step;
      TileOutput<float> out{m + point * m_step(end - begin) + (t - begin) * kColumns, kColumns, nullptr,
                            accumulate, false};
      for (int64_t row = 0; row < rows; ++row, a += grid.columns * v_tile_step, out.accumulate = true) {
        const E* v_row = reinterpret_cast<const E*>(a);
        const E* u_row = u + (row * kPoints + point) * u_step<E>(channels, pieces);
        if (runs == 1) {
          find_tile<E>(TileOperand::kDepthContiguous, count, columns)(v_row, tile, u_row, depth, out);
        } else {
          find_tile_of_runs<E>(count, columns)(v_row, tile, runs, depth, tile, u_row, out);
        }
      }
    }
  }
}

// The outputs of tiles [begin, end) of one panel, whose M is m.
template <class E, class T>
void store_outputs(const Gather<T>& g, const Scatter<T>& to, int64_t columns, int64_t channel, const float* m,
                   int64_t begin, int64_t end) {
  auto transform = transform_outputs<E, winograd_out<E>(3), T>;
  if constexpr (kWinogradIn<E> == 6) {
    if (g.R == 4) transform = transform_outputs<E, winograd_out<E>(4), T>;
    if (g.R == 5) transform = transform_outputs<E, winograd_out<E>(5), T>;
  }
  for (int64_t t = begin; t < end; ++t, m += kColumns) {
    const WinogradTile tile = winograd_tile<E>(g, t);
    if (tile.p >= g.P || tile.q >= g.Q) continue;
    if (t + kTilesAhead < end) {
      const WinogradTile ahead = winograd_tile<E>(g, t + kTilesAhead);
      T* out = to.out + ((ahead.n * to.H + ahead.p) * to.W + ahead.q) * to.pixel + channel;
      for (int64_t i = 0; i < min64(g.P - ahead.p, winograd_out<E>(g.R)); ++i, out += to.W * to.pixel) {
        prefetch_output(out, to.pixel, min64(g.Q - ahead.q, winograd_out<E>(g.R)), min64(columns, kColumns));
      }
    }
    for (int64_t j = 0; j < min64(columns, kColumns); j += kLane) {
      transform(g, to, tile, m + j, m_step(end - begin), channel + j, columns - j);
    }
  }
}

// Channels whose products are summed at once. Of few tiles, M stays in L2 and U is made in steps that do,
// too. The sums are in these steps whichever schedule: the bits must not depend on the number of threads.
template <class E>
int64_t step_channels(int64_t channels, int64_t pieces, int64_t tiles) {
  const int64_t bytes = pieces * kWinogradPoints<E> * u_step<E>(channels, pieces) * 4;
  const int64_t steps = tiles <= kTilesOfM ? ceil_div(bytes, kStepBytes) : 1;
  return ceil_div(ceil_div(channels, steps), kLane) * kLane;
}

template <class T, class E>
struct Problem {
  Gather<T> gather;  // of the group
  const Scatter<T>& scatter;
  const Filters<T, E>& filters;
  int64_t group, tiles;
  const WinogradGrid<E> grid = WinogradGrid<E>(gather);
  const int64_t pieces = winograd_pieces<E>(gather.R);

  // From a tile to the last one that its last piece meets.
  int64_t halo() const { return (pieces - 1) * (grid.columns + 1); }
  int64_t columns() const { return filters.columns(); }
  int64_t panels() const { return ceil_div(columns(), kColumns); }
  bool alone() const { return panels() < num_threads() && tiles < kTilesAlone; }
  int64_t step() const { return step_channels<E>(gather.channels, pieces, tiles); }
  int64_t steps() const { return ceil_div(gather.channels, step()); }
  // V of a tile.
  int64_t tile_bytes() const {
    return kWinogradPoints<E> * static_cast<int64_t>(sizeof(Element<E>)) * v_tile_step(gather.channels);
  }
  // Whether a thread keeps all of U, or makes a panel's for each block of tiles.
  bool keeps_u() const { return panels() * steps() * u_size() * static_cast<int64_t>(sizeof(E)) <= kKeptU; }
  // U of one step of a panel.
  int64_t u_size() const { return pieces * kWinogradPoints<E> * u_step<E>(step(), pieces); }
  void transform(int64_t panel, int64_t i, E* u) const {
    transform_filters(filters, group, panel * kColumns, gather.channels, i * step(),
                      min64((i + 1) * step(), gather.channels), u);
  }
  // V of tiles [begin, end), as far as there are so many.
  void transform_inputs(int64_t begin, int64_t end, Element<E>* v, int64_t v_step) const {
    winograd_inputs<E>(gather, begin, min64(end, tiles), v, v_step, v_tile_step(gather.channels));
  }
  // Of tiles [begin, end), whose V starts at v; u_of(i) is U of step i.
  template <class UOf>
  void multiply(int64_t panel, const UOf& u_of, const Element<E>* v, int64_t v_step, int64_t begin,
                int64_t end) const {
    const int64_t left = columns() - panel * kColumns, channels = gather.channels;
    float* m = workspace<float>(Workspace::kB, kWinogradPoints<E> * m_step(end - begin));
    for (int64_t i = 0, c = 0; c < channels; ++i, c += step()) {
      multiply_panel(grid, pieces, u_of(i), v + c, v_step, v_tile_step(channels), min64(step(), channels - c),
                     left, begin, end, i > 0, m);
    }
    store_outputs<E>(gather, scatter, left, group * columns() + panel * kColumns, m, begin, end);
  }
  // The same with a U that is made now, in u.
  void make_and_multiply(int64_t panel, E* u, const Element<E>* v, int64_t v_step, int64_t begin,
                         int64_t end) const {
    const auto made = [&](int64_t i) { return transform(panel, i, u), u; };
    const auto kept = [&](int64_t) { return u; };
    if (tiles <= kTilesOfM) return multiply(panel, made, v, v_step, begin, end);
    made(0);  // the only step
    for (int64_t t = begin; t < end; t += kTilesAtOnce) {
      multiply(panel, kept, v + (t - begin) * v_tile_step(gather.channels), v_step, t,
               min64(t + kTilesAtOnce, end));
    }
  }
};

template <class T, class E>
void tiles_over_threads(const Problem<T, E>& p, int64_t block) {
  const int64_t v_step = (block + p.halo()) * v_tile_step(p.gather.channels) + kPad;
  const int64_t steps = p.steps(), blocks = ceil_div(p.tiles, block);
  const bool keeps = p.keeps_u();
  parallel_for(blocks, p.alone() ? blocks : 1, [&](int64_t first, int64_t last) {
    Element<E>* v = workspace<Element<E>>(Workspace::kA, kWinogradPoints<E> * v_step);
    E* u = workspace<E>(Workspace::kD, (keeps ? p.panels() * steps : 1) * p.u_size());
    for (int64_t i = 0; keeps && i < p.panels() * steps; ++i) {
      p.transform(i / steps, i % steps, u + i * p.u_size());
    }
    for (int64_t begin = first * block; begin < min64(last * block, p.tiles); begin += block) {
      const int64_t end = min64(begin + block, p.tiles);
      p.transform_inputs(begin, end + p.halo(), v, v_step);
      for (int64_t panel = 0; panel < p.panels(); ++panel) {
        if (keeps) {
          const auto kept = [&](int64_t i) { return u + (panel * steps + i) * p.u_size(); };
          p.multiply(panel, kept, v, v_step, begin, end);
        } else {
          p.make_and_multiply(panel, u, v, v_step, begin, end);
        }
      }
    }
  });
}

template <class T, class E>
void filters_over_threads(const Problem<T, E>& p, int64_t block) {
  const int64_t v_step = (block + p.halo()) * v_tile_step(p.gather.channels) + kPad;
  parallel_for(p.panels(), 1, [&](int64_t first, int64_t last) {
    E* u = workspace<E>(Workspace::kD, p.u_size());
    Element<E>* v = workspace<Element<E>>(Workspace::kA, kWinogradPoints<E> * v_step);
    for (int64_t begin = 0; begin < p.tiles; begin += block) {
      const int64_t end = min64(begin + block, p.tiles);
      p.transform_inputs(begin, end + p.halo(), v, v_step);
      for (int64_t panel = first; panel < last; ++panel) p.make_and_multiply(panel, u, v, v_step, begin, end);
    }
  });
}

// Whether V of `tiles` is half of an L2 of 1 MiB at the most.
template <class T, class E>
bool in_l2(const Problem<T, E>& p, int64_t tiles) {
  return tiles * p.tile_bytes() <= 524288;
}

// The most tiles of a block. With a U that is kept, which is read once for each, V and M are to be in L2, of
// 1 MiB; U takes less time for more tiles, but register tiles of 14 rows need little of it. Where U is made
// for each block anew, V is as large as is still near.
constexpr bool kShortTiles = kTileRows < 14;
template <class T, class E>
int64_t block_tiles(const Problem<T, E>& p, bool keeps_u) {
  if (!keeps_u) return max64(kTileRows, kOwnV / p.tile_bytes());
  if (kShortTiles) return (p.gather.channels > 192 ? 8 : 4) * kTileRows;
  const int64_t of_m = 262144 / (kWinogradPoints<E> * kColumns * static_cast<int64_t>(sizeof(float)));
  return max64(kTileRows, min64(524288 / p.tile_bytes(), of_m) / kTileRows * kTileRows);
}

}  // namespace

template <class T, class E>
void correlate_winograd(const Gather<T>& gather, const Scatter<T>& scatter, const Filters<T, E>& filters,
                        int64_t N, int64_t groups) {
  for (int64_t group = 0; group < groups; ++group) {
    Problem<T, E> p{gather, scatter, filters, group, winograd_tiles<E>(gather, N)};
    p.gather = p.gather.of_group(group);
    const int64_t threads = p.alone() ? 1 : num_threads(), vectors = ceil_div(p.columns(), kLane);
    const int64_t share = ceil_div(p.tiles, threads);
    const int64_t blocks = ceil_div(share, block_tiles(p, p.keeps_u()));  // of a thread
    const int64_t all_blocks = ceil_div(p.tiles, block_tiles(p, false));
    // The busiest thread's work: 1 for a tile's V, and half of that for reading it for a vector of filters
    // from beyond L2; 5 for its products with them; 36 for their U, or 45 in pairs. In halves.
    const int64_t u = kDepthOf<E> == 2 ? 180 : 144;  // a panel's
    const int64_t by_tiles = u * p.panels() * (p.keeps_u() ? 1 : blocks) +
                             share * ((in_l2(p, p.keeps_u() ? 1 : share) ? 10 : 11) * vectors + 2);
    const int64_t by_filters =
        ceil_div(p.panels(), threads) * (u * all_blocks + (in_l2(p, p.tiles) ? 20 : 22) * p.tiles) +
        2 * p.tiles;
    if (by_tiles < by_filters || p.panels() < num_threads()) {
      tiles_over_threads(p, ceil_div(p.tiles, blocks * threads));
    } else {
      filters_over_threads(p, ceil_div(p.tiles, all_blocks));
    }
  }
}

#define INSTANTIATE(T, E)                                                                              \
  template void correlate_winograd(const Gather<T>&, const Scatter<T>&, const Filters<T, E>&, int64_t, \
                                   int64_t);
INSTANTIATE(float, float)
INSTANTIATE(Half, float)
INSTANTIATE(BFloat16, float)
#if defined(CUDA_CNN_HAS_PAIRS)
INSTANTIATE(BFloat16, Bf16Pair)
#endif

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
