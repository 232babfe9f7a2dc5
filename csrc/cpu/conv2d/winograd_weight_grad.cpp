// Weight gradient by Winograd's F(4,3) or F(2,5), transposed: at each of the 36 points, dU = sum over tiles
// of V^T * M, with V the transformed inputs as in winograd.cpp and M the transformed output gradients of a
// tile; then the 36 points of dU give the taps. Blocks of tiles follow one another, and points and panels go
// over the threads: every sum has one order.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/winograd.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

using winograd::V;
constexpr int kLane = kLanes<float>;
constexpr int64_t kColumns = kTileColumns<float>;
constexpr int64_t kPad = 16;

// One group.
struct Sums {
  Gather<float> gather;
  const float* dy;
  int64_t dy_pixel, outputs, panels, tiles, block;
  int64_t v_tile, v_point;   // steps of V [point][tile][channel]
  int64_t m_panel, m_point;  // steps of M [point][panel][tile][kTileColumns]
  int64_t u_point, u_panel;  // steps of dU [panel][point][channel][kTileColumns]
};

// The output gradients of tiles [begin, end) at the points, into M from its tile `at` on.
template <int kOut>
void transform_gradients(const Sums& w, int64_t begin, int64_t end, float* m, int64_t at) {
  const Gather<float>& g = w.gather;
  for (int64_t t = begin; t < end; ++t, ++at) {
    const WinogradTile tile = winograd_tile(g, t);
    const float* dy = w.dy + ((tile.n * g.P + tile.p) * g.Q + tile.q) * w.dy_pixel;
    for (int64_t k = 0; k < w.panels * kColumns; k += kLane) {
      const int64_t left = w.outputs - k;
      V y[kOut][kOut], points[6][6];
#pragma GCC unroll 4
      for (int i = 0; i < kOut; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kOut; ++j) {
          const float* from = dy + (i * g.Q + j) * w.dy_pixel + k;
          const bool inside = tile.p + i < g.P && tile.q + j < g.Q && left > 0;
          y[i][j] = !inside ? V{} : left >= kLane ? load(from) : load_first(from, left);
        }
      }
      winograd::both_sides(winograd::output_transposed<kOut>, points, y);
      float* to = m + k / kColumns * w.m_panel + at * kColumns + k % kColumns;
#pragma GCC unroll 6
      for (int i = 0; i < 6; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < 6; ++j) store(to + (i * 6 + j) * w.m_point, points[i][j]);
      }
    }
  }
}

// The taps [tap][channel][kTileColumns] of one panel of dU.
template <int kTaps>
void transform_sums(const Sums& w, const float* u, float* taps) {
  const int64_t channels = w.gather.channels;
  for (int64_t c = 0; c < channels; ++c) {
    for (int j = 0; j < kTileVectors; ++j) {
      V points[6][6], result[kTaps][kTaps];
      const float* from = u + c * kColumns + j * kLane;
#pragma GCC unroll 6
      for (int r = 0; r < 6; ++r) {
#pragma GCC unroll 6
        for (int s = 0; s < 6; ++s) points[r][s] = load(from + (r * 6 + s) * w.u_point);
      }
      winograd::both_sides(winograd::filter_transposed<kTaps>, result, points);
      for (int r = 0; r < kTaps; ++r) {
        for (int s = 0; s < kTaps; ++s)
          store(taps + ((r * kTaps + s) * channels + c) * kColumns + j * kLane, result[r][s]);
      }
    }
  }
}

void multiply_point(const Sums& w, int64_t point, int64_t panel, const float* v, const float* m,
                    int64_t tiles, float* u, bool accumulate) {
  v += point * w.v_point;
  m += point * w.m_point + panel * w.m_panel;
  u += panel * w.u_panel + point * w.u_point;
  const int64_t channels = w.gather.channels, columns = w.outputs - panel * kColumns;
  for (int64_t c = 0; c < channels; c += kTileRows) {
    find_tile<float>(TileOperand::kRowContiguous, min64(channels - c, kTileRows), columns)(
        v + c, w.v_tile, m, tiles, {u + c * kColumns, kColumns, nullptr, accumulate, false});
  }
}

template <int kTaps>
void group_weight_grad(const Sums& w, float* dweight) {
  const int64_t v_size = kWinogradPoints * w.v_point, m_size = kWinogradPoints * w.m_point;
  const int64_t channels = w.gather.channels, filter = kTaps * kTaps * channels;
  float* v = workspace<float>(Workspace::kShared, v_size + m_size + w.panels * w.u_panel);
  float *m = v + v_size, *u = m + m_size;
  for (int64_t begin = 0; begin < w.tiles; begin += w.block) {
    const int64_t tiles = min64(w.block, w.tiles - begin);
    parallel_for(tiles, 4, [&](int64_t first, int64_t last) {
      winograd_inputs(w.gather, begin + first, begin + last, v + first * w.v_tile, w.v_point, w.v_tile);
      transform_gradients<winograd_out(kTaps)>(w, begin + first, begin + last, m, first);
    });
    parallel_for(w.panels * kWinogradPoints, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        multiply_point(w, i % kWinogradPoints, i / kWinogradPoints, v, m, tiles, u, begin > 0);
      }
    });
  }
  parallel_for(w.panels, 1, [&](int64_t first, int64_t last) {
    float* taps = workspace<float>(Workspace::kC, filter * kColumns);
    for (int64_t panel = first; panel < last; ++panel) {
      transform_sums<kTaps>(w, u + panel * w.u_panel, taps);
      unpack_panel_transposed(taps, w.outputs - panel * kColumns, filter, dweight + panel * kColumns * filter,
                              filter);
    }
  });
}

}  // namespace

void weight_grad_winograd(const Conv2dParams& p) {
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups;
  Sums w{forward_gather<float>(p),
         static_cast<const float*>(p.dy),
         p.y_pixel,
         outputs,
         ceil_div(outputs, kColumns),
         winograd_tiles(forward_gather<float>(p), p.N)};
  w.v_tile = ceil_div(channels, kLane) * kLane + kPad;
  // V and M of a block stay in two L2 of 1 MiB; but dU passes through memory for each block, so they are not
  // too short.
  w.block = min64(w.tiles, max64(112, 2097152 / (kWinogradPoints * 4 * (w.v_tile + w.panels * kColumns))));
  w.v_point = w.block * w.v_tile + kPad;
  w.m_panel = w.block * kColumns;
  w.m_point = w.panels * w.m_panel + kPad;
  w.u_point = channels * kColumns + kPad;
  w.u_panel = kWinogradPoints * w.u_point;
  for (int64_t group = 0; group < p.groups; ++group) {
    Sums of_group = w;
    of_group.gather = w.gather.of_group(group);
    of_group.dy += group * outputs;
    const auto run = p.R == 3 ? group_weight_grad<3> : group_weight_grad<5>;
    run(of_group, static_cast<float*>(p.dweight) + group * outputs * p.R * p.S * channels);
  }
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
