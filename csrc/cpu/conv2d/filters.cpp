#include "cpu/conv2d/filters.h"

#include "cpu/conv2d/prefetch.h"
#include "cpu/parallel.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Below so many elements packing is not worth a second thread.
constexpr int64_t kPackGrain = 65536;

template <class T, class E>
void pack_filters(const Filters<T, E>& f, int64_t group, int64_t column, int64_t begin, int64_t end,
                  E* panel) {
  const int64_t filter = f.R * f.S * f.channels;
  const T* weight = f.weight + group * f.outputs * filter;
  if (!f.transposed) {
    pack_panel_transposed(weight + column * filter + begin, filter, f.outputs - column, end - begin, panel);
    return;
  }
  for (int64_t count; begin < end; begin += count, panel += operands<E>(count) * kTileColumns<E>) {
    const int64_t backwards = f.h.taps * f.w.taps - 1 - begin / f.outputs, output = begin % f.outputs;
    const int64_t r = f.h.tap + backwards / f.w.taps * f.h.tap_step;
    const int64_t s = f.w.tap + backwards % f.w.taps * f.w.tap_step;
    count = min64(f.outputs - output, end - begin);
    pack_panel(weight + output * filter + (r * f.S + s) * f.channels + column, filter, f.channels - column,
               count, panel);
  }
}

template <class T, class E>
void pack_filter_planes(const Filters<T, E>& f, int64_t group, int64_t column, int64_t begin, int64_t end,
                        E* panel) {
  const int64_t taps = f.R * f.S, filter = taps * f.channels;
  const int64_t count = end - begin, tap_step = count * kTileColumns<E>;
  const T* weight = f.weight + group * f.outputs * filter;
  if (!f.transposed) {
    pack_panel_of_planes(weight + column * filter + begin * taps, filter, f.outputs - column, count, taps,
                         tap_step, panel);
    return;
  }
  panel += (taps - 1) * tap_step;  // backwards
  for (int64_t output = begin; output < end; ++output, panel += kTileColumns<E>) {
    const T* planes = weight + output * filter + column * taps;
    prefetch_to_l2(planes + filter, kTileColumns<E> * taps);
    pack_panel_of_planes(planes, taps, f.channels - column, 1, taps, -tap_step, panel);
  }
}

template <class T, class E>
void pack_all_filters(const Filters<T, E>& filters, int64_t groups, E* packed) {
  constexpr int64_t kColumns = kTileColumns<E>;
  const int64_t panel_size = operands<E>(filters.depth()) * kColumns,
                panels = ceil_div(filters.columns(), kColumns);
  parallel_for(groups * panels, ceil_div(kPackGrain, panel_size), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / panels, column = i % panels * kColumns;
      if (filters.planes) {
        pack_filter_planes(filters, group, column, 0, filters.channels, packed + i * panel_size);
      } else {
        pack_filters(filters, group, column, 0, filters.depth(), packed + i * panel_size);
      }
    }
  });
}

#define INSTANTIATE(T, E)                                                                         \
  template void pack_filters(const Filters<T, E>&, int64_t, int64_t, int64_t, int64_t, E*);       \
  template void pack_filter_planes(const Filters<T, E>&, int64_t, int64_t, int64_t, int64_t, E*); \
  template void pack_all_filters(const Filters<T, E>&, int64_t, E*);
INSTANTIATE(float, float)
INSTANTIATE(double, double)
INSTANTIATE(BFloat16, float)
INSTANTIATE(Half, float)
#if defined(CUDA_CNN_HAS_PAIRS)
INSTANTIATE(BFloat16, Bf16Pair)
#endif

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
