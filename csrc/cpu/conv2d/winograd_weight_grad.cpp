// Weight gradient by Winograd's F(4,3), F(2,5) or F(2,3), transposed: at each of the points, dU = sum over
// tiles of V^T * M, with V the transformed inputs as in winograd.cpp and M the transformed output gradients
// of a tile; then the points of dU give the taps. The tiles are cut into chunks that have sums of their own,
// and those into blocks that follow one another: every sum has one order. A thread takes whole chunks, whose
// V and M are then in no other core's caches; with more threads than chunks all share one chunk after
// another, by tiles, points and panels.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/winograd.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

using winograd::V;
constexpr int kLane = kLanes<float>;
constexpr int64_t kColumns = kTileColumns<float>;
constexpr int64_t kPad = 16;
constexpr int64_t kAllSums = 2097152;  // of all chunks: 8 MiB

// One group. Of bfloat16 the tiles of V and M are pairs.
template <class T>
struct Sums {
  Gather<T> gather;
  const T* dy;
  int64_t dy_pixel, outputs, panels, tiles, chunks, block;
  int64_t v_tile, v_point;            // steps of V [point][tile][channel]
  int64_t m_panel, m_point;           // steps of M [point][panel][tile][kTileColumns]
  int64_t u_point, u_panel, u_chunk;  // steps of dU [chunk][panel][point][channel][kTileColumns]
};

// The output gradients of a tile, the vector of channels from k on, at the points.
template <int kOut, class T>
CUDA_CNN_INLINE void gradients_at_points(const Sums<T>& w, int64_t t, int64_t k,
                                         V (&points)[kWinogradIn<T>][kWinogradIn<T>]) {
  const Gather<T>& g = w.gather;
  const WinogradTile tile = winograd_tile(g, t);
  const T* dy = w.dy + ((tile.n * g.P + tile.p) * g.Q + tile.q) * w.dy_pixel + k;
  const int64_t left = w.outputs - k;
  V y[kOut][kOut];
#pragma GCC unroll 4
  for (int i = 0; i < kOut; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kOut; ++j) {
      const T* from = dy + (i * g.Q + j) * w.dy_pixel;
      const bool inside = tile.p + i < g.P && tile.q + j < g.Q && left > 0;
      y[i][j] = !inside ? V{} : left >= kLane ? load(from) : load_first(from, left);
    }
  }
  winograd::both_sides(winograd::output_transposed<kOut>, points, y);
}

// Those of tiles [begin, end), into M from its tile `at` on.
template <int kOut, class T>
void transform_gradients(const Sums<T>& w, int64_t begin, int64_t end, PairOf<T>* m, int64_t at) {
  constexpr int kIn = kWinogradIn<T>, kDepth = kDepthOf<PairOf<T>>;
  for (int64_t t = begin; t < end; t += kDepth, at += kDepth) {
    for (int64_t k = 0; k < w.panels * kColumns; k += kLane) {
      V points[kDepth][kIn][kIn] = {};
      for (int d = 0; d < kDepth && t + d < end; ++d) gradients_at_points<kOut>(w, t + d, k, points[d]);
      PairOf<T>* to = m + k / kColumns * w.m_panel + at / kDepth * kColumns + k % kColumns;
#pragma GCC unroll 6
      for (int i = 0; i < kIn; ++i) {
#pragma GCC unroll 6
        for (int j = 0; j < kIn; ++j) {
          V values[kDepth];
          for (int d = 0; d < kDepth; ++d) values[d] = points[d][i][j];
          store(to + (i * kIn + j) * w.m_point, join(values));
        }
      }
    }
  }
}

// The taps [tap][channel][kTileColumns] of one panel of dU.
template <int kTaps, class T>
void transform_sums(const Sums<T>& w, const float* u, float* taps) {
  constexpr int kIn = kWinogradIn<T>;
  const int64_t channels = w.gather.channels;
  for (int64_t c = 0; c < channels; ++c) {
    for (int j = 0; j < kTileVectors; ++j) {
      V points[kIn][kIn], result[kTaps][kTaps];
      const float* from = u + c * kColumns + j * kLane;
#pragma GCC unroll 6
      for (int r = 0; r < kIn; ++r) {
#pragma GCC unroll 6
        for (int s = 0; s < kIn; ++s) points[r][s] = load(from + (r * kIn + s) * w.u_point);
      }
      for (int64_t chunk = 1; chunk < w.chunks; ++chunk) {
        from += w.u_chunk;
#pragma GCC unroll 6
        for (int r = 0; r < kIn; ++r) {
#pragma GCC unroll 6
          for (int s = 0; s < kIn; ++s) points[r][s] += load(from + (r * kIn + s) * w.u_point);
        }
      }
      winograd::both_sides(winograd::filter_transposed<kTaps>, result, points);
      for (int r = 0; r < kTaps; ++r) {
        for (int s = 0; s < kTaps; ++s)
          store(taps + ((r * kTaps + s) * channels + c) * kColumns + j * kLane, result[r][s]);
      }
    }
  }
}

template <class T>
void multiply_point(const Sums<T>& w, int64_t point, int64_t panel, const PairOf<T>* v, const PairOf<T>* m,
                    int64_t tiles, float* u, bool accumulate) {
  using E = PairOf<T>;
  v += point * w.v_point;
  m += point * w.m_point + panel * w.m_panel;
  u += panel * w.u_panel + point * w.u_point;
  const int64_t channels = w.gather.channels, columns = w.outputs - panel * kColumns;
  for (int64_t c = 0; c < channels; c += kTileRows) {
    find_tile<E>(TileOperand::kRowContiguous, min64(channels - c, kTileRows), columns)(
        v + c, w.v_tile, m, operands<E>(tiles), {u + c * kColumns, kColumns, nullptr, accumulate, false});
  }
}

// The sums of tiles [begin, end).
template <int kTaps, class T>
void chunk_sums(const Sums<T>& w, int64_t begin, int64_t end, float* u) {
  using E = PairOf<T>;
  constexpr int64_t kPoints = kWinogradPoints<T>, kDepth = kDepthOf<E>;
  const int64_t v_size = kPoints * w.v_point, m_size = kPoints * w.m_point;
  E *v = workspace<E>(Workspace::kShared, v_size + m_size), *m = v + v_size;
  for (int64_t at = begin; at < end; at += w.block) {
    const int64_t tiles = min64(w.block, end - at);
    parallel_for(operands<E>(tiles), 4, [&](int64_t first, int64_t last) {
      const int64_t from = at + first * kDepth, to = min64(at + last * kDepth, at + tiles);
      winograd_inputs(w.gather, from, to, v + first * w.v_tile, w.v_point, w.v_tile);
      transform_gradients<winograd_out<T>(kTaps)>(w, from, to, m, first * kDepth);
    });
    parallel_for(w.panels * kPoints, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        multiply_point(w, i % kPoints, i / kPoints, v, m, tiles, u, at > begin);
      }
    });
  }
}

template <int kTaps, class T>
void group_weight_grad(const Sums<T>& w, T* dweight) {
  constexpr int64_t kDepth = kDepthOf<PairOf<T>>;
  const int64_t channels = w.gather.channels, filter = kTaps * kTaps * channels;
  const int64_t rows = operands<PairOf<T>>(w.tiles);
  float* u = workspace<float>(Workspace::kD, w.chunks * w.u_chunk);
  parallel_for(w.chunks, w.chunks < num_threads() ? w.chunks : 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      chunk_sums<kTaps>(w, rows * i / w.chunks * kDepth, min64(w.tiles, rows * (i + 1) / w.chunks * kDepth),
                        u + i * w.u_chunk);
    }
  });
  parallel_for(w.panels, 1, [&](int64_t first, int64_t last) {
    float* taps = workspace<float>(Workspace::kC, filter * kColumns);
    for (int64_t panel = first; panel < last; ++panel) {
      transform_sums<kTaps>(w, u + panel * w.u_panel, taps);
      unpack_panel_transposed(taps, w.outputs - panel * kColumns, filter, dweight + panel * kColumns * filter,
                              filter);
    }
  });
}

template <class T>
void weight_grad_of(const Conv2dParams& p) {
  constexpr int64_t kPoints = kWinogradPoints<T>, kDepth = kDepthOf<PairOf<T>>;
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups;
  Sums<T> w{forward_gather<T>(p),
            static_cast<const T*>(p.dy),
            p.y_pixel,
            outputs,
            ceil_div(outputs, kColumns),
            winograd_tiles(forward_gather<T>(p), p.N)};
  w.v_tile = ceil_div(channels, kLane) * kLane + kPad;
  w.u_point = channels * kColumns + kPad;
  w.u_panel = kPoints * w.u_point;
  w.u_chunk = w.panels * w.u_panel;
  // A chunk's sums, points * channels * columns, are not to outweigh its V and M, points * tiles * (channels
  // + columns), and those of all stay in a cache.
  const int64_t columns = w.panels * kColumns;
  const int64_t least = max64(kTileRows, channels * columns / (channels + columns)) * kDepth;
  const int64_t most = min64(w.tiles / least, kAllSums / w.u_chunk);
  for (w.chunks = 1; w.chunks < 8 && 2 * w.chunks <= most;) w.chunks *= 2;
  // V and M of a block stay in L2, of 1 MiB, or without chunks in two; but dU passes through memory for each
  // block, so they are not too short.
  const int64_t row_bytes = kPoints * 4 * (w.v_tile + columns), rows = ceil_div(w.tiles, kDepth * w.chunks);
  const int64_t fits =
      w.chunks > 1 ? max64(28, 1048576 / row_bytes) : max64(112 / kDepth, 2097152 / row_bytes);
  w.block = ceil_div(rows, ceil_div(rows, fits)) * kDepth;
  w.v_point = w.block / kDepth * w.v_tile + kPad;
  w.m_panel = w.block / kDepth * kColumns;
  w.m_point = w.panels * w.m_panel + kPad;
  for (int64_t group = 0; group < p.groups; ++group) {
    Sums<T> of_group = w;
    of_group.gather = w.gather.of_group(group);
    of_group.dy += group * outputs;
    T* dweight = static_cast<T*>(p.dweight) + group * outputs * p.R * p.S * channels;
    if constexpr (kWinogradIn<T> == 6) {
      if (p.R == 5) {
        group_weight_grad<5>(of_group, dweight);
        continue;
      }
    }
    group_weight_grad<3>(of_group, dweight);
  }
}

}  // namespace

void weight_grad_winograd(const Conv2dParams& p) {
  with_winograd_type(p.dtype, [&](auto type) { weight_grad_of<decltype(type)>(p); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
