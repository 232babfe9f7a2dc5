// Weight gradient as a matrix product whose depth are the pixels: dw[(r,s,c)][k] = sum over pixels of x * dy.
//   for a range of (r,s,c), a part of k's panels, and a chunk of the pixels where those are too few (a task)
//     for a block of pixels
//       pack x's rows [pixel][(r,s,c)], as forward does, and dy's panels [pixel][32 k]
//       for a panel of dy, for a tile of (r,s,c): sums += tile
// Each task owns its sums. Those of the chunks are added in their order. The cuts depend on the shape alone,
// so the result does not know how many threads there were; a block's sums start at 0, so that chains stay
// short. Of NCHW tensors, x's rows are packed as [(c,r,s)][pixel], and dy's are transposed into their panels.
#include "cpu/conv2d/weight_grad.h"
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/pack_nchw.h"
#include "cpu/conv2d/prefetch.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

struct WeightGradCut {
  int64_t ranges, parts, chunks, chunk, block;

  int64_t tasks(int64_t groups) const { return ranges * parts * chunks * groups; }
};

namespace {

// A panel of dy: 8 KiB, a quarter of L1. A chain of sums, too: its error grows with the root of this.
// (Four times as many in pairs, whose instruction set comes with a larger L2.)
constexpr int64_t kBlockPixels = 64;
constexpr int64_t kBlockPixelsNchw =
    192;                              // both operands are packed: longer chains write sums back less often
constexpr int64_t kRangeDepth = 448;  // x's block: 64 * 448 * 4 bytes = 112 KiB, a quarter of a small L2
constexpr int64_t kRowsAtOnce = 16;   // of x, packed before they are paired: 14 KiB
constexpr int64_t kLinesToL1 = 24;    // of the next block for a tile; more of them to L2
constexpr int64_t kTasks = 8;
constexpr int64_t kWorthATask = 200000;  // multiply-adds

WeightGradCut cut_weight_grad(int64_t pixels, int64_t depth, int64_t panels, int64_t groups,
                              int64_t block_pixels) {
  const int64_t work = pixels * depth * panels * 32 * groups;
  const int64_t tasks = max64(1, min64(kTasks, work / kWorthATask));
  WeightGradCut cut{};
  cut.ranges = ceil_div(depth, kRangeDepth);
  if (cut.ranges > 1) cut.ranges = ceil_div(cut.ranges, 4) * 4;  // even loads for 2 and 4 threads
  cut.ranges = min64(cut.ranges, ceil_div(depth, kTileRows));
  // Another part packs x again: pixels * depth. Another chunk writes, reads and adds its sums: depth * k.
  const int64_t most_parts = panels / 2, most_chunks = pixels / (2 * block_pixels);
  const int64_t wanted = ceil_div(tasks, cut.ranges * groups);
  if (pixels < 3 * 32 * panels) {
    cut.parts = even_cut(wanted, most_parts);
    cut.chunks = even_cut(ceil_div(wanted, cut.parts), most_chunks);
  } else {
    cut.chunks = even_cut(wanted, most_chunks);
    cut.parts = even_cut(ceil_div(wanted, cut.chunks), most_parts);
  }
  cut.chunk = ceil_div(pixels, cut.chunks);
  cut.block = ceil_div(cut.chunk, ceil_div(cut.chunk, block_pixels));
  cut.block += cut.block % 2;  // whole pairs
  return cut;
}

template <class T>
struct WeightGradTask {
  Gather<T> gather;  // of the group
  const T* dy;
  int64_t dy_pixel, outputs;
  const T* nchw_end;  // of x, which is NCHW, as dy is; or null
  int64_t pixel_begin, pixel_end, block, d_begin, d_end, panel_begin, panel_end;
  Accumulator<T>* sums;  // [panel][depth][kTileColumns] of the group
  T* dweight;            // of the group, where this task sums all pixels; or null
};

// The panel of dy's channels from k on: pixels [pixel, pixel + count).
template <class T, class E>
void pack_dy(const WeightGradTask<T>& t, int64_t pixel, int64_t count, int64_t k, E* panel) {
  if (!t.nchw_end) {
    return pack_panel(t.dy + pixel * t.dy_pixel + k, t.dy_pixel, t.outputs - k, count, panel);
  }
  const int64_t plane = t.gather.P * t.gather.Q;
  for (int64_t i = 0, length; i < count; i += length) {
    const int64_t n = (pixel + i) / plane, q = (pixel + i) % plane;
    length = min64(count - i, plane - q);
    pack_panel_transposed(t.dy + (n * t.dy_pixel + k) * plane + q, plane, t.outputs - k, length,
                          panel + i * kTileColumns<E>);
  }
}

// x's rows of pixels [pixel, pixel + count), [pixel][(r,s,c)], with pairs of pixels in the place of pixels.
template <class T, class E>
void pack_x(const WeightGradTask<T>& t, int64_t pixel, int64_t count, E* packed, int64_t step) {
  if constexpr (kDepthOf<E> == 1) {
    pack_positions(t.gather, pixel, count, t.d_begin, t.d_end, packed, step);
  } else {
#if defined(CUDA_CNN_HAS_PAIRS)
    const int64_t d_count = t.d_end - t.d_begin;
    const bool plain = t.gather.template is_matrix<BFloat16>();
    T* rows = plain ? nullptr : workspace<T>(Workspace::kD, kRowsAtOnce * step);
    const int64_t paired = plain ? d_count : ceil_div(d_count, kLanes<E>) * kLanes<E>;  // rows have room
    for (int64_t i = 0; i < count; i += 2, packed += step) {
      const int64_t at = i % kRowsAtOnce;
      const T* even = rows + at * step;
      if (plain) {
        even = t.gather.source + (pixel + i) * t.gather.pixel + t.d_begin;
      } else if (at == 0) {
        pack_positions(t.gather, pixel + i, min64(count - i, kRowsAtOnce), t.d_begin, t.d_end, rows, step);
      }
      pack_pairs(even, i + 1 < count ? even + (plain ? t.gather.pixel : step) : nullptr, paired, packed);
    }
#endif
  }
}

template <class T, class E>
void accumulate(const WeightGradTask<T>& t) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<E>, kDepth = kDepthOf<E>;
  // With rows of 2 KiB or more too many of a block would share a cache set. Pairs of pixels lie nowhere yet.
  const bool nchw = t.nchw_end,
             in_place = !nchw && kDepth == 1 && t.gather.template is_matrix<E>() && t.gather.pixel < 512;
  const int64_t packed_rows = nchw ? t.d_end - t.d_begin : t.block;
  const int64_t packed_columns = nchw ? t.block : t.d_end - t.d_begin;
  const int64_t packed_step = ceil_div(packed_columns, kLanes<Acc>) * kLanes<Acc> + kLanes<Acc>;
  const int64_t step = in_place ? t.gather.pixel : packed_step;
  E* packed = in_place ? nullptr : workspace<E>(Workspace::kA, ceil_div(packed_rows, kDepth) * step);
  E* b = workspace<E>(Workspace::kB, ceil_div(t.block, kDepth) * kColumns);
  const TileOperand operand = nchw ? TileOperand::kDepthContiguous : TileOperand::kRowContiguous;
  const int64_t depth = t.gather.depth(), d_count = t.d_end - t.d_begin;
  // Sums of a single block are done with at once, and stay in cache.
  const bool single = t.dweight && t.pixel_end - t.pixel_begin <= t.block;
  Acc* single_sums = single ? workspace<Acc>(Workspace::kC, d_count * kColumns) : nullptr;

  for (int64_t pixel = t.pixel_begin; pixel < t.pixel_end; pixel += t.block) {
    const int64_t count = min64(t.pixel_end - pixel, t.block);
    const int64_t next = pixel + count, next_count = min64(t.pixel_end - next, t.block);
    const E* a = packed;
    if (in_place) {
      a = reinterpret_cast<const E*>(t.gather.source) + pixel * step + t.d_begin;
    } else if (!nchw) {
      pack_x(t, pixel, count, packed, step);
    } else if constexpr (kDepth == 1) {
      pack_planes(t.gather, t.nchw_end, pixel, count, t.d_begin, t.d_end, {packed, t.block, step, 0});
    }
    Prefetch next_x = prefetch_rows(t.gather.source + next * t.gather.pixel + t.d_begin, t.gather.pixel,
                                    d_count, !nchw && t.gather.of_pixels() ? next_count : 0);
    Prefetch next_dy = prefetch_rows(t.dy + next * t.dy_pixel + t.panel_begin * kColumns, t.dy_pixel,
                                     (t.panel_end - t.panel_begin) * kColumns, nchw ? 0 : next_count);
    const int64_t tiles = ceil_div(d_count, kTileRows) * (t.panel_end - t.panel_begin);
    const int64_t x_lines = ceil_div(next_x.count(), tiles), dy_lines = ceil_div(next_dy.count(), tiles);
    next_x.to_l2 = x_lines > kLinesToL1;
    next_dy.to_l2 = dy_lines > kLinesToL1;
    for (int64_t panel = t.panel_begin; panel < t.panel_end; ++panel) {
      const int64_t k = panel * kColumns;
      pack_dy(t, pixel, count, k, b);
      Acc* sums = single ? single_sums : t.sums + (panel * depth + t.d_begin) * kColumns;
      for (int64_t d = 0; d < d_count; d += kTileRows) {
        find_tile<E>(operand, min64(d_count - d, kTileRows), t.outputs - k)(
            a + d * (nchw ? step : 1), step, b, operands<E>(count),
            {sums + d * kColumns, kColumns, nullptr, pixel > t.pixel_begin, false});
        next_x.lines(x_lines);
        next_dy.lines(dy_lines);
      }
      if (t.dweight && pixel + count == t.pixel_end) {
        unpack_panel_transposed(sums, t.outputs - k, d_count, t.dweight + k * depth + t.d_begin, depth);
      }
    }
  }
}

}  // namespace

template <class T>
void add_chunks(const Conv2dParams& p, Accumulator<T>* sums, int64_t chunks) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t outputs = p.K / p.groups, depth = p.R * p.S * p.C / p.groups;
  const int64_t panels = ceil_div(outputs, kColumns), panel_size = depth * kColumns;
  const int64_t chunk_size = p.groups * panels * panel_size;
  parallel_for(p.groups * panels, ceil_div(kBlockPixels * kRangeDepth, panel_size),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin * panel_size; i < end * panel_size; i += kLanes<Acc>) {
                   Vec<Acc> total = load(sums + i);
                   for (int64_t c = 1; c < chunks; ++c) total += load(sums + c * chunk_size + i);
                   store(sums + i, total);
                 }
                 for (int64_t panel = begin; panel < end; ++panel) {
                   const int64_t k = panel % panels * kColumns, group = panel / panels;
                   unpack_panel_transposed(sums + panel * panel_size, outputs - k, depth,
                                           static_cast<T*>(p.dweight) + (group * outputs + k) * depth, depth);
                 }
               });
}

template <class T, class E>
void weight_grad_of(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<E>;
  const int64_t outputs = p.K / p.groups, pixels = p.N * p.P * p.Q;
  const Gather<T> gather = forward_gather<T>(p);
  const T* dy = static_cast<const T*>(p.dy);
  const T* nchw_end = p.nchw ? gather.source + p.N * p.C * p.H * p.W : nullptr;
  const int64_t dy_channel = p.nchw ? p.P * p.Q : 1;
  const int64_t depth = gather.depth(), panels = ceil_div(outputs, kColumns);
  const int64_t panel_size = depth * kColumns, group_size = panels * panel_size,
                chunk_size = p.groups * group_size;
  const int64_t block_pixels = p.nchw ? kBlockPixelsNchw : kBlockPixels * kDepthOf<E> * kDepthOf<E>;
  const int64_t tiles = ceil_div(depth, kTileRows);  // of x, in ranges of as many
  const WeightGradCut cut = cut_weight_grad(pixels, depth, panels, p.groups, block_pixels);
  Acc* sums = workspace<Acc>(Workspace::kShared, pixels <= block_pixels ? 0 : cut.chunks * chunk_size);

  parallel_for(cut.tasks(p.groups), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % cut.parts, range = task / cut.parts % cut.ranges;
      const int64_t group = task / (cut.parts * cut.ranges) % p.groups;
      const int64_t chunk = task / (cut.parts * cut.ranges * p.groups);
      WeightGradTask<T> t{p.nchw ? planes_of_group(gather, group) : gather.of_group(group),
                          dy + group * outputs * dy_channel, p.y_pixel, outputs, nchw_end};
      t.pixel_begin = chunk * cut.chunk, t.pixel_end = min64(pixels, t.pixel_begin + cut.chunk);
      t.block = cut.block;
      t.d_begin = tiles * range / cut.ranges * kTileRows;
      t.d_end = min64(depth, tiles * (range + 1) / cut.ranges * kTileRows);
      t.panel_begin = panels * part / cut.parts, t.panel_end = panels * (part + 1) / cut.parts;
      t.sums = sums + chunk * chunk_size + group * group_size;
      t.dweight = cut.chunks == 1 ? static_cast<T*>(p.dweight) + group * outputs * depth : nullptr;
      accumulate<T, E>(t);
    }
  });
  if (cut.chunks > 1) add_chunks<T>(p, sums, cut.chunks);
}

template <class T>
void weight_grad_gemm(const Conv2dParams& p) {
  with_operand<T>(multiplies_pairs() && !p.nchw,
                  [&](auto operand) { weight_grad_of<T, decltype(operand)>(p); });
}

template void add_chunks<float>(const Conv2dParams&, float*, int64_t);
template void add_chunks<double>(const Conv2dParams&, double*, int64_t);
template void add_chunks<BFloat16>(const Conv2dParams&, float*, int64_t);
template void add_chunks<Half>(const Conv2dParams&, float*, int64_t);
template void weight_grad_gemm<float>(const Conv2dParams&);
template void weight_grad_gemm<double>(const Conv2dParams&);
template void weight_grad_gemm<BFloat16>(const Conv2dParams&);
template void weight_grad_gemm<Half>(const Conv2dParams&);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
