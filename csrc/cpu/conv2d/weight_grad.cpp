// Weight gradient as a matrix product whose depth are the pixels: dw[(r,s,c)][k] = sum over pixels of x^T * dy.
//   for a range of (r,s,c), and of the pixels in `chunks` parts where the ranges are too few (a task)
//     for a block of pixels
//       pack x's rows [pixel][(r,s,c)], as forward does, and dy's panels [pixel][32 k]
//       for a panel of dy, for a tile of (r,s,c): sums += tile
// Each task owns its sums. Those of the chunks are added in their order. The cuts depend on the shape alone, so the
// result does not know how many threads there were; a block's sums start at 0, so that chains stay short.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/pack.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

struct WeightGradCut {
  int64_t ranges, range, chunks, chunk;
};

namespace {

constexpr int64_t kBlockPixels = 128;   // a panel of dy: 16 KiB, half of L1
constexpr int64_t kRangeDepth = 448;    // x's block: 128 * 448 * 4 bytes = 224 KiB, a quarter of L2
constexpr int64_t kTasks = 16;
constexpr int64_t kWorthATask = 200000; // multiply-adds

WeightGradCut cut_weight_grad(int64_t pixels, int64_t depth, int64_t outputs, int64_t groups) {
  const int64_t work = pixels * depth * outputs * groups;
  const int64_t tasks = max64(1, min64(kTasks, work / kWorthATask));
  WeightGradCut cut{};
  cut.ranges = ceil_div(depth, kRangeDepth);
  if (cut.ranges > 1) cut.ranges = ceil_div(cut.ranges, 4) * 4;  // even loads for 2 and 4 threads
  cut.range = ceil_div(ceil_div(depth, cut.ranges), kTileRows) * kTileRows;
  cut.ranges = ceil_div(depth, cut.range);
  const int64_t blocks = ceil_div(pixels, kBlockPixels);
  cut.chunks = min64(blocks, ceil_div(tasks, cut.ranges * groups));
  cut.chunk = ceil_div(blocks, cut.chunks) * kBlockPixels;
  cut.chunks = ceil_div(pixels, cut.chunk);
  return cut;
}

// Sums [panel][depth][kTileColumns] of one group, of the pixels [begin, end) and the rows [d_begin, d_end).
template <class T>
void accumulate(const Gather<T>& gather, const T* dy, int64_t dy_pixel, int64_t outputs, int64_t begin, int64_t end,
                int64_t d_begin, int64_t d_end, Accumulator<T>* sums) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t step = ceil_div(d_end - d_begin, kLanes<Acc>) * kLanes<Acc> + kLanes<Acc>;
  Acc* a = workspace<Acc>(Workspace::kA, kBlockPixels * step);
  Acc* b = workspace<Acc>(Workspace::kB, kBlockPixels * kColumns);

  for (int64_t pixel = begin; pixel < end; pixel += kBlockPixels) {
    const int64_t count = min64(end - pixel, kBlockPixels);
    pack_positions(gather, pixel, count, d_begin, d_end, a, step);
    for (int64_t k = 0; k < outputs; k += kColumns) {
      pack_panel(dy + pixel * dy_pixel + k, dy_pixel, outputs - k, count, b);
      Acc* panel = sums + k / kColumns * gather.depth() * kColumns;
      for (int64_t d = d_begin; d < d_end; d += kTileRows) {
        find_tile<Acc>(TileOperand::kRowContiguous, min64(d_end - d, kTileRows), outputs - k)(
            a + d - d_begin, step, b, count, {panel + d * kColumns, kColumns, nullptr, pixel > begin, false});
      }
    }
  }
}

template <class Acc>
void add_chunks(Acc* sums, int64_t chunks, int64_t chunk_size, int64_t begin, int64_t end) {
  if (chunks == 1) return;
  for (int64_t i = begin; i < end; i += kLanes<Acc>) {
    Vec<Acc> total = load(sums + i);
    for (int64_t c = 1; c < chunks; ++c) total += load(sums + c * chunk_size + i);
    store(sums + i, total);
  }
}

}  // namespace

template <class T>
void weight_grad_gemm(const Conv2dParams& p) {
  using Acc = Accumulator<T>;
  constexpr int64_t kColumns = kTileColumns<Acc>;
  const int64_t channels = p.C / p.groups, outputs = p.K / p.groups, pixels = p.N * p.P * p.Q;
  Gather<T> gather{static_cast<const T*>(p.x), p.H, p.W, p.x_pixel, p.P, p.Q, p.stride_h, p.stride_w, -p.pad_h,
                   -p.pad_w, p.R, p.S, p.dilation_h, p.dilation_w, channels};
  gather.scale = static_cast<const Acc*>(p.in_scale);
  gather.shift = static_cast<const Acc*>(p.in_shift);
  gather.relu = p.in_relu;
  const T* dy = static_cast<const T*>(p.dy);
  const int64_t depth = gather.depth(), panels = ceil_div(outputs, kColumns);
  const int64_t panel_size = depth * kColumns, group_size = panels * panel_size, chunk_size = p.groups * group_size;
  const WeightGradCut cut = cut_weight_grad(pixels, depth, outputs, p.groups);
  Acc* sums = workspace<Acc>(Workspace::kShared, cut.chunks * chunk_size);

  parallel_for(cut.chunks * p.groups * cut.ranges, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t range = task % cut.ranges, group = task / cut.ranges % p.groups;
      const int64_t chunk = task / (cut.ranges * p.groups);
      Gather<T> of_group = gather;
      of_group.source += group * channels;
      if (gather.scale) {
        of_group.scale += group * channels;
        of_group.shift += group * channels;
      }
      accumulate(of_group, dy + group * outputs, p.y_pixel, outputs, chunk * cut.chunk,
                 min64(pixels, (chunk + 1) * cut.chunk), range * cut.range, min64(depth, (range + 1) * cut.range),
                 sums + chunk * chunk_size + group * group_size);
    }
  });
  parallel_for(p.groups * panels, ceil_div(kBlockPixels * kRangeDepth, panel_size), [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      add_chunks(sums, cut.chunks, chunk_size, panel * panel_size, (panel + 1) * panel_size);
      const int64_t k = panel % panels * kColumns, group = panel / panels;
      unpack_panel_transposed(sums + panel * panel_size, outputs - k, depth,
                              static_cast<T*>(p.dweight) + (group * outputs + k) * depth, depth);
    }
  });
}

template void weight_grad_gemm<float>(const Conv2dParams&);
template void weight_grad_gemm<double>(const Conv2dParams&);
template void weight_grad_gemm<BFloat16>(const Conv2dParams&);
template void weight_grad_gemm<Half>(const Conv2dParams&);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
