// Correlations of 3x3 or 5x5 taps and stride 1 by Winograd's algorithm: see winograd.cpp,
// winograd_transforms.h.
#pragma once

#include "cpu/conv2d/filters.h"
#include "cpu/conv2d/gemm.h"
#include "cpu/conv2d/winograd_transforms.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// As correlate() of gemm.h; taps are neighbours, and the outputs fill their image.
void correlate_winograd(const Gather<float>& gather, const Scatter<float>& scatter,
                        const Filters<float>& filters, int64_t N, int64_t groups);

// The 6x6 inputs of tiles [begin, end) at the points:
// out[point * point_step + (tile - begin) * tile_step + channel], zero up to a whole vector.
void winograd_inputs(const Gather<float>& gather, int64_t begin, int64_t end, float* out, int64_t point_step,
                     int64_t tile_step);

struct WinogradTile {
  int64_t n, p, q;  // of its first output
};
CUDA_CNN_INLINE WinogradTile winograd_tile(const Gather<float>& g, int64_t tile) {
  const int64_t out = winograd_out(g.R), rows = ceil_div(g.P, out), columns = ceil_div(g.Q, out);
  return {tile / (rows * columns), tile / columns % rows * out, tile % columns * out};
}
CUDA_CNN_INLINE int64_t winograd_tiles(const Gather<float>& g, int64_t N) {
  return N * ceil_div(g.P, winograd_out(g.R)) * ceil_div(g.Q, winograd_out(g.R));
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
