// Winograd's F(4x4,3x3) and F(2x2,5x5), forward and input gradient: 36 products for 16 outputs where a direct
// sum takes 144, or for 4 where it takes 100.
//   a block of tiles is transformed (V), 36 small matrix products with the transformed filters (U) give M,
//   and the inverse transform adds bias and residual, rectifies and stores. V and M stay in L2 or near it:
//   the transformed activations never exist as a whole.
// Two schedules:
//   tiles over threads, all filters transformed up front: few channels, many tiles; a thread's V and M fit L2
//   filters over threads, V shared: many channels; a panel's U is made just before its use, and used for many
//   tiles
#include "cpu/conv2d/winograd.h"

#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

using winograd::V;
constexpr int kLane = kLanes<float>;
constexpr int64_t kColumns = kTileColumns<float>;
constexpr int64_t kPad = 16;  // keeps the 36 streams of a transform off one another's cache sets

// U of one panel: [point][channel][kTileColumns], points u_step apart.
CUDA_CNN_INLINE int64_t u_step(int64_t channels) { return channels * kColumns + kPad; }
CUDA_CNN_INLINE int64_t v_tile_step(int64_t channels) { return ceil_div(channels, kLane) * kLane + kPad; }

template <int kTaps>
void transform_panel(const float* panel, int64_t channels, float* u) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int j = 0; j < kTileVectors; ++j) {
      V taps[kTaps][kTaps], points[6][6];
      for (int r = 0; r < kTaps; ++r) {
        for (int s = 0; s < kTaps; ++s)
          taps[r][s] = load(panel + ((r * kTaps + s) * channels + c) * kColumns + j * kLane);
      }
      winograd::both_sides(winograd::filter<kTaps>, points, taps);
      float* to = u + c * kColumns + j * kLane;
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) {
#pragma GCC unroll 6
        for (int s = 0; s < 6; ++s) store(to + (r * 6 + s) * u_step(channels), points[r][s]);
      }
    }
  }
}

void transform_filters(const Filters<float>& filters, int64_t group, int64_t column, int64_t channels,
                       float* u) {
  const int64_t panel_size = filters.depth() * kColumns;
  const float* panel = filters.packed;
  if (panel) {
    panel += (group * ceil_div(filters.columns(), kColumns) + column / kColumns) * panel_size;
  } else {
    float* packed = workspace<float>(Workspace::kC, panel_size);
    pack_filters(filters, group, column, packed);
    panel = packed;
  }
  const auto transform = filters.R == 3 ? transform_panel<3> : transform_panel<5>;
  transform(panel, channels, u);
}

// One vector of channels of one tile: m[point * point_step] to its outputs.
template <int kOut>
void transform_outputs(const Gather<float>& g, const Scatter<float>& to, const WinogradTile& tile,
                       const float* m, int64_t point_step, int64_t channel, int64_t left) {
  V products[6][6], y[kOut][kOut];
#pragma GCC unroll 6
  for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
    for (int j = 0; j < 6; ++j) products[i][j] = load(m + (i * 6 + j) * point_step);
  }
  winograd::both_sides(winograd::output<kOut>, y, products);
  const bool whole = left >= kLane;
  const V bias = !to.bias ? V{} : whole ? load(to.bias + channel) : load_first(to.bias + channel, left);
  const int64_t pixel = (tile.n * to.H + tile.p) * to.W + tile.q;
#pragma GCC unroll 4
  for (int i = 0; i < kOut; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kOut; ++j) {
      if (tile.p + i >= g.P || tile.q + j >= g.Q) continue;
      const int64_t at = pixel + i * to.W + j;
      V value = y[i][j] + bias;
      if (to.residual) {
        const float* residual = to.residual + at * to.residual_pixel + channel;
        value += whole ? load(residual) : load_first(residual, left);
      }
      if (to.relu) value = relu(value);
      float* out = to.out + at * to.pixel + channel;
      if (whole) {
        store(out, value);
      } else {
        store_first(out, value, left);
      }
    }
  }
}

// The products of one panel with the tiles [begin, end), whose V starts at v, and their outputs.
void multiply_panel(const Gather<float>& g, const Scatter<float>& to, int64_t columns, int64_t channel,
                    const float* u, const float* v, int64_t v_point_step, int64_t begin, int64_t end) {
  const int64_t tiles = end - begin, point_step = tiles * kColumns + kPad,
                tile_step = v_tile_step(g.channels);
  float* m = workspace<float>(Workspace::kB, kWinogradPoints * point_step);
  for (int point = 0; point < kWinogradPoints; ++point) {
    for (int64_t t = 0; t < tiles; t += kTileRows) {
      find_tile<float>(TileOperand::kDepthContiguous, min64(tiles - t, kTileRows), columns)(
          v + point * v_point_step + t * tile_step, tile_step, u + point * u_step(g.channels), g.channels,
          {m + point * point_step + t * kColumns, kColumns, nullptr, false, false});
    }
  }
  const auto transform = g.R == 3 ? transform_outputs<winograd_out(3)> : transform_outputs<winograd_out(5)>;
  for (int64_t t = 0; t < tiles; ++t) {
    const WinogradTile tile = winograd_tile(g, begin + t);
    for (int64_t j = 0; j < min64(columns, kColumns); j += kLane) {
      transform(g, to, tile, m + t * kColumns + j, point_step, channel + j, columns - j);
    }
  }
}

struct Problem {
  Gather<float> gather;  // of the group
  const Scatter<float>& scatter;
  const Filters<float>& filters;
  int64_t group, tiles;

  int64_t columns() const { return filters.columns(); }
  int64_t panels() const { return ceil_div(columns(), kColumns); }
  int64_t u_size() const { return kWinogradPoints * u_step(gather.channels); }
  void multiply(int64_t panel, const float* u, const float* v, int64_t v_step, int64_t begin,
                int64_t end) const {
    multiply_panel(gather, scatter, columns() - panel * kColumns, group * columns() + panel * kColumns, u, v,
                   v_step, begin, end);
  }
};

void tiles_over_threads(const Problem& p, int64_t block) {
  const int64_t channels = p.gather.channels, v_step = block * v_tile_step(channels) + kPad;
  float* u = workspace<float>(Workspace::kShared, p.panels() * p.u_size());
  parallel_for(p.panels(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      transform_filters(p.filters, p.group, panel * kColumns, channels, u + panel * p.u_size());
    }
  });
  parallel_for(ceil_div(p.tiles, block), 1, [&](int64_t first, int64_t last) {
    float* v = workspace<float>(Workspace::kA, kWinogradPoints * v_step);
    for (int64_t begin = first * block; begin < min64(last * block, p.tiles); begin += block) {
      const int64_t end = min64(begin + block, p.tiles);
      winograd_inputs(p.gather, begin, end, v, v_step, v_tile_step(channels));
      for (int64_t panel = 0; panel < p.panels(); ++panel) {
        p.multiply(panel, u + panel * p.u_size(), v, v_step, begin, end);
      }
    }
  });
}

void filters_over_threads(const Problem& p, int64_t block) {
  const int64_t channels = p.gather.channels, tile_step = v_tile_step(channels),
                v_step = block * tile_step + kPad;
  float* v = workspace<float>(Workspace::kShared, kWinogradPoints * v_step);
  for (int64_t begin = 0; begin < p.tiles; begin += block) {
    const int64_t end = min64(begin + block, p.tiles);
    parallel_for(end - begin, 4, [&](int64_t first, int64_t last) {
      winograd_inputs(p.gather, begin + first, begin + last, v + first * tile_step, v_step, tile_step);
    });
    parallel_for(p.panels(), 1, [&](int64_t first, int64_t last) {
      float* u = workspace<float>(Workspace::kD, p.u_size());
      for (int64_t panel = first; panel < last; ++panel) {
        transform_filters(p.filters, p.group, panel * kColumns, channels, u);
        // M of 56 tiles: 36 * 56 * 32 * 4 bytes = 252 KiB of L2.
        for (int64_t t = begin; t < end; t += 56) {
          p.multiply(panel, u, v + (t - begin) * tile_step, v_step, t, min64(t + 56, end));
        }
      }
    });
  }
}

}  // namespace

namespace {

// The prologue of one vector of channels.
struct ChannelMap {
  V scale, shift;
  bool rectify;

  ChannelMap(const Gather<float>& g, int64_t channel, int64_t left)
      : scale(broadcast(1.0f)), shift(V{}), rectify(g.relu) {
    if (!g.scale) return;
    scale = left >= kLane ? load(g.scale + channel) : load_first(g.scale + channel, left);
    shift = left >= kLane ? load(g.shift + channel) : load_first(g.shift + channel, left);
  }
  V operator()(V x) const {
    x = fma(x, scale, shift);
    return rectify ? relu(x) : x;
  }
};

template <bool kMapped>
void transform_inputs(const Gather<float>& g, int64_t begin, int64_t end, float* out, int64_t point_step,
                      int64_t tile_step) {
  static const float kZeros[kLane] = {};
  for (int64_t t = begin; t < end; ++t, out += tile_step) {
    const WinogradTile tile = winograd_tile(g, t);
    const float* pixels[6][6];
    int64_t step[6][6];  // 0 outside the image: the same zeros for every channel
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 6; ++j) {
        const int64_t h = g.base_h + tile.p + i, w = g.base_w + tile.q + j;
        const bool inside = h >= 0 && h < g.H && w >= 0 && w < g.W;
        pixels[i][j] = inside ? g.source + ((tile.n * g.H + h) * g.W + w) * g.pixel : kZeros;
        step[i][j] = inside;
      }
    }
    for (int64_t c = 0; c < g.channels; c += kLane) {
      V x[6][6], points[6][6];
      const int64_t left = g.channels - c;
      const ChannelMap map(g, c, left);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) {
          const float* from = pixels[i][j] + c * step[i][j];
          x[i][j] = left >= kLane ? load(from) : load_first(from, left);
          if (kMapped && step[i][j]) x[i][j] = map(x[i][j]);
        }
      }
      winograd::both_sides(winograd::input, points, x);
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(out + (i * 6 + j) * point_step + c, points[i][j]);
      }
    }
  }
}

}  // namespace

void winograd_inputs(const Gather<float>& g, int64_t begin, int64_t end, float* out, int64_t point_step,
                     int64_t tile_step) {
  if (g.scale || g.relu) {
    transform_inputs<true>(g, begin, end, out, point_step, tile_step);
  } else {
    transform_inputs<false>(g, begin, end, out, point_step, tile_step);
  }
}

void correlate_winograd(const Gather<float>& gather, const Scatter<float>& scatter,
                        const Filters<float>& filters, int64_t N, int64_t groups) {
  for (int64_t group = 0; group < groups; ++group) {
    Problem p{gather, scatter, filters, group, winograd_tiles(gather, N)};
    p.gather = p.gather.of_group(group);
    // A thread's V of a block is to fill half of a 1 MiB L2.
    const int64_t fits = 524288 / (kWinogradPoints * 4 * v_tile_step(gather.channels));
    const int64_t most = max64(1, min64(fits / kTileRows, 4)) * kTileRows;
    const bool few_tiles = p.tiles < 2 * kTileRows * num_threads();
    if ((gather.channels <= 128 && !few_tiles) || p.panels() < num_threads()) {
      // As many blocks for each thread.
      const int64_t blocks = ceil_div(ceil_div(p.tiles, most), num_threads()) * num_threads();
      tiles_over_threads(p, ceil_div(p.tiles, blocks));
    } else {
      filters_over_threads(p, min64(p.tiles, 196));
    }
  }
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
