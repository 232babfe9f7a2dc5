// Forward and input gradient as implicit matrix products:
//   for a block of positions and a range of channel panels (a task)
//     for a block of depth, for as many panels as L2 holds beside A
//       pack the panels that are not yet              in the thread's own caches
//       for a tile of rows
//         pack the rows that are not yet              A: kBlockRows * kBlockDepth, stays in L2
//         for a panel                                 B: kBlockDepth * 32 columns, from L2
//           out += rows * panel                       in registers
// Every element's sum has one order, whatever the tasks: blocks of depth from 0 upwards, each in chains of
// kChain.
#include "cpu/conv2d/gemm.h"

#include "cpu/conv2d/prefetch.h"
#include "cpu/parallel.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

struct GemmTasks {
  int64_t tiles, blocks, channel_parts;
};

namespace {

// A's block is read once a panel, and stays in an L2 of 512 KiB; B comes from L2 or L3, a line for each
// kBlockRows * 2 multiply-adds at the least, which the prefetcher hides.
constexpr int64_t kBlockDepth = 1024;  // operands, as kChain
constexpr int64_t kBlockRows = 168;
constexpr int64_t kBlockBytes = 344064;
constexpr int64_t kGroupBytes = 262144;  // of panels that stay there beside A
constexpr int64_t kPieceBytes = 16384;   // of A, packed for the tiles that follow, which find it in L1
constexpr int64_t kLinesToL1 = 128;      // of the source's rows for the next tile; more of them to L2
constexpr int64_t kKeptBytes = 2097152;  // of a thread's own panels
// Rows so far apart, or a multiple of it, share a set of L1: 8 lines.
constexpr int64_t kSetsBytes = 4096;
// Products summed in registers before they join the rest: the error grows with the root of this.
constexpr int64_t kChain = 256;
// Below so many multiply-adds a thread is not worth waking.
constexpr int64_t kWorthAThread = 100000;

// The depth is cut into equal blocks, each of whole rows of taps, whole taps, or channels of one tap.
struct DepthBlocks {
  int64_t depth, unit, tap_depth, blocks_per_tap, size;
};

template <class E, class T>
DepthBlocks cut_depth(const Gather<T>& g) {
  constexpr int64_t kMost = kBlockDepth * kDepthOf<E>;
  DepthBlocks cut{g.depth(), 0, g.channels, 0, 0};
  if (g.channels > kMost) {
    cut.blocks_per_tap = ceil_div(g.channels, kMost);
    cut.size = ceil_div(ceil_div(g.channels, cut.blocks_per_tap), kLanes<T>) * kLanes<T>;
  } else {
    cut.unit = g.S * g.channels <= kMost ? g.S * g.channels : g.channels;
    const int64_t units = cut.depth / cut.unit;
    const int64_t blocks = ceil_div(units, kMost / cut.unit);
    cut.size = ceil_div(units, blocks) * cut.unit;
  }
  return cut;
}

template <class E>
int64_t block_tiles(const DepthBlocks& cut) {
  const int64_t row_bytes = cut.size * static_cast<int64_t>(sizeof(Element<E>));
  return max64(1, min64(kBlockRows, kBlockBytes / row_bytes) / kTileRows);
}

// The end of the block that begins at `begin`.
CUDA_CNN_INLINE int64_t block_end(const DepthBlocks& cut, int64_t begin) {
  const int64_t limit = cut.blocks_per_tap ? (begin / cut.tap_depth + 1) * cut.tap_depth : cut.depth;
  return min64(begin + cut.size, limit);
}

// What a thread packs for itself, just before its first use: a line that another core has written takes
// longer to come than to pack.
template <class E>
struct OwnPanels {
  E* panels;   // null where the filters are packed already
  bool kept;   // whole panels, from panel_begin on, for the tasks that follow; or only those in work
  bool there;  // kept by a task before this one
};

template <class E>
struct Panels {
  const E* first;
  int64_t step;
};

template <class T, class E>
struct Task {
  const Gather<T>& gather;
  const Scatter<T>& scatter;
  const Filters<T, E>& filters;
  int64_t group;
  int64_t channel;  // the group's first
  int64_t columns;
  int64_t position, count;
  int64_t panel_begin, panel_end;
  OwnPanels<E> own;
  bool linear;            // rows of the output are scatter.pixel apart
  const int64_t* pixels;  // of the output, a position's, where they are not
};

// Column 0 of `out`: what fills up the last pair.
template <class T>
void zero_column(T* out, int64_t rows, int64_t step) {
  for (int64_t i = 0; i < rows; ++i) out[i * step] = T{};
}

// pixels[i] of the output for positions position + i.
template <class T, class E>
void list_pixels(const Task<T, E>& t, int64_t* pixels) {
  const Scatter<T>& to = t.scatter;
  const int64_t P = t.gather.P, Q = t.gather.Q;
  int64_t q = t.position % Q, p = t.position / Q % P, n = t.position / (Q * P);
  for (int64_t i = 0; i < t.count; ++i) {
    pixels[i] = (n * to.H + to.first_h + p * to.step_h) * to.W + to.first_w + q * to.step_w;
    if (++q == Q) {
      q = 0;
      if (++p == P) p = 0, ++n;
    }
  }
}

// bias, residual, ReLU, narrowing: `rows` x `columns` of c, which has step kTileColumns.
template <class T, class E>
void finish(const Task<T, E>& t, int64_t position, int64_t rows, int64_t channel, int64_t columns,
            const Accumulator<T>* c) {
  using Acc = Accumulator<T>;
  constexpr int kWidth = kLanes<Acc>;
  const Scatter<T>& to = t.scatter;
  for (int64_t j = 0; j < columns; j += kWidth, channel += kWidth) {
    const int64_t left = columns - j;
    const bool whole = left >= kWidth;
    const Vec<Acc> bias = !to.bias ? Vec<Acc>{}
                          : whole  ? load(to.bias + channel)
                                   : load_first(to.bias + channel, left);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t pixel = t.linear ? position + i : t.pixels[position + i - t.position];
      T* out = to.out + pixel * to.pixel + channel;
      Vec<Acc> value = load(c + i * kTileColumns<Acc> + j) + bias;
      if (to.residual) {
        const T* residual = to.residual + pixel * to.residual_pixel + channel;
        value += whole ? load(residual) : load_first(residual, left);
      }
      if (to.relu) value = relu(value);
      if (whole) {
        store_result<E>(out, value);
      } else {
        store_first(out, value, left);
      }
    }
  }
}

// Panels [first, last) of depth [begin, end).
template <class T, class E>
Panels<E> panels_of(const Task<T, E>& t, int64_t first, int64_t last, int64_t begin, int64_t end) {
  constexpr int64_t kColumns = kTileColumns<E>;
  const int64_t whole = operands<E>(t.gather.depth()) * kColumns, offset = begin / kDepthOf<E> * kColumns;
  if (!t.own.panels) {
    return {t.filters.packed + (t.group * ceil_div(t.columns, kColumns) + first) * whole + offset, whole};
  }
  const int64_t step = t.own.kept ? whole : operands<E>(end - begin) * kColumns;
  E* own = t.own.panels + (t.own.kept ? (first - t.panel_begin) * whole + offset : 0);
  for (int64_t panel = first; !t.own.there && panel < last; ++panel) {
    pack_filters(t.filters, t.group, panel * kColumns, begin, end, own + (panel - first) * step);
  }
  return {own, step};
}

template <class T, class E>
void run_task(Task<T, E> t) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<E>, kDepth = kDepthOf<E>, kLine = kLanes<E> * kDepth;
  const DepthBlocks cut = cut_depth<E>(t.gather);
  const bool crowded = kTileRows > 8 && t.gather.pixel * sizeof(T) % kSetsBytes == 0;
  const bool packs = crowded || !t.gather.template is_matrix<E>();
  const int64_t step = packs ? (ceil_div(cut.size, kLine) + 1) * kLine : t.gather.pixel;
  Element<E>* packed = packs ? workspace<Element<E>>(Workspace::kA, t.count * step) : nullptr;
  // Sums of a depth in one piece are done with at once, and stay in L1.
  const bool single = cut.size >= cut.depth;
  Acc* sums = workspace<Acc>(Workspace::kB,
                             (single ? kTileRows : ceil_div(t.columns, kColumns) * t.count) * kColumns);
  const Gather<T>& gather = t.gather;
  int64_t* pixels = t.linear ? nullptr : workspace<int64_t>(Workspace::kD, t.count);
  if (!t.linear) list_pixels(t, pixels);
  t.pixels = pixels;
  // A whole panel of float goes straight to its place, and sums there; one of pairs is narrowed to it,
  // wherever its rows lie.
  const bool in_place = sizeof(T) == sizeof(Acc) && t.linear;
  const bool narrows = kDepth == 2 && !t.scatter.residual;
  Acc* wide_bias = narrows && t.scatter.bias ? workspace<Acc>(Workspace::kC, t.columns) : nullptr;
  for (int64_t k = 0; wide_bias && k < t.columns; ++k) wide_bias[k] = widen(t.scatter.bias[t.channel + k]);

  for (int64_t begin = 0; begin < cut.depth;) {
    const int64_t end = block_end(cut, begin);
    const bool last = end == cut.depth;
    // Panels that L2 holds beside A follow one another for each tile, whose rows are then in L1.
    const int64_t depth = operands<E>(end - begin);
    const int64_t panel_bytes = depth * kColumns * static_cast<int64_t>(sizeof(E));
    const int64_t group = max64(1, kGroupBytes / panel_bytes);
    // The first group packs A, piece by piece; without another one every piece may lie in the same place.
    const bool kept = t.panel_end - t.panel_begin > group;
    const int64_t row_bytes = step * static_cast<int64_t>(sizeof(Element<E>));
    const int64_t piece = max64(1, kPieceBytes / (kTileRows * row_bytes)) * kTileRows;
    for (int64_t first = t.panel_begin; first < t.panel_end; first += group) {
      const int64_t group_end = min64(first + group, t.panel_end);
      const Panels<E> panels = panels_of(t, first, group_end, begin, end);
      const bool reads = first == t.panel_begin;
      for (int64_t i = 0; i < t.count; i += kTileRows) {
        const int64_t rows = min64(t.count - i, kTileRows);
        const E* a;
        if (packs) {
          Element<E>* to = packed + (kept ? i : i % piece) * step;
          if (reads && i % piece == 0) {
            const int64_t count = min64(piece, t.count - i);
            pack_positions(gather, t.position + i, count, begin, end, to, step);
            if ((end - begin) % kDepth) zero_column(to + end - begin, count, step);
          }
          a = reinterpret_cast<const E*>(to);
        } else {
          a = reinterpret_cast<const E*>(gather.source + (t.position + i) * step + begin);
        }
        // It finds the source in memory, and reads more rows at once than a hardware prefetcher follows.
        const int64_t ahead = t.position + i + (packs ? piece : kTileRows);
        Prefetch next = prefetch_rows(gather.source + ahead * gather.pixel + begin, gather.pixel, end - begin,
                                      reads && gather.of_pixels() ? kTileRows : 0);
        next.to_l2 = next.count() > kLinesToL1;
        const int64_t lines = ceil_div(next.count(), ceil_div(depth, kChain) * (group_end - first));
        for (int64_t panel = first; panel < group_end; ++panel) {
          const int64_t columns = min64(t.columns - panel * kColumns, kColumns);
          const int64_t channel = t.channel + panel * kColumns;
          const E* b = panels.first + (panel - first) * panels.step;
          const bool direct = in_place && columns == kColumns;
          const int64_t row_of_sums = single ? 0 : panel * t.count + i;
          TileOutput<Acc> out{sums + row_of_sums * kColumns, kColumns, nullptr, false, false};
          if (direct) {
            out.c = reinterpret_cast<Acc*>(t.scatter.out) + (t.position + i) * t.scatter.pixel + channel;
            out.step = t.scatter.pixel;
          }
          const Tile<E> tile = find_tile<E>(TileOperand::kDepthContiguous, rows, columns);
          for (int64_t d = 0; d < depth; d += kChain) {
            out.accumulate = begin + d > 0;
            if (last && direct && d + kChain >= depth) {
              const Scatter<T>& to = t.scatter;
              out.relu = to.relu;
              if (to.bias) out.bias = reinterpret_cast<const Acc*>(to.bias) + channel;
              if (to.residual) {
                out.residual_step = to.residual_pixel;
                out.residual = reinterpret_cast<const Acc*>(to.residual) +
                               (t.position + i) * to.residual_pixel + channel;
              }
            }
            if constexpr (kDepth == 2) {
              if (narrows && columns >= kColumns && last && d + kChain >= depth) {
                out.narrowed = t.scatter.out + (t.linear ? (t.position + i) * t.scatter.pixel : 0) + channel;
                out.narrowed_step = t.scatter.pixel;
                if (!t.linear) out.places = pixels + i;
                out.relu = t.scatter.relu;
                if (wide_bias) out.bias = wide_bias + panel * kColumns;
              }
            }
            next.lines(lines);
            tile(a + d, step / kDepth, b + d * kColumns, min64(kChain, depth - d), out);
          }
          if (last && !direct && !out.narrowed) finish(t, t.position + i, rows, channel, columns, out.c);
        }
      }
    }
    begin = end;
  }
}

// The tasks whose busiest thread is done first: as many blocks of positions as L2 or the threads want, and
// the channels in one, a part a thread or a part a panel. In eighths of a tile times a panel, which is 28
// multiply-adds of vectors a step of depth in AVX-512: a task reads a tile's rows (1) and a panel (4), and a
// thread packs a panel that none has packed (4). Where the channels are in parts, several cores write a row
// of the output, which takes as long as 16 steps more of depth.
GemmTasks cut_tasks(int64_t positions, int64_t depth, int64_t panels, int64_t groups, int64_t block_tiles,
                    bool packed, bool small) {
  const int64_t tiles = ceil_div(positions, kTileRows), threads = small ? 1 : num_threads();
  const int64_t least = ceil_div(tiles, block_tiles);
  GemmTasks best{tiles, least, 1};
  int64_t least_load = INT64_MAX;
  const int64_t all_parts[] = {1, min64(panels, threads), panels};
  const int64_t all_blocks[] = {least, min64(tiles, ceil_div(least, threads) * threads)};
  for (int64_t parts : all_parts) {
    for (int64_t blocks : all_blocks) {
      const int64_t tasks = ceil_div(blocks * groups * parts, threads);  // of the busiest thread
      const int64_t task_panels = ceil_div(panels, parts);
      const int64_t work = tasks * tiles * (8 * task_panels + 1) / blocks + tasks * 4 * task_panels +
                           (packed ? 0 : ceil_div(tasks, blocks) * 4 * task_panels);
      const int64_t load = work * (depth + (parts > 1 ? 16 : 0));
      if (load < least_load) best = {tiles, blocks, parts}, least_load = load;
    }
  }
  return best;
}

}  // namespace

template <class T, class E>
void correlate(const Gather<T>& gather, const Scatter<T>& scatter, const Filters<T, E>& given, int64_t N,
               int64_t groups) {
  constexpr int64_t kColumns = kTileColumns<E>, kBytes = sizeof(E);
  const int64_t positions = N * gather.P * gather.Q, depth = gather.depth(), columns = given.columns();
  const int64_t group_panels = ceil_div(columns, kColumns);
  const bool linear =
      scatter.step_h == 1 && scatter.step_w == 1 && gather.P == scatter.H && gather.Q == scatter.W;
  const GemmTasks cut =
      cut_tasks(positions, operands<E>(depth), group_panels, groups, block_tiles<E>(cut_depth<E>(gather)),
                given.packed, positions * depth * columns * groups < 2 * kWorthAThread);
  const int64_t tasks = cut.blocks * groups * cut.channel_parts;
  // A thread's panels are its own where it needs them once or they are few; many are soon in L3, where it
  // does not matter who has packed them.
  const bool again = min64(cut.blocks, ceil_div(tasks, num_threads())) > 1;
  const int64_t own_size = ceil_div(group_panels, cut.channel_parts) * operands<E>(depth) * kColumns;
  Filters<T, E> filters = given;
  if (!filters.packed && again && own_size > kKeptBytes / kBytes) {
    E* packed = workspace<E>(Workspace::kShared, groups * group_panels * operands<E>(depth) * kColumns);
    pack_all_filters(filters, groups, packed);
    filters.packed = packed;
  }

  parallel_for(tasks, 1, [&](int64_t task_begin, int64_t task_end) {
    const int64_t in_work = max64(kGroupBytes / kBytes, kBlockDepth * kColumns);
    const int64_t size = again ? own_size : min64(own_size, in_work);
    E* own = filters.packed ? nullptr : workspace<E>(Workspace::kShared, size);
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t block = task % cut.blocks, rest = task / cut.blocks;  // a thread's share: of few panels
      const int64_t group = rest % groups, part = rest / groups;
      const int64_t position = cut.tiles * block / cut.blocks * kTileRows;
      const int64_t end = min64(positions, cut.tiles * (block + 1) / cut.blocks * kTileRows);
      run_task(Task<T, E>{gather.of_group(group),
                          scatter,
                          filters,
                          group,
                          group * columns,
                          columns,
                          position,
                          end - position,
                          group_panels * part / cut.channel_parts,
                          group_panels * (part + 1) / cut.channel_parts,
                          {own, again, again && block > 0 && task > task_begin},
                          linear});
    }
  });
}

#define INSTANTIATE(T, E) \
  template void correlate(const Gather<T>&, const Scatter<T>&, const Filters<T, E>&, int64_t, int64_t);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, float)
INSTANTIATE(Half, float)
#if defined(CUDA_CNN_HAS_PAIRS)
INSTANTIATE(BFloat16, Bf16Pair)
#endif

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
