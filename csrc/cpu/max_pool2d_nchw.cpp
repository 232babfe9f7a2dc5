// Max-pooling of contiguous NCHW planes.
//
// Forward, a band of output rows at a time, in two passes (a window's scan is by rows, so the first of equal
// cells survives both):
//   across: each input row is unpacked into *phases*, cells a stride apart side by side, so that a tap of all
//     windows is one contiguous run; the best of each window's cells in this row, and its column s, go to
//     scratch;
//   down:   rows of scratch that one tap r reads lie one after another, as long as output rows: windows are
//     scanned as one flat array, with full vectors however short a row is.
// Where a row has neither NaN nor infinity, which one multiply-add a vector tells, comparing needs no NaN
// rule. Bands keep the scratch in L2; rows that two bands share are done twice.
//
// Backward: each plane is one thread's, so adding dy to the cell that the tap names needs no atomics, and
// goes in window order.
#include "cpu/max_pool2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kBandElements = 32768;

// One axis' taps by phase: tap r is in slot r mod slots, shift(r) elements on. A phase without a tap has no
// slot.
struct Phases {
  PoolAxis axis;
  int64_t slots;
  int64_t reach;  // the largest shift

  explicit Phases(const PoolAxis& a) : axis(a) {
    int64_t divisor = a.stride, rest = a.dilation % a.stride;
    while (rest != 0) {
      const int64_t next = divisor % rest;
      divisor = rest;
      rest = next;
    }
    slots = min64(a.kernel, a.stride / divisor);
    reach = shift(a.kernel - 1);
  }
  int64_t slot(int64_t tap) const { return tap % slots; }
  int64_t shift(int64_t tap) const { return tap * axis.dilation / axis.stride; }
  // The input cell that is element m of a slot: outside [0, in) in the padding.
  int64_t cell(int64_t slot, int64_t m) const {
    return m * axis.stride + slot * axis.dilation % axis.stride - axis.pad;
  }
};

// The elements [begin, end) of a row's phase come from x[cell], x[cell + stride], …; the others are padding.
struct Segment {
  int64_t cell, begin, end;
};

struct Plan {
  Phases h, w;
  int64_t used;    // elements of a phase of one row
  int64_t length;  // from one phase to the next: a vector's overhang fits between
  int64_t band;    // output rows
  int64_t bands;
  int64_t slot_rows;     // scratch rows of one slot
  int64_t* tap_columns;  // where the phases of a row hold tap s of window 0
  int64_t* tap_rows;     // where the scratch holds what tap r of a band's window 0 reads
  Segment* segments;     // of each slot of w

  explicit Plan(const MaxPool2dParams& params) : h(params.h), w(params.w) {
    used = w.axis.out + w.reach;
    length = used + kVectorBytes;
    // At least twice the reach: the overlap is never more than half of a band.
    band = min64(h.axis.out, max64(max64(kBandElements / (h.slots * w.axis.out), 2 * h.reach), 1));
    bands = ceil_div(h.axis.out, band);
    slot_rows = band + h.reach;
    segments = workspace<Segment>(Workspace::kShared, w.slots + w.axis.kernel + h.axis.kernel);
    tap_columns = reinterpret_cast<int64_t*>(segments + w.slots);
    tap_rows = tap_columns + w.axis.kernel;
    for (int64_t b = 0; b < w.slots; ++b) {
      const int64_t begin = min64(used, ceil_div(max64(-w.cell(b, 0), 0), w.axis.stride));
      const int64_t end = min64(used, ceil_div(max64(w.axis.in - w.cell(b, 0), 0), w.axis.stride));
      segments[b] = {w.cell(b, begin), begin, max64(begin, end)};
    }
    for (int64_t s = 0; s < w.axis.kernel; ++s) tap_columns[s] = w.slot(s) * length + w.shift(s);
    for (int64_t r = 0; r < h.axis.kernel; ++r) {
      tap_rows[r] = (h.slot(r) * slot_rows + h.shift(r)) * w.axis.out;
    }
  }
  int64_t scratch() const { return h.slots * slot_rows * w.axis.out + kVectorBytes; }
};

template <class T>
CUDA_CNN_INLINE void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_up_to(const T* p, int64_t count) {
  return count >= kLanes<T> ? load(p) : count > 0 ? load_first(p, count) : Vec<Accumulator<T>>{};
}

// Lanes 0, 2, 4, … of a and then of b.
template <class A>
CUDA_CNN_INLINE Vec<A> even_lanes(Vec<A> a, Vec<A> b) {
#if defined(__clang__)
  Vec<A> even;
  for (int i = 0; i < kLanes<A>; ++i) even[i] = 2 * i < kLanes<A> ? a[2 * i] : b[2 * i - kLanes<A>];
  return even;
#else
  TapLanes<A> lanes;
  for (int i = 0; i < kLanes<A>; ++i) lanes[i] = 2 * i;
  return __builtin_shuffle(a, b, lanes);
#endif
}

// out[k] = x[k · stride], widened; whole vectors are written. Multiplies everything by 0 into check: a NaN or
// an infinity leaves NaN there.
template <class T, class V>
CUDA_CNN_INLINE void unpack(const T* x, int64_t stride, int64_t count, Accumulator<T>* out, V& check) {
  constexpr int kStep = kLanes<T>;
  for (int64_t k = 0; k < count; k += kStep) {
    V v = {};
    if (stride == 1) {
      v = load_up_to(x + k, count - k);
    } else if (stride == 2) {
      const int64_t left = 2 * (count - k) - 1;
      v = even_lanes<Accumulator<T>>(load_up_to(x + 2 * k, left),
                                     load_up_to(x + 2 * k + kStep, left - kStep));
    } else {
      for (int64_t i = 0; i < min64(kStep, count - k); ++i) v[i] = widen(x[(k + i) * stride]);
    }
    check = fma(v, V{}, check);
    store(out + k, v);
  }
}

// One input row in phases, −inf in the padding.
template <class T, class V>
CUDA_CNN_INLINE void unpack_row(const Plan& plan, const T* row, Accumulator<T>* phases, V& check) {
  const Accumulator<T> nothing = -Accumulator<T>(__builtin_inff());
  for (int64_t b = 0; b < plan.w.slots; ++b, phases += plan.length) {
    const Segment& segment = plan.segments[b];
    unpack(row + segment.cell, plan.w.axis.stride, segment.end - segment.begin, phases + segment.begin,
           check);
    fill(phases, segment.begin, nothing);
    fill(phases + segment.end, plan.used - segment.end, nothing);
  }
}

// The best of each window's cells in one row; whole vectors are written.
template <class A, class Tap, bool kTrack, bool kFinite>
CUDA_CNN_INLINE void scan_across(const Plan& plan, const A* phases, A* best_out, Tap* tap_out) {
  const int64_t columns = plan.w.axis.out, kernel = plan.w.axis.kernel;
  for (int64_t q = 0; q < columns; q += kLanes<A>) {
    Vec<A> best = load(phases + q);
    TapLanes<A> tap = {};
    for (int64_t s = 1; s < kernel; ++s) {
      const Vec<A> v = load(phases + plan.tap_columns[s] + q);
      take_greater<kTrack, kFinite>(v, TapLanes<A>{} + static_cast<TapLane<A>>(s), best, tap);
    }
    store(best_out + q, best);
    if constexpr (kTrack) store_taps<A>(tap_out + q, tap);
  }
}

// All input rows of a band into scratch, in an order in which a vector's overhang is overwritten by the next
// row. True if they were finite; if not, a scan that took them for finite is void.
template <class T, class Tap, bool kTrack, bool kFinite>
bool scan_rows(const Plan& plan, const T* plane, int64_t first, int64_t rows, Accumulator<T>* phases,
               Accumulator<T>* best, Tap* tap) {
  using A = Accumulator<T>;
  const Phases& h = plan.h;
  const int64_t columns = plan.w.axis.out;
  Vec<A> check = {};
  for (int64_t a = 0; a < h.slots; ++a) {
    int64_t i = h.cell(a, first), at = a * plan.slot_rows * columns;
    for (int64_t m = 0; m < rows + h.reach; ++m, i += h.axis.stride, at += columns) {
      if (i < 0 || i >= h.axis.in) {
        fill(best + at, columns, -A(__builtin_inff()));
        if constexpr (kTrack) fill(tap + at, columns, Tap{0});
      } else {
        unpack_row(plan, plane + i * plan.w.axis.in, phases, check);
        scan_across<A, Tap, kTrack, kFinite>(plan, phases, best + at, tap + at);
      }
    }
  }
  return sum(check) == 0;
}

// Windows [0, count) of a band, from scratch to y and taps. True if one of them is −inf.
template <class T, class Tap, bool kTrack, bool kFinite>
bool scan_down(const Plan& plan, int64_t count, const Accumulator<T>* rows, const Tap* row_taps, T* y,
               Tap* taps) {
  using A = Accumulator<T>;
  const int64_t kernel_h = plan.h.axis.kernel, kernel_w = plan.w.axis.kernel;
  TapLanes<A> any_nothing = {};
  for (int64_t t = 0; t < count; t += kLanes<A>) {
    Vec<A> best = lowest<A>();
    TapLanes<A> tap = {};
    for (int64_t r = 0; r < kernel_h; ++r) {
      const int64_t at = plan.tap_rows[r] + t;
      TapLanes<A> here = {};
      if constexpr (kTrack) here = load_taps<A>(row_taps + at) + static_cast<TapLane<A>>(r * kernel_w);
      take_greater<kTrack, kFinite>(load(rows + at), here, best, tap);
    }
    const int64_t lanes = min64(kLanes<A>, count - t);
    any_nothing |= best == lowest<A>();
    if (lanes == kLanes<A>) {
      store(y + t, best);
      if constexpr (kTrack) store_taps<A>(taps + t, tap);
    } else {
      store_first(y + t, best, lanes);
      if constexpr (kTrack) store_first_taps<A>(taps + t, tap, lanes);
    }
  }
  bool any = false;
  for (int i = 0; i < kLanes<A>; ++i) any |= any_nothing[i] != 0;
  return any;
}

// A window that is −inf has kept tap 0, which may lie outside the plane: the first one inside takes its
// place.
template <class T, class Tap>
void name_first_cells(const Plan& plan, int64_t first, int64_t count, const T* y, Tap* taps) {
  const PoolAxis &h = plan.h.axis, &w = plan.w.axis;
  for (int64_t t = 0; t < count; ++t) {
    if (widen(y[t]) != -Accumulator<T>(__builtin_inff())) continue;
    taps[t] = static_cast<Tap>(first_tap(h, first + t / w.out) * w.kernel + first_tap(w, t % w.out));
  }
}

// Output rows [first, first + rows) of a plane; y and taps point at the first of them.
template <class T, class Tap, bool kTrack>
void pool_band(const Plan& plan, const T* plane, int64_t first, int64_t rows, T* y, Tap* taps) {
  using A = Accumulator<T>;
  const PoolAxis& w = plan.w.axis;
  A* phases = workspace<A>(Workspace::kA, plan.w.slots * plan.length);
  A* best = workspace<A>(Workspace::kB, plan.scratch());
  Tap* best_taps = workspace<Tap>(Workspace::kC, plan.scratch());
  bool nothing;
  if (scan_rows<T, Tap, kTrack, true>(plan, plane, first, rows, phases, best, best_taps)) {
    nothing = scan_down<T, Tap, kTrack, true>(plan, rows * w.out, best, best_taps, y, taps);
  } else {
    scan_rows<T, Tap, kTrack, false>(plan, plane, first, rows, phases, best, best_taps);
    nothing = scan_down<T, Tap, kTrack, false>(plan, rows * w.out, best, best_taps, y, taps);
  }
  if constexpr (kTrack) {
    if (nothing) name_first_cells(plan, first, rows * w.out, y, taps);
  }
}

template <class T, class Tap, bool kTrack>
void forward(const MaxPool2dParams& params) {
  const Plan plan(params);
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t tasks = params.batch * params.channels * plan.bands;
  parallel_for(tasks, grain_of(plan.band * w.out), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / plan.bands, first = task % plan.bands * plan.band;
      const int64_t rows = min64(plan.band, h.out - first), at = (plane * h.out + first) * w.out;
      const T* x = static_cast<const T*>(params.input) + plane * h.in * w.in;
      Tap* taps = kTrack ? static_cast<Tap*>(params.taps) + at : nullptr;
      pool_band<T, Tap, kTrack>(plan, x, first, rows, static_cast<T*>(params.output) + at, taps);
      for (int64_t t = 0; kTrack && params.indices && t < rows * w.out; ++t) {
        params.indices[at + t] = tap_index(h, w, first + t / w.out, t % w.out, taps[t]);
      }
    }
  });
}

}  // namespace

void max_pool2d_nchw(const MaxPool2dParams& params) {
  dispatch_pool(params, [&](auto element, auto tap) {
    return params.taps ? forward<decltype(element), decltype(tap), true>(params)
                       : forward<decltype(element), decltype(tap), false>(params);
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
