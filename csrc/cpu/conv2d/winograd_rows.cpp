// Weight gradient of 3x3 and 5x5 filters in pairs of bfloat16: Winograd's F(2,3), transposed, along rows, and
// a direct sum down columns. That takes two thirds of a direct sum's products, and the operands, rounded once
// more at the points, are sums of two there: the error is 1.9 times a direct sum's in the mean square. (Along
// both axes it would be 4/9 of the products, and the largest error 2.5 times as large instead of 2.0.) A row
// of 5 taps is in two pieces, as in winograd.cpp: 7 products where a direct sum takes 10.
//   for a range of x's channels, a part of dy's panels and a chunk of dy's rows (a task)
//     for a block of rows
//       V: the rows of x that they meet, at four points; M: they themselves; pairs are of tiles, 1x2 of dy
//       for a point, a panel, a segment of the block, a tile of channels, for a row r of taps, a piece b
//         dU[r][b][point] += V, from row r and tile b of the segment on, * M
// Each task owns its sums; those of the chunks are added in their order. The cuts depend on the shape alone.
#include <cstring>

#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/prefetch.h"
#include "cpu/conv2d/winograd.h"

#if defined(CUDA_CNN_HAS_PAIRS)

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

using winograd::V;
constexpr int kLane = kLanes<float>, kPoints = kWinogradIn<Bf16Pair>;
constexpr int kPiece = 3, kTile = winograd_out<Bf16Pair>(kPiece);
constexpr int64_t kColumns = kTileColumns<float>;
constexpr int64_t kPad = 16;
constexpr int64_t kBlockBytes = 786432;  // V and M, of an L2 of 1 MiB
constexpr int64_t kSegmentPairs = 160;   // of which V's tile and M's panel stay in L1; a chain of sums
constexpr int64_t kMostChannels = 256, kMostPanels = 8;  // of a task
constexpr int64_t kMostChunks = 8, kTasks = 4;
constexpr int64_t kChunkPairs = 256;   // so many at least are worth sums of their own,
constexpr int64_t kAllSums = 4194304;  // and those of all chunks, 16 MiB, stay in a cache

// One group.
struct Rows {
  Gather<BFloat16> gather;
  const BFloat16* dy;
  int64_t dy_pixel, outputs, panels;
  int64_t pieces;               // of a row of taps
  int64_t odd_image, odd_tile;  // from a pair's even tile to its odd one
  int64_t pairs;                // of a row, the last pieces - 1 with 0 in the place of dy
  int64_t rows, chunks, block;  // of dy's even tiles
  int64_t ranges, parts;        // of channels; of panels
  int64_t u_panel, u_chunk;     // steps of dU [chunk][panel][r][b][point][channel][kColumns]

  float* u_at(float* u, int64_t panel, int64_t r, int64_t b, int64_t point, int64_t channel) const {
    return u + panel * u_panel +
           (((r * pieces + b) * kPoints + point) * gather.channels + channel) * kColumns;
  }
};

// A block's steps, of V [point][row][pair][channel] and M [point][panel][row][pair][kColumns].
struct Steps {
  int64_t v_pair, v_point, m_panel, m_point;
};

// winograd::input of a pair. At 0 and infinity, x0 - x2 and x3 - x1, with x2 and x1 as the rounded values at
// 1 and -1 have them: the taps add up those two's errors, which then cancel.
CUDA_CNN_INLINE void inputs_at_points(const V (&x)[2][kPoints], Bf16Pair* v, int64_t step) {
  const Words sum = zip(x[0][1] + x[0][2], x[1][1] + x[1][2]);
  const Words difference = zip(x[0][2] - x[0][1], x[1][2] - x[1][1]);
  V first[2], last[2], sums[2], differences[2];
  split(sums, sum);
  split(differences, difference);
#pragma GCC unroll 2
  for (int d = 0; d < 2; ++d) {
    first[d] = winograd::plus_times(x[d][0], -0.5f, sums[d] + differences[d]);
    last[d] = winograd::plus_times(x[d][3], -0.5f, sums[d] - differences[d]);
  }
  store(v, join(first));
  store(v + step, sum);
  store(v + 2 * step, difference);
  store(v + 3 * step, join(last));
}

// Row h of image n, channels [begin, end), at the points.
template <bool kMapped>
void transform_inputs(const Rows& w, int64_t n, int64_t h, int64_t begin, int64_t end, const Steps& step,
                      Bf16Pair* v) {
  static const BFloat16 kZeros[kLane] = {};
  const Gather<BFloat16>& g = w.gather;
  for (int64_t i = 0; i < w.pairs; ++i, v += step.v_pair) {
    const BFloat16* pixels[2][kPoints];
    bool inside[2][kPoints];
    for (int d = 0; d < 2; ++d) {
      const BFloat16* row = g.source + ((n + d * w.odd_image) * g.H + h) * g.W * g.pixel;
      for (int j = 0; j < kPoints; ++j) {
        const int64_t column = g.base_w + (i + d * w.odd_tile) * kTile + j;
        inside[d][j] = h >= 0 && h < g.H && column >= 0 && column < g.W;
        pixels[d][j] = inside[d][j] ? row + column * g.pixel : kZeros;
      }
    }
    for (int64_t c = begin; c < end; c += kLane) {
      const int64_t left = g.channels - c;
      const WinogradPrologue map(g, c, left);
      V x[2][kPoints];
#pragma GCC unroll 2
      for (int d = 0; d < 2; ++d) {
#pragma GCC unroll 4
        for (int j = 0; j < kPoints; ++j) {
          const BFloat16* from = pixels[d][j] + (inside[d][j] ? c : 0);
          x[d][j] = left >= kLane ? load(from) : load_first(from, left);
          if (kMapped && inside[d][j]) x[d][j] = map(x[d][j]);
        }
      }
      inputs_at_points(x, v + c - begin, step.v_point);
    }
  }
}

// Row p of image n of dy, panels [begin, end), at the points: 0 behind its end, and behind its even tiles.
void transform_gradients(const Rows& w, int64_t n, int64_t p, int64_t begin, int64_t end, const Steps& step,
                         Bf16Pair* m) {
  const Gather<BFloat16>& g = w.gather;
  const int64_t even_end = (w.pairs - (w.pieces - 1)) * kTile;
  for (int64_t i = 0; i < w.pairs; ++i, m += kColumns) {
    for (int64_t k = begin * kColumns; k < end * kColumns; k += kLane) {
      const int64_t left = w.outputs - k;
      V points[2][kPoints];
#pragma GCC unroll 2
      for (int d = 0; d < 2; ++d) {
        const int64_t q = i * kTile < even_end ? (i + d * w.odd_tile) * kTile : g.Q;
        const BFloat16* from = w.dy + (((n + d * w.odd_image) * g.P + p) * g.Q + q) * w.dy_pixel + k;
        V y[kTile];
#pragma GCC unroll 2
        for (int j = 0; j < kTile; ++j, from += w.dy_pixel) {
          y[j] = q + j >= g.Q || left <= 0 ? V{} : left >= kLane ? load(from) : load_first(from, left);
        }
        winograd::output_transposed(points[d], y);
      }
      Bf16Pair* to = m + (k / kColumns - begin) * step.m_panel + k % kColumns;
#pragma GCC unroll 4
      for (int j = 0; j < kPoints; ++j) store(to + j * step.m_point, zip(points[0][j], points[1][j]));
    }
  }
}

// dU of channels [c_begin, c_end), panels [first, last) and rows [begin, end) of dy.
void sum_rows(const Rows& w, int64_t c_begin, int64_t c_end, int64_t first, int64_t last, int64_t begin,
              int64_t end, float* u) {
  const Gather<BFloat16>& g = w.gather;
  const int64_t most_v_rows = w.block + (w.block / g.P + 2) * (g.R - 1), count = c_end - c_begin;
  Steps step{ceil_div(count, kLane) * kLane + kPad};
  // The last piece's tiles of the last row begin behind its first.
  step.v_point = (most_v_rows * w.pairs + w.pieces - 1) * step.v_pair + kPad;
  step.m_panel = w.block * w.pairs * kColumns;
  step.m_point = (last - first) * step.m_panel + kPad;
  Bf16Pair* v = workspace<Bf16Pair>(Workspace::kA, kPoints * (step.v_point + step.m_point));
  Bf16Pair* m = v + kPoints * step.v_point;
  const auto transform = g.scale || g.relu ? transform_inputs<true> : transform_inputs<false>;
  const int64_t tiles = ceil_div(count, kTileRows), segment = max64(1, kSegmentPairs / w.pairs);

  for (int64_t block = begin; block < end; block += w.block) {
    const int64_t block_end = min64(end, block + w.block);
    // An image's rows of V are R - 1 more than of M.
    const auto v_row = [&](int64_t row) { return row - block + (row / g.P - block / g.P) * (g.R - 1); };
    for (int64_t row = block; row < block_end; ++row) {
      const int64_t n = row / g.P, p = row % g.P;
      const bool starts = row == block || p == 0;
      for (int64_t r = starts ? 0 : g.R - 1; r < g.R; ++r) {
        transform(w, n, g.base_h + p + r, c_begin, c_end, step, v + (v_row(row) + r) * w.pairs * step.v_pair);
      }
      transform_gradients(w, n, p, first, last, step, m + (row - block) * w.pairs * kColumns);
    }
    Bf16Pair* behind = v + (v_row(block_end - 1) + g.R) * w.pairs * step.v_pair;
    for (int64_t point = 0; point < kPoints; ++point, behind += step.v_point) {
      memset(behind, 0, (w.pieces - 1) * step.v_pair * sizeof(Bf16Pair));
      const int64_t pieces = point > 0 ? w.pieces : 1;  // only a row's first tap has a value at 0
      for (int64_t panel = first; panel < last; ++panel) {
        for (int64_t row = block, next; row < block_end; row = next) {
          next = min64(min64(row + segment, block_end), (row / g.P + 1) * g.P);
          const Bf16Pair* b =
              m + point * step.m_point + (panel - first) * step.m_panel + (row - block) * w.pairs * kColumns;
          const Bf16Pair* a = v + point * step.v_point + v_row(row) * w.pairs * step.v_pair;
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t c = count * t / tiles, channels = count * (t + 1) / tiles - c;
            const Tile<Bf16Pair> tile =
                find_tile<Bf16Pair>(TileOperand::kRowContiguous, channels, w.outputs - panel * kColumns);
            for (int64_t i = 0; i < g.R * pieces; ++i) {
              const int64_t r = i / pieces, piece = i % pieces;
              float* sums = w.u_at(u, panel, r, piece, point, c_begin + c);
              prefetch_output(sums, kColumns, channels, kColumns);
              tile(a + (r * w.pairs + piece) * step.v_pair + c, step.v_pair, b, (next - row) * w.pairs,
                   {sums, kColumns, nullptr, row > begin, false});
            }
          }
        }
      }
    }
  }
}

// Taps of a piece of row r from the sums of all chunks: [s][channel][kColumns] of a panel.
void transform_sums(const Rows& w, float* u, int64_t panel, int64_t r, int64_t piece, float* taps) {
  const int64_t size = w.gather.channels * kColumns, first = piece > 0;
  const float* from = w.u_at(u, panel, r, piece, 0, 0);
  for (int64_t i = 0; i < size; i += kLane) {
    V points[kPoints] = {}, result[kPiece];
    for (int64_t k = first; k < kPoints; ++k) {
      points[k] = load(from + k * size + i);
      for (int64_t chunk = 1; chunk < w.chunks; ++chunk) {
        points[k] += load(from + chunk * w.u_chunk + k * size + i);
      }
    }
    winograd::filter_transposed(result, points);
    for (int64_t s = first; s < kPiece; ++s) store(taps + s * size + i, result[s]);
  }
}

void cut(Rows& w, int64_t groups) {
  const int64_t channels = w.gather.channels;
  w.ranges = ceil_div(channels, kMostChannels);
  w.parts = ceil_div(w.panels, kMostPanels);
  const auto tasks = [&] { return w.ranges * w.parts * w.chunks * groups; };
  const int64_t most_chunks = min64(w.rows * w.pairs / kChunkPairs, kAllSums / w.u_chunk);
  for (w.chunks = 1; tasks() < kMostChunks && 2 * w.chunks <= most_chunks;) w.chunks *= 2;
  // A further part transforms x again, a further range dy.
  while (tasks() < kTasks && w.panels >= 4 * w.parts) w.parts *= 2;
  while (tasks() < kTasks && channels >= 64 * w.ranges) w.ranges *= 2;
  if (tasks() == 1 && w.panels > 1) w.parts = 2;
  const int64_t P = w.gather.P, R = w.gather.R, chunk = ceil_div(w.rows, w.chunks);
  const int64_t row_bytes =
      kPoints * 4 * w.pairs *
      ((channels / w.ranges + kPad) * (P + R - 1) / P + ceil_div(w.panels, w.parts) * kColumns);
  w.block = ceil_div(chunk, ceil_div(chunk, max64(1, kBlockBytes / row_bytes)));
}

}  // namespace

void weight_grad_winograd_rows(const Conv2dParams& p) {
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups, filter = p.R * p.S * channels;
  const Gather<BFloat16> gather = forward_gather<BFloat16>(p);
  Rows w{gather, nullptr, p.y_pixel, outputs, ceil_div(outputs, kColumns)};
  // Pairs are of a row's halves; or of the batch's, where that leaves fewer places empty.
  const int64_t tiles = ceil_div(p.Q, kTile);
  w.pieces = winograd_pieces<Bf16Pair>(p.S);
  const bool halves = (tiles % 2 || w.pieces > 1) && p.N % 2 == 0;
  w.odd_image = halves ? p.N / 2 : 0, w.odd_tile = halves ? 0 : ceil_div(tiles, 2);
  w.pairs = (halves ? tiles : w.odd_tile) + w.pieces - 1;
  w.rows = p.N * p.P / (halves ? 2 : 1);
  w.u_panel = p.R * w.pieces * kPoints * channels * kColumns;
  w.u_chunk = w.panels * w.u_panel;
  cut(w, p.groups);
  const int64_t vectors = ceil_div(channels, kLane);
  const int64_t group_size = w.chunks * w.u_chunk, tasks = w.ranges * w.parts * w.chunks;
  float* u = workspace<float>(Workspace::kShared, p.groups * group_size);
  const auto of_group = [&](int64_t group) {
    Rows rows = w;
    rows.gather = gather.of_group(group);
    rows.dy = static_cast<const BFloat16*>(p.dy) + group * outputs;
    return rows;
  };
  parallel_for(p.groups * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % w.parts, range = task / w.parts % w.ranges;
      const int64_t chunk = task / (w.parts * w.ranges) % w.chunks, group = task / tasks;
      const auto channel = [&](int64_t range) {
        return min64(channels, ceil_div(vectors * range, w.ranges) * kLane);
      };
      sum_rows(of_group(group), channel(range), channel(range + 1), w.panels * part / w.parts,
               w.panels * (part + 1) / w.parts, w.rows * chunk / w.chunks, w.rows * (chunk + 1) / w.chunks,
               u + group * group_size + chunk * w.u_chunk);
    }
  });
  parallel_for(p.groups * w.panels * p.R, 1, [&](int64_t begin, int64_t end) {
    const int64_t row = p.S * channels;
    float* taps = workspace<float>(Workspace::kC, row * kColumns);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t r = i % p.R, panel = i / p.R % w.panels, group = i / (p.R * w.panels);
      const int64_t k = panel * kColumns;
      for (int64_t piece = 0; piece < w.pieces; ++piece) {
        transform_sums(w, u + group * group_size, panel, r, piece, taps + 2 * piece * channels * kColumns);
      }
      unpack_panel_transposed(taps, outputs - k, row,
                              static_cast<BFloat16*>(p.dweight) + (group * outputs + k) * filter + r * row,
                              filter);
    }
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA

#endif
