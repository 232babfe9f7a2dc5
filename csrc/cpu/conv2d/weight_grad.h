// What the weight gradients by matrix products share.
#pragma once

#include "cpu/conv2d/pack.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// At least `wanted` pieces where `most` allows it; a power of two, for equal loads of 2, 4 and 8 threads.
inline int64_t even_cut(int64_t wanted, int64_t most) {
  int64_t cut = 1;
  while (cut < wanted && 2 * cut <= most) cut *= 2;
  return cut;
}

// dweight, from `chunks` sums [group][panel][depth][kTileColumns] that are added in their order.
template <class T>
void add_chunks(const Conv2dParams& p, Accumulator<T>* sums, int64_t chunks);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
