// Weight gradient by Winograd's F(4,3), F(3,4) or F(2,5), transposed: at each of the points, dU = sum over
// tiles of V^T * M, with V the transformed inputs as in winograd.cpp and M the transformed output gradients
// of a tile; then the points of dU give the taps. The tiles are cut into chunks that have sums of their own,
// and those into blocks that follow one another: every sum has one order. A thread takes whole chunks, whose
// V and M are then in no other core's caches; with more threads than chunks a thread takes a part of the
// channels and panels, for which it repeats the transforms of the other side.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/winograd.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

using winograd::V;
constexpr int kLane = kLanes<float>;
constexpr int64_t kColumns = kTileColumns<float>;
constexpr int64_t kPad = 16;
constexpr int64_t kLine = 16;  // floats of a cache line
constexpr int kIn = kWinogradIn<float>;
constexpr int64_t kPoints = kWinogradPoints<float>;
constexpr int64_t kAllSums = 2097152;  // of all chunks: 8 MiB

// One group, or a part of its channels and panels.
template <class T>
struct Sums {
  Gather<T> gather;
  const T* dy;
  int64_t channels;  // of the group
  bool planes;       // dweight is [output][channel][tap], else [output][tap][channel]
  int64_t dy_pixel, outputs, panels, tiles, chunks, block;
  int64_t v_tile, v_point;            // steps of V [point][tile][channel]
  int64_t m_panel, m_point;           // steps of M [point][panel][tile][kTileColumns]
  int64_t u_point, u_panel, u_chunk;  // steps of dU [chunk][panel][point][channel][kTileColumns]

  void lay_out() {
    v_tile = ceil_div(gather.channels, kLane) * kLane + kPad;
    v_point = block * v_tile + kPad;
    m_panel = block * kColumns;
    m_point = panels * m_panel + kPad;
    u_point = gather.channels * kColumns + kPad;
    u_panel = kPoints * u_point;
    u_chunk = panels * u_panel;
  }
  Sums part(int64_t channel, int64_t channel_end, int64_t panel, int64_t panel_end) const {
    Sums s = *this;
    s.gather.source += channel;
    if (s.gather.scale) s.gather.scale += channel, s.gather.shift += channel;
    s.gather.channels = channel_end - channel;
    s.dy += panel * kColumns;
    s.outputs -= panel * kColumns;
    s.panels = panel_end - panel;
    s.lay_out();
    return s;
  }
};

// The output gradients of tiles [begin, end) at the points, into M.
template <int kOut, class T>
void transform_gradients(const Sums<T>& w, int64_t begin, int64_t end, float* m) {
  const Gather<T>& g = w.gather;
  const int64_t row = g.Q * w.dy_pixel;
  const auto first = [&](const WinogradTile& t) {
    return w.dy + ((t.n * g.P + t.p) * g.Q + t.q) * w.dy_pixel;
  };
  for (int64_t t = begin; t < end; ++t, m += kColumns) {
    const WinogradTile tile = winograd_tile<float>(g, t);
    const T *dy = first(tile), *next = first(winograd_tile<float>(g, t + 1));
    const int64_t rows = g.P - tile.p, columns = g.Q - tile.q;
    for (int64_t k = 0; k < w.panels * kColumns; k += kLane) {
      if (k % kLine == 0) {
        for (int i = 0; i < kOut; ++i) {
          for (int j = 0; j < kOut; ++j) __builtin_prefetch(next + i * row + j * w.dy_pixel + k);
        }
      }
      const int64_t left = w.outputs - k;
      float* to = m + k / kColumns * w.m_panel + k % kColumns;
      winograd::transform_square<kIn, kOut>(
          winograd::output_transposed<kOut>,
          [&](int i, int j) __attribute__((always_inline)) {
            const T* from = dy + i * row + j * w.dy_pixel + k;
            const bool inside = i < rows && j < columns && left > 0;
            return !inside ? V{} : left >= kLane ? load(from) : load_first(from, left);
          },
          [&](int i, int j, V value)
              __attribute__((always_inline)) { store(to + (i * kIn + j) * w.m_point, value); });
    }
  }
}

// The taps [tap][channel][kTileColumns] of one panel of dU.
template <int kTaps, class T>
void transform_sums(const Sums<T>& w, const float* u, float* taps) {
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
void multiply_point(const Sums<T>& w, int64_t point, int64_t panel, const float* v, const float* m,
                    int64_t tiles, float* u, bool accumulate) {
  v += point * w.v_point;
  m += point * w.m_point + panel * w.m_panel;
  u += point * w.u_point;
  const int64_t channels = w.gather.channels, columns = w.outputs - panel * kColumns;
  for (int64_t c = 0; c < channels; c += kTileRows) {
    find_tile<float>(TileOperand::kRowContiguous, min64(channels - c, kTileRows), columns)(
        v + c, w.v_tile, m, tiles, {u + c * kColumns, kColumns, nullptr, accumulate, false});
  }
}

// V and M of tiles [begin, begin + count).
template <int kTaps, class T>
void transform_block(const Sums<T>& w, int64_t begin, int64_t count, float* v, float* m) {
  winograd_inputs<float>(w.gather, begin, begin + count, v, w.v_point, w.v_tile);
  transform_gradients<winograd_out<float>(kTaps)>(w, begin, begin + count, m);
}

template <class T>
float* block_workspace(const Sums<T>& w) {
  return workspace<float>(Workspace::kShared, kPoints * (w.v_point + w.m_point));
}

// The sums of tiles [begin, end).
template <int kTaps, class T>
void chunk_sums(const Sums<T>& w, int64_t begin, int64_t end, float* u) {
  float *v = block_workspace(w), *m = v + kPoints * w.v_point;
  for (int64_t at = begin; at < end; at += w.block) {
    const int64_t tiles = min64(w.block, end - at);
    transform_block<kTaps>(w, at, tiles, v, m);
    for (int64_t i = 0; i < w.panels * kPoints; ++i) {
      multiply_point(w, i % kPoints, i / kPoints, v, m, tiles, u + i / kPoints * w.u_panel, at > begin);
    }
  }
}

// Chunks [first, last) of those.
template <int kTaps, class T>
void chunks_sums(const Sums<T>& w, int64_t first, int64_t last, float* u) {
  for (int64_t i = first; i < last; ++i) {
    chunk_sums<kTaps>(w, w.tiles * i / w.chunks, w.tiles * (i + 1) / w.chunks, u + i * w.u_chunk);
  }
}

// From a panel's sums to its place in dweight, where w begins.
template <int kTaps, class T, class To>
void finish_panel(const Sums<T>& w, int64_t panel, const float* u, To* dweight) {
  const int64_t channels = w.gather.channels, filter = kTaps * kTaps * w.channels;
  float* taps = workspace<float>(Workspace::kC, kTaps * kTaps * channels * kColumns);
  transform_sums<kTaps>(w, u, taps);
  const int64_t outputs = w.outputs - panel * kColumns, tap_step = channels * kColumns;
  To* to = dweight + panel * kColumns * filter;
  if (w.planes) return unpack_panel_to_planes(taps, outputs, channels, kTaps * kTaps, tap_step, to, filter);
  for (int tap = 0; tap < kTaps * kTaps; ++tap, taps += tap_step, to += w.channels) {
    unpack_panel_transposed(taps, outputs, channels, to, filter);
  }
}

// All of a part, by one thread.
template <int kTaps, class T, class To>
void part_weight_grad(const Sums<T>& w, To* dweight) {
  if (w.chunks > 1 || w.tiles > w.block) {
    float* u = workspace<float>(Workspace::kD, w.chunks * w.u_chunk);
    chunks_sums<kTaps>(w, 0, w.chunks, u);
    for (int64_t panel = 0; panel < w.panels; ++panel) {
      finish_panel<kTaps>(w, panel, u + panel * w.u_panel, dweight);
    }
    return;
  }
  // A panel's sums are done with at once, and stay in cache.
  float* u = workspace<float>(Workspace::kD, w.u_panel);
  float *v = block_workspace(w), *m = v + kPoints * w.v_point;
  transform_block<kTaps>(w, 0, w.tiles, v, m);
  for (int64_t panel = 0; panel < w.panels; ++panel) {
    for (int64_t point = 0; point < kPoints; ++point)
      multiply_point(w, point, panel, v, m, w.tiles, u, false);
    finish_panel<kTaps>(w, panel, u, dweight);
  }
}

template <int kTaps, class T, class To>
void group_weight_grad(const Sums<T>& w, To* dweight) {
  if (w.chunks > 1 && w.chunks >= num_threads()) {
    float* u = workspace<float>(Workspace::kD, w.chunks * w.u_chunk);
    parallel_for(w.chunks, 1, [&](int64_t first, int64_t last) { chunks_sums<kTaps>(w, first, last, u); });
    parallel_for(w.panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t panel = first; panel < last; ++panel) {
        finish_panel<kTaps>(w, panel, u + panel * w.u_panel, dweight);
      }
    });
    return;
  }
  const int64_t vectors = ceil_div(w.channels, kLane), parts = min64(vectors, num_threads());
  const int64_t panel_parts = min64(w.panels, num_threads() / parts);
  parallel_for(parts * panel_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t c = i % parts, k = i / parts;
      const int64_t channel = vectors * c / parts * kLane, panel = w.panels * k / panel_parts;
      part_weight_grad<kTaps>(
          w.part(channel, min64(w.channels, vectors * (c + 1) / parts * kLane), panel,
                 w.panels * (k + 1) / panel_parts),
          dweight + panel * kColumns * kTaps * kTaps * w.channels + channel * (w.planes ? kTaps * kTaps : 1));
    }
  });
}

}  // namespace

template <class T, class To>
void weight_grad_winograd_sums(const Conv2dParams& p, To* dweight) {
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups;
  Sums<T> w{forward_gather<T>(p),
            static_cast<const T*>(p.dy),
            channels,
            p.weight_planes,
            p.y_pixel,
            outputs,
            ceil_div(outputs, kColumns),
            winograd_tiles<float>(forward_gather<T>(p), p.N)};
  w.lay_out();
  // A chunk's sums, points * channels * columns, are to be an eighth of its V and M, points * tiles *
  // (channels + columns), as in the end some come from another core's cache; and those of all stay in one.
  const int64_t columns = w.panels * kColumns;
  const int64_t least = max64(kTileRows, 8 * channels * columns / (channels + columns));
  const int64_t most = min64(w.tiles / least, kAllSums / w.u_chunk);
  for (w.chunks = 1; w.chunks < 8 && 2 * w.chunks <= most;) w.chunks *= 2;
  // V and M of a block stay in L2, of 1 MiB, or without chunks in two; but dU passes through memory for each
  // block, so they are not too short.
  const int64_t row_bytes = kPoints * 4 * (w.v_tile + columns), tiles = ceil_div(w.tiles, w.chunks);
  const int64_t fits = w.chunks > 1 ? max64(28, 1048576 / row_bytes) : max64(112, 2097152 / row_bytes);
  w.block = ceil_div(tiles, ceil_div(tiles, fits));
  w.lay_out();
  for (int64_t group = 0; group < p.groups; ++group) {
    Sums<T> of_group = w;
    of_group.gather = w.gather.of_group(group);
    of_group.dy += group * outputs;
    To* const to = dweight + group * outputs * p.R * p.S * channels;
    p.R == 3   ? group_weight_grad<3>(of_group, to)
    : p.R == 4 ? group_weight_grad<4>(of_group, to)
               : group_weight_grad<5>(of_group, to);
  }
}

void weight_grad_winograd(const Conv2dParams& p) {
  if (p.stride_h * p.stride_w > 1) return weight_grad_winograd_blocks(p);
  with_winograd_types(p.dtype, [&](auto type, [[maybe_unused]] auto operand) {
    using T = decltype(type);
#if defined(CUDA_CNN_HAS_PAIRS)
    if constexpr (kDepthOf<decltype(operand)> == 2) return weight_grad_winograd_rows(p);
#endif
    weight_grad_winograd_sums<T>(p, static_cast<T*>(p.dweight));
  });
}

// For winograd_blocks.cpp, whose calls add up.
template void weight_grad_winograd_sums<float>(const Conv2dParams&, float*);
template void weight_grad_winograd_sums<Half>(const Conv2dParams&, float*);
template void weight_grad_winograd_sums<BFloat16>(const Conv2dParams&, float*);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
