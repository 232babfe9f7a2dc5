// What the two layouts' max-pooling kernels share.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"
#include "kernels/max_pool2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

void max_pool2d_nchw(const MaxPool2dParams& params);

// Lanes of integers beside Vec<Accumulator<T>>, as its comparisons give them: int32 or int64.
template <class T>
using TapLanes = decltype(Vec<Accumulator<T>>{} > Vec<Accumulator<T>>{});
template <class T>
struct TapTypes {
  using Lane = decltype(+TapLanes<T>{}[0]);
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  typedef int32_t Wide __attribute__((vector_size(kLanes<T> * 4)));
};
template <class T>
using TapLane = typename TapTypes<T>::Lane;

template <class T>
CUDA_CNN_INLINE TapLanes<T> load_taps(const uint8_t* p) {
  typename TapTypes<T>::Bytes bytes;
  memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, TapLanes<T>);
}
template <class T>
CUDA_CNN_INLINE TapLanes<T> load_taps(const int32_t* p) {
  typename TapTypes<T>::Wide wide;
  memcpy(&wide, p, sizeof(wide));
  return __builtin_convertvector(wide, TapLanes<T>);
}
template <class T>
CUDA_CNN_INLINE void store_taps(uint8_t* p, TapLanes<T> taps) {
  const auto bytes = __builtin_convertvector(taps, typename TapTypes<T>::Bytes);
  memcpy(p, &bytes, sizeof(bytes));
}
template <class T>
CUDA_CNN_INLINE void store_taps(int32_t* p, TapLanes<T> taps) {
  const auto wide = __builtin_convertvector(taps, typename TapTypes<T>::Wide);
  memcpy(p, &wide, sizeof(wide));
}

template <class T, class Tap>
CUDA_CNN_INLINE TapLanes<T> load_first_taps(const Tap* p, int64_t count) {
  TapLanes<T> taps = {};
  for (int64_t i = 0; i < count; ++i) taps[i] = p[i];
  return taps;
}
template <class T, class Tap>
CUDA_CNN_INLINE void store_first_taps(Tap* p, TapLanes<T> taps, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = static_cast<Tap>(taps[i]);
}

template <class A>
CUDA_CNN_INLINE Vec<A> lowest() {
  return broadcast(-A(__builtin_inff()));
}

// One step of the scan: torch's rule for ties and NaN (takes_over), lane by lane. kFinite: nothing is NaN.
template <bool kTrack, bool kFinite, class V, class Taps>
CUDA_CNN_INLINE void take_greater(V value, Taps here, V& best, Taps& tap) {
  const auto takes = kFinite ? value > best : (value > best) | (value != value);
  best = takes ? value : best;
  if constexpr (kTrack) tap = takes ? here : tap;
}

// Tasks of one thread: enough work to pay for waking another.
CUDA_CNN_INLINE int64_t grain_of(int64_t elements_per_task) {
  return ceil_div(16384, max64(elements_per_task, 1));
}

// The one dtype and tap-width switch of a launcher: fn(T{}, Tap{}).
template <class Fn>
CUDA_CNN_INLINE void dispatch_pool(const MaxPool2dParams& params, const Fn& fn) {
  dispatch_dtype(params.dtype, [&](auto element) {
    if (params.wide_taps) {
      fn(element, int32_t{});
    } else {
      fn(element, uint8_t{});
    }
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
