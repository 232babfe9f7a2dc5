// The matrix product of gemm.cpp for NCHW, with the operands' roles exchanged: the register tile's rows are
// output channels, its columns positions, which is how y lies in memory. Of x no other layout is made.
//   for a block of positions and a range of output channels (a task)
//     pack the positions' panels                    B: the whole depth, kBlockBytes, stays in L2
//     for a few tiles of channels                   A: the weights as they lie, [channel][depth]; or of
//       for a chain of the depth                       [depth][channel] a copy of this chain
//         for a panel, for each of those tiles
//         y += tile * panel
// Panels begin at multiples of kTileColumns, so the bits do not depend on the blocks.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/pack_nchw.h"
#include "cpu/conv2d/prefetch.h"
#include "cpu/conv2d/tile.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kBlockBytes = 200000;
constexpr int64_t kGroupTiles = 4;    // whose rows share what they read of a panel
constexpr int64_t kRowsAhead = 8;     // of weights, asked for while they are copied
constexpr int64_t kLeastPanels = 8;   // of a block: the weights are read once for each block
constexpr int64_t kManyPanels = 8;    // for each thread: they share them evenly enough
constexpr int64_t kLongChain = 256;   // products summed in registers before they join the rest
constexpr int64_t kSmall = 200000;    // multiply-adds that are not worth a second thread
constexpr int64_t kSetsBytes = 4096;  // rows so far apart, or a multiple of it, share a set of L1: 8 lines

template <class T>
struct PlanesProduct {
  using Acc = Accumulator<T>;
  static constexpr int64_t kColumns = kTileColumns<Acc>;

  Gather<T> gather;
  const Acc* weights;  // [group][rows][depth], or null:
  const T* by_depth;   // [group][depth][rows]
  const Acc* bias;     // a value a channel, or null
  T* out;
  int64_t rows;  // output channels of a group
  int64_t N, groups;

  int64_t positions() const { return N * gather.P * gather.Q; }
  int64_t planes() const { return gather.P * gather.Q; }

  // The place of channel `row`'s result at a position.
  T* place(int64_t row, int64_t position) const {
    return out + (position / planes() * rows * groups + row) * planes() + position % planes();
  }

  // A tile's columns that are not kColumns neighbours in a plane of out, or not of its type.
  void scatter(const Acc* sums, int64_t row, int64_t row_count, int64_t position, int64_t columns) const {
    for (int64_t j = 0, length; j < columns; j += length) {
      length = min64(columns - j, planes() - (position + j) % planes());
      T* to = place(row, position + j);
      for (int64_t i = 0; i < row_count; ++i, to += planes()) {
        const Acc* from = sums + i * kColumns + j;
        int64_t k = 0;
        for (; k + kLanes<T> <= length; k += kLanes<T>) store(to + k, load(from + k));
        if (k < length) store_first(to + k, load(from + k), length - k);
      }
    }
  }

  // Depth [begin, end) of the tiles of rows [first, last), each [depth][kTileRows], `step` apart. What a
  // vector writes behind a row is written again by the next one.
  void copy_tiles(int64_t group, int64_t first, int64_t last, int64_t begin, int64_t end, Acc* to,
                  int64_t step) const {
    const T* const behind = by_depth + groups * gather.depth() * rows;
    for (int64_t d = begin; d < end; ++d, to += kTileRows) {
      const T* from = by_depth + (group * gather.depth() + d) * rows + first;
      prefetch_run(from + kRowsAhead * rows, last - first);
      for (int64_t row = first; row < last; row += kTileRows, from += kTileRows) {
        Acc* tile = to + (row - first) / kTileRows * step;
        for (int64_t j = 0; j < kTileRows; j += kLanes<T>) {
          const int64_t left = behind - from - j;
          if (left > 0) store(tile + j, left >= kLanes<T> ? load(from + j) : load_first(from + j, left));
        }
      }
    }
  }

  void run(int64_t group, int64_t position, int64_t count, int64_t row_begin, int64_t row_end) const {
    const int64_t depth = gather.depth(), panels = ceil_div(count, kColumns);
    const int64_t panel_step = (depth + 1) * kColumns;
    const int64_t chain = ceil_div(depth, ceil_div(depth, kLongChain));
    const TileOperand operand = by_depth ? TileOperand::kRowContiguous : TileOperand::kDepthContiguous;
    const bool crowded = !by_depth && kTileRows > 8 && depth * sizeof(Acc) % kSetsBytes == 0;
    const int64_t spaced = chain + kLanes<Acc>;  // between rows that are copied
    const int64_t a_step = by_depth ? kTileRows : crowded ? spaced : depth;
    Acc* packed = workspace<Acc>(Workspace::kA, panels * panel_step);
    const int64_t sums_size = panels * kGroupTiles * kTileRows * kColumns;
    Acc* sums = workspace<Acc>(Workspace::kB, sums_size + kLanes<Acc>);  // the last is read with what follows
    pack_planes(planes_of_group(gather, group), gather.source + N * gather.pixel * gather.H * gather.W,
                position, count, 0, depth, {packed, kColumns, kColumns, panel_step});
    const int64_t group_rows = kGroupTiles * kTileRows;
    Acc* copied = workspace<Acc>(Workspace::kC, group_rows * spaced);
    for (int64_t first = row_begin; first < row_end; first += group_rows) {
      const int64_t last = min64(first + group_rows, row_end);
      for (int64_t d = 0; d < depth; d += chain) {
        const bool ends = d + chain >= depth;
        if (by_depth) {
          copy_tiles(group, first, last, d, min64(d + chain, depth), copied, kTileRows * spaced);
        }
        for (int64_t row = first; crowded && row < last; ++row) {
          memcpy(copied + (row - first) * spaced, weights + (group * rows + row) * depth + d,
                 min64(chain, depth - d) * sizeof(Acc));
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t at = position + panel * kColumns, columns = min64(count - panel * kColumns, kColumns);
          const bool direct =
              sizeof(T) == sizeof(Acc) && columns == kColumns && at % planes() + kColumns <= planes();
          TileOutput<Acc> c{sums + panel * group_rows * kColumns, kColumns, nullptr, d > 0, false};
          if (direct) c.c = reinterpret_cast<Acc*>(place(group * rows + first, at)), c.step = planes();
          for (int64_t row = first; row < last; row += kTileRows, c.c += kTileRows * c.step) {
            const int64_t row_count = min64(last - row, kTileRows), channel = group * rows + row;
            const Acc* a =
                by_depth || crowded ? copied + (row - first) * spaced : weights + channel * depth + d;
            c.row_bias = bias && ends ? bias + channel : nullptr;
            find_tile<Acc>(operand, row_count, columns)(a, a_step, packed + panel * panel_step + d * kColumns,
                                                        min64(chain, depth - d), c);
            if (ends && !direct) scatter(c.c, channel, row_count, at, columns);
          }
        }
      }
    }
  }

  // Blocks of positions that threads share evenly; where those are few, the channels are cut instead.
  void run() const {
    const int64_t panel_bytes = gather.depth() * kColumns * static_cast<int64_t>(sizeof(Acc));
    const int64_t panels = ceil_div(positions(), kColumns), row_tiles = ceil_div(rows, kTileRows);
    const bool small = positions() * gather.depth() * rows * groups < kSmall;
    const int64_t threads = small || groups % num_threads() == 0 ? 1 : num_threads();
    const bool cut_rows = panels < kManyPanels * threads && panels < row_tiles;
    const int64_t parts = cut_rows ? min64(threads, row_tiles) : 1;
    int64_t blocks = ceil_div(panels, max64(kLeastPanels, kBlockBytes / panel_bytes));
    if (!cut_rows) blocks = min64(panels, ceil_div(blocks, threads) * threads);
    parallel_for(blocks * groups * parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t part = task % parts, block = task / parts % blocks, group = task / parts / blocks;
        const int64_t first = panels * block / blocks * kColumns;
        const int64_t last = min64(positions(), panels * (block + 1) / blocks * kColumns);
        run(group, first, last - first, row_tiles * part / parts * kTileRows,
            min64(rows, row_tiles * (part + 1) / parts * kTileRows));
      }
    });
  }
};

// Values in the type that tiles compute in: as they lie, or in `room`.
template <class T>
const Accumulator<T>* widened(const T* values, int64_t count, Accumulator<T>* room) {
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    return values;
  } else {
    if (!values) return nullptr;
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(room + i, load(values + i));
    for (; i < count; ++i) room[i] = widen(values[i]);
    return room;
  }
}

}  // namespace

template <class T>
void forward_gemm_nchw(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  const int64_t size = p.K * p.C / p.groups * p.R * p.S;
  Acc* room = workspace<Acc>(Workspace::kShared, sizeof(T) == sizeof(Acc) ? 0 : size + p.K);
  Gather<T> gather = forward_gather<T>(p);
  gather.pixel = p.C;
  PlanesProduct<T>{gather,
                   widened(static_cast<const T*>(p.weight), size, room),
                   nullptr,
                   widened(static_cast<const T*>(p.bias), p.K, room + size),
                   static_cast<T*>(p.y),
                   p.K / p.groups,
                   p.N,
                   p.groups}
      .run();
}

// 1x1, stride 1: dx's product with dy and the transposed weights.
template <class T>
void input_grad_gemm_nchw(const Conv2dParams& p) {
  const Gather<T> gather{
      static_cast<const T*>(p.dy), p.P, p.Q, p.K, p.P, p.Q, 1, 1, 0, 0, 1, 1, 1, 1, p.K / p.groups};
  PlanesProduct<T>{
      gather, nullptr, static_cast<const T*>(p.weight), nullptr, static_cast<T*>(p.dx), p.C / p.groups,
      p.N,    p.groups}
      .run();
}

#define INSTANTIATE(T)                                     \
  template void forward_gemm_nchw<T>(const Conv2dParams&); \
  template void input_grad_gemm_nchw<T>(const Conv2dParams&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
