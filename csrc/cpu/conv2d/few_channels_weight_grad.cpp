// Weight gradient of a layer with few input channels (a network's first). As in weight_grad.cpp the pixels
// are a matrix product's depth; but a pixel's taps are not copied side by side, R*S elements for each one
// that the image has. Of a row of the image, copied once with its padding, a row of taps is a run of S*C
// elements, and the next position's run begins stride_w*C further on:
//   sums[r][(s,c)][k] += over q of  row[p*stride_h + r][q*stride_w*C + (s,c)] * dy[p][q][k]
// bfloat16's pairs are of positions (p, q) and (p + 1, q): of rows of the image stride_h apart, and so of
// whole rows of dy.
#include "cpu/conv2d/algorithms.h"
#include "cpu/conv2d/prefetch.h"
#include "cpu/conv2d/weight_grad.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// Positions of a row: a panel of dy is half of L1. A chain of sums, too: its error grows with the root of
// this.
constexpr int64_t kBlock = 128;
constexpr int64_t kLinesToL1 = 24;  // of the next rows of dy for a tile; more of them to L2
constexpr int64_t kTasks = 8;
constexpr int64_t kWorthATask = 200000;  // multiply-adds

}  // namespace

template <class T, class E>
struct FewChannelsSums {
  static constexpr int64_t kColumns = kTileColumns<E>, kDepth = kDepthOf<E>;

  const Gather<T>& gather;
  Gather<T> image;  // with its padding: a position a row, which has a tap a pixel
  const T* dy;
  int64_t pixel, outputs;

  int64_t steps() const { return ceil_div(gather.P, kDepth); }  // of an image: rows of y, or pairs of them
  int64_t reach() const { return (gather.R - 1) * gather.tap_h + 1; }
  int64_t row_size() const { return ceil_div(image.depth(), kLanes<T>) * kLanes<T> + kLanes<T>; }

  // The rows of image n that row p of y reads; with those that row p + 1 reads, if that is.
  void pack_image(int64_t n, int64_t p, [[maybe_unused]] bool pair, E* packed) const {
    const int64_t position = n * image.P + p * gather.stride_h, step = row_size();
    if constexpr (kDepth == 1) {
      pack_positions(image, position, reach(), 0, image.depth(), packed, step);
    } else {
#if defined(CUDA_CNN_HAS_PAIRS)
      const int64_t count = reach() + (pair ? gather.stride_h : 0);
      T* rows = workspace<T>(Workspace::kD, count * step);
      pack_positions(image, position, count, 0, image.depth(), rows, step);
      for (int64_t h = 0; h < reach(); ++h) {
        const T* even = rows + h * step;
        pack_pairs(even, pair ? even + gather.stride_h * step : nullptr, step, packed + h * step);
      }
#endif
    }
  }

  // The panel of channels from k on, `count` positions from `from` on; with those of the next row of y.
  void pack_dy(const T* from, int64_t count, int64_t k, [[maybe_unused]] bool pair, E* panel) const {
    if constexpr (kDepth == 1) {
      pack_panel(from + k, pixel, outputs - k, count, panel);
    } else {
#if defined(CUDA_CNN_HAS_PAIRS)
      from += k;
      for (int64_t q = 0; q < count; ++q, from += pixel, panel += kColumns) {
        pack_pairs(from, pair ? from + gather.Q * pixel : nullptr, min64(outputs - k, kColumns), panel);
      }
#endif
    }
  }

  // sums [panel][depth][kColumns] over the steps [begin, end) of all images.
  void run(int64_t begin, int64_t end, Accumulator<T>* sums) const {
    const int64_t run = gather.S * gather.channels, parts = ceil_div(run, kTileRows);
    const int64_t blocks = ceil_div(gather.Q, kBlock), panels = ceil_div(outputs, kColumns);
    E* rows = workspace<E>(Workspace::kA, reach() * row_size());
    E* b = workspace<E>(Workspace::kB, kBlock * kColumns);
    for (int64_t step = begin; step < end; ++step) {
      const int64_t n = step / steps(), p = step % steps() * kDepth;
      const bool pair = kDepth == 2 && p + 1 < gather.P;
      const T* dy_row = dy + (n * gather.P + p) * gather.Q * pixel;
      pack_image(n, p, pair, rows);
      Prefetch next_dy = prefetch_rows(
          dy_row + (pair ? 2 : 1) * gather.Q * pixel, pixel, outputs,
          step + 1 < end ? min64(kDepth, gather.P - (step + 1) % steps() * kDepth) * gather.Q : 0);
      const int64_t lines = ceil_div(next_dy.count(), blocks * panels * gather.R * parts);
      next_dy.to_l2 = lines > kLinesToL1;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t q = gather.Q * block / blocks, count = gather.Q * (block + 1) / blocks - q;
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t k = panel * kColumns;
          pack_dy(dy_row + q * pixel, count, k, pair, b);
          for (int64_t i = 0; i < gather.R * parts; ++i) {
            const int64_t r = i / parts, d = run * (i % parts) / parts, d_end = run * (i % parts + 1) / parts;
            const E* a = rows + r * gather.tap_h * row_size() + q * gather.stride_w * gather.channels + d;
            find_tile<E>(TileOperand::kRowContiguous, d_end - d, outputs - k)(
                a, gather.stride_w * gather.channels, b, count,
                {sums + ((panel * gather.R + r) * run + d) * kColumns, kColumns, nullptr,
                 step > begin || block > 0, false});
            next_dy.lines(lines);
          }
        }
      }
    }
  }
};

template <class T>
void weight_grad_few_channels(const Conv2dParams& p) {
  with_operand<T>(multiplies_pairs(), [&](auto operand) {
    using E = decltype(operand);
    const Gather<T> gather = forward_gather<T>(p);
    FewChannelsSums<T, E> work{gather, rows_of_image(gather), static_cast<const T*>(p.dy), p.y_pixel, p.K};
    const int64_t steps = p.N * work.steps(),
                  size = ceil_div(p.K, work.kColumns) * gather.depth() * work.kColumns;
    const int64_t tasks = min64(kTasks, p.N * p.P * p.Q * size / kWorthATask);
    const int64_t chunks = even_cut(tasks, steps);
    Accumulator<T>* sums = workspace<Accumulator<T>>(Workspace::kShared, chunks * size);
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        work.run(steps * chunk / chunks, steps * (chunk + 1) / chunks, sums + chunk * size);
      }
    });
    add_chunks<T>(p, sums, chunks);
  });
}

template void weight_grad_few_channels<float>(const Conv2dParams&);
template void weight_grad_few_channels<double>(const Conv2dParams&);
template void weight_grad_few_channels<BFloat16>(const Conv2dParams&);
template void weight_grad_few_channels<Half>(const Conv2dParams&);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
