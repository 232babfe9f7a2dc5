// Max-pooling of contiguous NCHW planes, forward.
//
// A band of output rows at a time, in two passes. A window's scan is by rows, so the first of equal cells
// survives both:
//   across: the best of kernel_w cells from *every* cell on, as if the stride were 1, and its column s: the
//     band's input is one flat array, with full vectors however short a row is;
//   down: of each output row, the best of the kernel_h results at its windows' left corners.
// Where the band has neither NaN nor infinity, which one multiply-add a vector tells, comparing needs no NaN
// rule. Bands keep the scratch in L2; rows that two bands share are done twice.
#include "cpu/max_pool2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kBandElements = 8192;

// Lanes 0, 2, 4, … of a and then of b.
template <class V>
CUDA_CNN_INLINE V even_lanes(V a, V b) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
#if defined(__clang__)
  V even;
  for (int i = 0; i < kCount; ++i) even[i] = 2 * i < kCount ? a[2 * i] : b[2 * i - kCount];
  return even;
#else
  decltype(a > b) lanes;
  for (int i = 0; i < kCount; ++i) lanes[i] = 2 * i;
  return __builtin_shuffle(a, b, lanes);
#endif
}

CUDA_CNN_INLINE Vec<float> scratch_lanes(const float* p) { return load(p); }
CUDA_CNN_INLINE Vec<double> scratch_lanes(const double* p) { return load(p); }
CUDA_CNN_INLINE TapLanes<float> scratch_lanes(const TapLane<float>* p) {
  return reinterpret_cast<TapLanes<float>>(load(reinterpret_cast<const float*>(p)));
}
CUDA_CNN_INLINE TapLanes<double> scratch_lanes(const TapLane<double>* p) {
  return reinterpret_cast<TapLanes<double>>(load(reinterpret_cast<const double*>(p)));
}

// p[0], p[stride], p[2 · stride], …; kStride 0: any.
template <int kStride, class E>
CUDA_CNN_INLINE auto strided_lanes(const E* p, int64_t stride) {
  auto lanes = scratch_lanes(p);
  constexpr int kCount = sizeof(lanes) / sizeof(E);
  if constexpr (kStride == 2) return even_lanes(lanes, scratch_lanes(p + kCount));
  for (int i = 1; kStride == 0 && i < kCount; ++i) lanes[i] = p[i * stride];
  return lanes;
}

struct Plan {
  PoolAxis h, w;
  bool copies;    // the input goes through scratch: widened, and with −inf for the padding
  int64_t pitch;  // from one row to the next
  int64_t band;   // output rows
  int64_t bands;

  Plan(const MaxPool2dParams& params, bool widens) : h(params.h), w(params.w) {
    const int64_t reach = (w.out - 1) * w.stride + (w.kernel - 1) * w.dilation + 1;
    copies = widens || w.pad > 0 || reach > w.in;
    pitch = copies ? max64(w.pad + w.in, reach) : w.in;
    // At least as many rows as a window has: the overlap of bands stays small.
    band = min64(h.out, max64(kBandElements / (h.stride * pitch), 1 + h.kernel * h.dilation / h.stride));
    bands = ceil_div(h.out, band);
  }
  int64_t input_begin(int64_t first) const { return max64(0, window_start(h, first)); }
  int64_t input_end(int64_t last) const {
    return min64(h.in, window_start(h, last) + (h.kernel - 1) * h.dilation + 1);
  }
};

// One band's scratch. A vector, or stride lanes, may be read past the end.
template <class A>
struct Scratch {
  A *cells, *best;
  TapLane<A>* tap;

  Scratch(const Plan& plan, int64_t rows) {
    const int64_t count = rows * plan.pitch + kLanes<A> * max64(plan.w.stride, 2);
    cells = workspace<A>(Workspace::kA, plan.copies ? count : 0);
    best = workspace<A>(Workspace::kB, count);
    tap = workspace<TapLane<A>>(Workspace::kC, count);
  }
};

// True if the rows are finite.
template <class T, class A = Accumulator<T>>
bool copy_rows(const Plan& plan, const T* x, int64_t rows, A* cells) {
  constexpr int64_t kStep = kLanes<T>;
  const int64_t width = plan.w.in, left = plan.w.pad, pitch = plan.pitch;
  Vec<A> check = {};
  for (int64_t row = 0; row < rows; ++row, x += width, cells += pitch) {
    for (int64_t i = 0; i < left; ++i) cells[i] = -A(__builtin_inff());
    for (int64_t i = 0; i < width; i += kStep) {  // a vector's overhang is overwritten by what follows
      const Vec<A> v = i + kStep <= width ? load(x + i) : load_part(x + i, width - i);
      check = fma(v, Vec<A>{}, check);
      store(cells + left + i, v);
    }
    for (int64_t i = left + width; i < pitch; ++i) cells[i] = -A(__builtin_inff());
  }
  return sum(check) == 0;
}

// The best of cells[i], cells[i + dilation], … for every i. True if the cells were finite, where `looks`: if
// not, a scan that took them for finite is void.
template <class A, int kSize, bool kTrack, bool kFinite>
bool scan_across(const PoolAxis& w, bool looks, const A* cells, int64_t count, A* best_out,
                 TapLane<A>* tap_out) {
  constexpr int64_t kStep = kLanes<A>;
  const int64_t kernel = kSize ? kSize : w.kernel, dilation = w.dilation;
  Vec<A> check = {};
  const auto scan = [&](int64_t i, const auto& read) {
    Vec<A> best = read(i);
    TapLanes<A> tap = {};
    if (kFinite && looks) check = fma(best, Vec<A>{}, check);
#pragma GCC unroll 2
    for (int64_t s = 1; s < kernel; ++s) {
      const TapLanes<A> here = TapLanes<A>{} + static_cast<TapLane<A>>(s);
      take_greater<kTrack, kFinite>(read(i + s * dilation), here, best, tap);
    }
    store(best_out + i, best);
    if constexpr (kTrack) {
      store(reinterpret_cast<A*>(tap_out + i), reinterpret_cast<Vec<A>>(tap));
    }
  };
  const int64_t whole = count - (kernel - 1) * dilation - kStep;
  int64_t i = 0;
  for (; i <= whole; i += kStep) scan(i, [&](int64_t at) { return load(cells + at); });
  for (; i < count; i += kStep) {
    scan(i, [&](int64_t at) {
      const int64_t left = count - at;
      return left >= kStep ? load(cells + at) : left > 0 ? load_part(cells + at, left) : Vec<A>{};
    });
  }
  return sum(check) == 0;
}

// Output rows [first, first + rows) from what scan_across has left of the band's input rows.
template <class T, class Tap, int kSize, int kStride, bool kTrack, bool kFinite>
void scan_down(const Plan& plan, int64_t first, int64_t rows, const Accumulator<T>* row_best,
               const TapLane<T>* row_tap, T* y, Tap* taps) {
  using A = Accumulator<T>;
  const PoolAxis h = plan.h, w = plan.w;
  const int64_t top = plan.input_begin(first), end = rows * w.out, step = h.dilation * plan.pitch;
  for (int64_t p = 0; p < rows; ++p) {
    const int64_t r_begin = first_tap(h, first + p), r_end = end_tap(h, first + p);
    const int64_t start = (window_start(h, first + p) - top) * plan.pitch;
    for (int64_t q = 0; q < w.out; q += kLanes<A>) {
      Vec<A> best = lowest<A>();
      TapLanes<A> tap = {};
      const auto take = [&](int64_t r) {
        const int64_t at = start + r * step + q * w.stride;
        TapLanes<A> here = {};
        if constexpr (kTrack) {
          here = strided_lanes<kStride>(row_tap + at, w.stride) + static_cast<TapLane<A>>(r * w.kernel);
        }
        take_greater<kTrack, kFinite>(strided_lanes<kStride>(row_best + at, w.stride), here, best, tap);
      };
      if (kSize && r_end - r_begin == kSize) {
#pragma GCC unroll 3
        for (int r = 0; r < kSize; ++r) take(r);
      } else {
        for (int64_t r = r_begin; r < r_end; ++r) take(r);
      }
      // A vector's overhang is overwritten by the next row.
      const int64_t t = p * w.out + q, lanes = min64(kLanes<A>, end - t);
      if (lanes == kLanes<A>) {
        store(y + t, best);
        if constexpr (kTrack) store_taps<A>(taps + t, tap);
      } else {
        store_first(y + t, best, lanes);
        if constexpr (kTrack) store_first_taps<A>(taps + t, tap, lanes);
      }
    }
  }
}

// A window that is −inf has kept tap 0, which may lie outside the plane: the first one inside takes its
// place.
template <class T, class Tap>
void name_first_cells(const Plan& plan, int64_t first, int64_t count, const T* y, Tap* taps) {
  const PoolAxis &h = plan.h, &w = plan.w;
  for (int64_t t = 0; t < count; ++t) {
    if (widen(y[t]) != -Accumulator<T>(__builtin_inff())) continue;
    taps[t] = static_cast<Tap>(first_tap(h, first + t / w.out) * w.kernel + first_tap(w, t % w.out));
  }
}

// Output rows [first, first + rows) of a plane; y and taps point at the first of them.
template <class T, class Tap, int kSize, int kStride, bool kTrack>
void pool_band(const Plan& plan, const T* plane, int64_t first, int64_t rows, T* y, Tap* taps) {
  using A = Accumulator<T>;
  const int64_t top = plan.input_begin(first), input_rows = plan.input_end(first + rows - 1) - top;
  const Scratch<A> scratch(plan, input_rows);
  const T* x = plane + top * plan.w.in;
  const A* cells = scratch.cells;
  bool finite = true;
  if (plan.copies) {
    finite = copy_rows(plan, x, input_rows, scratch.cells);
  } else if constexpr (sizeof(T) == sizeof(A)) {
    cells = x;
  }
  const int64_t count = input_rows * plan.pitch;
  A* best = scratch.best;
  TapLane<T>* tap = scratch.tap;
  if (finite && scan_across<A, kSize, kTrack, true>(plan.w, !plan.copies, cells, count, best, tap)) {
    scan_down<T, Tap, kSize, kStride, kTrack, true>(plan, first, rows, best, tap, y, taps);
  } else {
    scan_across<A, 0, kTrack, false>(plan.w, false, cells, count, best, tap);
    scan_down<T, Tap, 0, kStride, kTrack, false>(plan, first, rows, best, tap, y, taps);
    if constexpr (kTrack) name_first_cells(plan, first, rows * plan.w.out, y, taps);
  }
}

template <class T, class Tap, int kSize, int kStride, bool kTrack>
void forward(const MaxPool2dParams& params) {
  const Plan plan(params, sizeof(T) != sizeof(Accumulator<T>));
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t tasks = params.batch * params.channels * plan.bands;
  parallel_for(tasks, grain_of(plan.band * w.out), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / plan.bands, first = task % plan.bands * plan.band;
      const int64_t rows = min64(plan.band, h.out - first), at = (plane * h.out + first) * w.out;
      const T* x = static_cast<const T*>(params.input) + plane * h.in * w.in;
      Tap* taps = kTrack ? static_cast<Tap*>(params.taps) + at : nullptr;
      pool_band<T, Tap, kSize, kStride, kTrack>(plan, x, first, rows, static_cast<T*>(params.output) + at,
                                                taps);
      for (int64_t t = 0; kTrack && params.indices && t < rows * w.out; ++t) {
        params.indices[at + t] = tap_index(h, w, first + t / w.out, t % w.out, taps[t]);
      }
    }
  });
}

template <class T, class Tap, bool kTrack>
void forward(const MaxPool2dParams& params) {
  const int64_t stride = params.w.stride;
  if (stride > 2) return forward<T, Tap, 0, 0, kTrack>(params);
  if (params.h.kernel != 3 || params.w.kernel != 3) {
    return stride == 2 ? forward<T, Tap, 0, 2, kTrack>(params) : forward<T, Tap, 0, 1, kTrack>(params);
  }
  return stride == 2 ? forward<T, Tap, 3, 2, kTrack>(params) : forward<T, Tap, 3, 1, kTrack>(params);
}

}  // namespace

void max_pool2d_nchw(const MaxPool2dParams& params) {
  dispatch_pool(params, [&](auto element, auto tap) {
    return params.taps ? forward<decltype(element), decltype(tap), true>(params)
                       : forward<decltype(element), decltype(tap), false>(params);
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
