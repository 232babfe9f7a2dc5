#include "cpu/conv2d/filters.h"

#include "cpu/parallel.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Below so many elements packing is not worth a second thread.
constexpr int64_t kPackGrain = 65536;

template <class T>
void pack_filters(const Filters<T>& f, int64_t group, int64_t column, Accumulator<T>* panel) {
  const int64_t filter = f.R * f.S * f.channels;
  const T* weight = f.weight + group * f.outputs * filter;
  if (!f.transposed) {
    pack_panel_transposed(weight + column * filter, filter, f.outputs - column, filter, panel);
    return;
  }
  for (int64_t i = f.h.taps - 1; i >= 0; --i) {
    for (int64_t j = f.w.taps - 1; j >= 0; --j, panel += f.outputs * kTileColumns<Accumulator<T>>) {
      const int64_t tap = (f.h.tap + i * f.h.tap_step) * f.S + f.w.tap + j * f.w.tap_step;
      pack_panel(weight + tap * f.channels + column, filter, f.channels - column, f.outputs, panel);
    }
  }
}

template <class T>
void pack_all_filters(const Filters<T>& filters, int64_t groups, Accumulator<T>* packed) {
  constexpr int64_t kColumns = kTileColumns<Accumulator<T>>;
  const int64_t panel_size = filters.depth() * kColumns, panels = ceil_div(filters.columns(), kColumns);
  parallel_for(groups * panels, ceil_div(kPackGrain, panel_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_filters(filters, i / panels, i % panels * kColumns, packed + i * panel_size);
    }
  });
}

#define INSTANTIATE(T)                                                              \
  template void pack_filters(const Filters<T>&, int64_t, int64_t, Accumulator<T>*); \
  template void pack_all_filters(const Filters<T>&, int64_t, Accumulator<T>*);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
