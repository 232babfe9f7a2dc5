// The filters as a correlation reads them.
#pragma once

#include "cpu/conv2d/pack.h"
#include "kernels/conv2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Forward: a column an output channel, depth (r, s, input channel). Input gradient: a column an input
// channel, depth (tap, tap, output channel) over the taps of a phase, backwards, so that they step forwards
// in dy.
template <class T, class E = Accumulator<T>>
struct Filters {
  const T* weight;  // [K][R][S][channels]
  int64_t R, S;
  int64_t channels, outputs;  // of a group
  bool transposed;            // for the input gradient, with the taps of
  Conv2dPhase h, w;
  const E* packed = nullptr;  // all panels, where a caller has kept them
  bool planes = false;        // weight is [K][channels][R][S], and packed with pack_filter_planes

  int64_t columns() const { return transposed ? channels : outputs; }
  int64_t depth() const { return transposed ? h.taps * w.taps * outputs : R * S * channels; }
};

// The panel [end - begin][kTileColumns] of the columns from `column` on, depth [begin, end): of the input
// gradient whole taps, or outputs of one.
template <class T, class E>
void pack_filters(const Filters<T, E>& filters, int64_t group, int64_t column, int64_t begin, int64_t end,
                  E* panel);

// The same of `planes` and all taps, with a stride of 1, of channels (for the input gradient outputs) [begin,
// end): [R * S][end - begin][kTileColumns].
template <class T, class E>
void pack_filter_planes(const Filters<T, E>& filters, int64_t group, int64_t column, int64_t begin,
                        int64_t end, E* panel);

// All of them in whole, group by group.
template <class T, class E>
void pack_all_filters(const Filters<T, E>& filters, int64_t groups, E* panels);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
