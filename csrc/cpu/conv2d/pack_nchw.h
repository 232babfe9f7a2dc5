// Packing from NCHW: the matrix of pack.h transposed, a row a (channel, r, s) and a column a position.
#pragma once

#include "cpu/conv2d/pack.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Positions in panels of `width`; rows of depth row_step apart. Up to a vector behind each row and each panel
// is written too.
template <class Acc>
struct PositionPanels {
  Acc* data;
  int64_t width, row_step, panel_step;
};

// A Gather whose source is NCHW; its `pixel` counts all channels of an image. Prologues are not for it.
template <class T>
Gather<T> planes_of_group(const Gather<T>& gather, int64_t group) {
  Gather<T> of_group = gather;
  of_group.source += group * gather.channels * gather.H * gather.W;
  return of_group;
}

// Rows [depth_begin, depth_end) and columns [position, position + count), from panel 0 on; `end` is where the
// source ends.
template <class T>
void pack_planes(const Gather<T>& gather, const T* end, int64_t position, int64_t count, int64_t depth_begin,
                 int64_t depth_end, const PositionPanels<Accumulator<T>>& out);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
