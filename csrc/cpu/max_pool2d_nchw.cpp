// Max-pooling of contiguous NCHW planes, vectorised along the flattened output plane.
//
// A band of rows is unpacked into *phases*: padded input cells that are a stride apart lie side by side,
//   phase (a, b)[m][k] = padded[m · stride_h + a][k · stride_w + b],
// in rows as long as the output's plus the reach of a window. A tap then is the whole band of one phase,
// shifted by a constant: window t of the band reads phase[t + offset(tap)] for every t, across row ends too,
// so vectors are full even for rows of six. The gradient does the same backwards: dy and taps lie in such
// padded rows, and each phase of dx is a sum of shifted, masked copies of dy. Bands keep the scratch in L2;
// what two of them share is unpacked twice.
#include "cpu/max_pool2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kBandElements = 32768;
constexpr int kBlocks = 4;  // vectors in flight: hides the latency of compare and select

// One axis' taps by phase: tap r lies in slot r mod slots, shift(r) elements on. A phase without a tap has no
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
  // The last tap of a slot.
  int64_t last_tap(int64_t slot) const { return slot + (axis.kernel - 1 - slot) / slots * slots; }
  // The input cell that is element m of a slot: outside [0, in) in the padding.
  int64_t cell(int64_t slot, int64_t m) const {
    return m * axis.stride + slot * axis.dilation % axis.stride - axis.pad;
  }
  // The elements of a slot that lie inside the input: [first, end).
  int64_t first(int64_t slot) const { return ceil_div(max64(-cell(slot, 0), 0), axis.stride); }
  int64_t end(int64_t slot) const { return ceil_div(max64(axis.in - cell(slot, 0), 0), axis.stride); }
};

// How a plane is cut into bands of rows, and how long a row of the scratch is.
struct Plan {
  Phases h, w;
  int64_t row, rows;  // of the plane, in units of a window: columns with padding, rows
  int64_t band, bands;

  Plan(const MaxPool2dParams& params, int64_t row, int64_t rows)
      : h(params.h), w(params.w), row(row), rows(rows) {
    // At least twice the reach: the overlap is never more than half of a band.
    band = min64(rows, max64(max64(kBandElements / (h.slots * w.slots * row), 2 * h.reach), 1));
    bands = ceil_div(rows, band);
  }
  int64_t band_rows(int64_t index) const { return min64(band, rows - index * band); }
};

template <class T>
CUDA_CNN_INLINE void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

// out[k] = x[k · stride], widened.
template <class T>
CUDA_CNN_INLINE void unpack_row(const T* x, int64_t stride, int64_t count, Accumulator<T>* out) {
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) out[k] = widen(x[k]);
  } else if (stride == 2) {
    for (int64_t k = 0; k < count; ++k) out[k] = widen(x[2 * k]);
  } else {
    for (int64_t k = 0; k < count; ++k) out[k] = widen(x[k * stride]);
  }
}

// dx[k · stride] = in[k], narrowed.
template <class T>
CUDA_CNN_INLINE void pack_row(const Accumulator<T>* in, int64_t stride, int64_t count, T* dx) {
  if (stride == 1) {
    for (int64_t k = 0; k < count; ++k) dx[k] = narrow<T>(in[k]);
  } else {
    for (int64_t k = 0; k < count; ++k) dx[k * stride] = narrow<T>(in[k]);
  }
}

// Phases of output rows [first, first + rows): slots_h · slots_w of band + reach rows; −inf in the padding.
template <class T>
void unpack_band(const Plan& plan, const T* plane, int64_t first, int64_t rows, Accumulator<T>* scratch) {
  using A = Accumulator<T>;
  const Phases &h = plan.h, &w = plan.w;
  const A nothing = -A(__builtin_inff());
  for (int64_t a = 0; a < h.slots; ++a) {
    for (int64_t b = 0; b < w.slots; ++b) {
      A* out = scratch + (a * w.slots + b) * (plan.band + h.reach) * plan.row;
      const int64_t begin = min64(w.first(b), plan.row), end = max64(begin, min64(w.end(b), plan.row));
      for (int64_t m = 0; m < rows + h.reach; ++m, out += plan.row) {
        const int64_t i = h.cell(a, first + m);
        if (i < 0 || i >= h.axis.in) {
          fill(out, plan.row, nothing);
          continue;
        }
        fill(out, begin, nothing);
        unpack_row(plane + i * w.axis.in + w.cell(b, begin), w.axis.stride, end - begin, out + begin);
        fill(out + end, plan.row - end, nothing);
      }
    }
  }
}

// Where the scratch holds tap k's cell of the band's window 0.
void forward_offsets(const Plan& plan, int64_t* offsets) {
  const Phases &h = plan.h, &w = plan.w;
  for (int64_t r = 0; r < h.axis.kernel; ++r) {
    for (int64_t s = 0; s < w.axis.kernel; ++s) {
      const int64_t phase = h.slot(r) * w.slots + w.slot(s);
      *offsets++ = (phase * (plan.band + h.reach) + h.shift(r)) * plan.row + w.shift(s);
    }
  }
}

// Scans all taps for kCount vectors of windows.
template <class A, class Tap, bool kTrack, int kCount>
CUDA_CNN_INLINE void scan_taps(const A* cells, const int64_t* offsets, int64_t taps, A* best_out,
                               Tap* tap_out) {
  constexpr int kStep = kLanes<A>;
  Vec<A> best[kCount];
  TapLanes<A> tap[kCount] = {};
  for (int b = 0; b < kCount; ++b) best[b] = lowest<A>();
  for (int64_t k = 0; k < taps; ++k) {
    const A* p = cells + offsets[k];
    const TapLanes<A> here = TapLanes<A>{} + static_cast<TapLane<A>>(k);
#pragma GCC unroll 4
    for (int b = 0; b < kCount; ++b) take_greater<kTrack>(load(p + b * kStep), here, best[b], tap[b]);
  }
  for (int b = 0; b < kCount; ++b) {
    store(best_out + b * kStep, best[b]);
    if constexpr (kTrack) store_taps<A>(tap_out + b * kStep, tap[b]);
  }
}

// Output row p of a plane, from scratch. A window without a greater cell than −inf still has tap 0: it may
// lie outside the plane, and the first one inside takes its place.
template <class T, class Tap, bool kTrack>
void write_row(const MaxPool2dParams& params, int64_t plane, int64_t p, const Accumulator<T>* best,
               Tap* tap) {
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t at = (plane * h.out + p) * w.out;
  pack_row(best, 1, w.out, static_cast<T*>(params.output) + at);
  if constexpr (kTrack) {
    const Accumulator<T> nothing = -Accumulator<T>(__builtin_inff());
    bool any = false;
    for (int64_t q = 0; q < w.out; ++q) any |= best[q] == nothing;
    for (int64_t q = 0; any && q < w.out; ++q) {
      if (best[q] == nothing) tap[q] = static_cast<Tap>(first_tap(h, p) * w.kernel + first_tap(w, q));
    }
    if (params.taps) memcpy(static_cast<Tap*>(params.taps) + at, tap, w.out * sizeof(Tap));
    if (params.indices) {
      for (int64_t q = 0; q < w.out; ++q) params.indices[at + q] = tap_index(h, w, p, q, tap[q]);
    }
  }
}

template <class T, class Tap, bool kTrack>
void forward(const MaxPool2dParams& params) {
  using A = Accumulator<T>;
  constexpr int kStep = kLanes<A>;
  const PoolAxis &h = params.h, &w = params.w;
  const Plan plan(params, w.out + Phases(w).reach, h.out);
  const int64_t taps = h.kernel * w.kernel, slack = kBlocks * kStep;
  int64_t* offsets = workspace<int64_t>(Workspace::kShared, taps);
  forward_offsets(plan, offsets);
  const int64_t tasks = params.batch * params.channels * plan.bands;
  parallel_for(tasks, grain_of(plan.band * plan.row), [&](int64_t begin, int64_t end) {
    const int64_t cells = plan.h.slots * plan.w.slots * (plan.band + plan.h.reach) * plan.row;
    A* scratch = workspace<A>(Workspace::kA, cells + slack);
    A* best = workspace<A>(Workspace::kB, plan.band * plan.row + slack);
    Tap* tap = workspace<Tap>(Workspace::kC, plan.band * plan.row + slack);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / plan.bands, first = task % plan.bands * plan.band;
      const int64_t rows = plan.band_rows(task % plan.bands), windows = rows * plan.row;
      unpack_band(plan, static_cast<const T*>(params.input) + plane * h.in * w.in, first, rows, scratch);
      int64_t t = 0;
      for (; t + kBlocks * kStep <= windows; t += kBlocks * kStep) {
        scan_taps<A, Tap, kTrack, kBlocks>(scratch + t, offsets, taps, best + t, tap + t);
      }
      for (; t < windows; t += kStep)
        scan_taps<A, Tap, kTrack, 1>(scratch + t, offsets, taps, best + t, tap + t);
      for (int64_t m = 0; m < rows; ++m) {
        write_row<T, Tap, kTrack>(params, plane, first + m, best + m * plan.row, tap + m * plan.row);
      }
    }
  });
}

// One term of a phase of dx: the tap, and where the scratch holds the window whose tap it is.
struct Term {
  int64_t tap;
  int64_t offset;
};

// The terms of every phase, in window order; starts[phase] … starts[phase + 1].
void backward_terms(const Plan& plan, Term* terms, int64_t* starts) {
  const Phases &h = plan.h, &w = plan.w;
  int64_t count = 0;
  for (int64_t a = 0; a < h.slots; ++a) {
    for (int64_t b = 0; b < w.slots; ++b) {
      *starts++ = count;
      for (int64_t r = h.last_tap(a); r >= 0; r -= h.slots) {
        for (int64_t s = w.last_tap(b); s >= 0; s -= w.slots) {
          terms[count++] = {r * w.axis.kernel + s, (h.reach - h.shift(r)) * plan.row + w.reach - w.shift(s)};
        }
      }
    }
  }
  *starts = count;
}

template <class A, class Tap, int kCount>
CUDA_CNN_INLINE void sum_terms(const Term* term, const Term* end, const A* dy, const Tap* taps, A* out) {
  constexpr int kStep = kLanes<A>;
  Vec<A> total[kCount] = {};
  for (; term < end; ++term) {
    const TapLanes<A> wanted = TapLanes<A>{} + static_cast<TapLane<A>>(term->tap);
#pragma GCC unroll 4
    for (int b = 0; b < kCount; ++b) {
      const int64_t at = term->offset + b * kStep;
      total[b] += load_taps<A>(taps + at) == wanted ? load(dy + at) : Vec<A>{};
    }
  }
  for (int b = 0; b < kCount; ++b) store(out + b * kStep, total[b]);
}

// dy and taps of windows [first − reach, first + rows) into padded rows, `reach` columns of nothing before
// each.
template <class T, class Tap>
void unpack_gradient(const MaxPool2dParams& params, const Plan& plan, int64_t plane, int64_t first,
                     int64_t rows, Accumulator<T>* dy, Tap* taps) {
  using A = Accumulator<T>;
  const int64_t columns = params.w.out;
  fill(dy, plan.w.reach, A(0));
  dy += plan.w.reach;
  taps += plan.w.reach;
  for (int64_t p = first - plan.h.reach; p < first + rows; ++p, dy += plan.row, taps += plan.row) {
    const bool inside = p >= 0 && p < params.h.out;
    const int64_t at = (plane * params.h.out + p) * columns;
    if (inside) {
      unpack_row(static_cast<const T*>(params.input) + at, 1, columns, dy);
      memcpy(taps, static_cast<const Tap*>(params.taps) + at, columns * sizeof(Tap));
    }
    fill(dy + (inside ? columns : 0), plan.row - (inside ? columns : 0), A(0));
  }
}

template <class T>
void write_phase(const Plan& plan, int64_t a, int64_t b, int64_t first, int64_t rows,
                 const Accumulator<T>* phase, T* dx) {
  const Phases &h = plan.h, &w = plan.w;
  const int64_t begin = w.first(b), end = w.end(b);
  for (int64_t m = max64(0, h.first(a) - first); m < min64(rows, h.end(a) - first); ++m) {
    if (end <= begin) return;
    pack_row(phase + m * plan.row + begin, w.axis.stride, end - begin,
             dx + h.cell(a, first + m) * w.axis.in + w.cell(b, begin));
  }
}

template <class T, class Tap>
void backward(const MaxPool2dParams& params) {
  using A = Accumulator<T>;
  constexpr int kStep = kLanes<A>;
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t columns = max64(w.out + Phases(w).reach, ceil_div(w.in + w.pad, w.stride));
  const Plan plan(params, columns, ceil_div(h.in + h.pad, h.stride));
  const int64_t phases = plan.h.slots * plan.w.slots, slack = kBlocks * kStep;
  Term* terms = workspace<Term>(Workspace::kShared, h.kernel * w.kernel + phases);
  int64_t* starts = reinterpret_cast<int64_t*>(terms + h.kernel * w.kernel);
  backward_terms(plan, terms, starts);
  const bool every_cell_has_a_tap = plan.h.slots == h.stride && plan.w.slots == w.stride;
  const int64_t tasks = params.batch * params.channels * plan.bands;
  parallel_for(tasks, grain_of(plan.band * plan.row), [&](int64_t begin, int64_t end) {
    const int64_t padded = (plan.band + plan.h.reach) * plan.row + plan.w.reach + slack;
    A* dy = workspace<A>(Workspace::kA, padded);
    Tap* taps = workspace<Tap>(Workspace::kC, padded);
    A* phase = workspace<A>(Workspace::kB, plan.band * plan.row + slack);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / plan.bands, first = task % plan.bands * plan.band;
      const int64_t rows = plan.band_rows(task % plan.bands), count = rows * plan.row;
      T* dx = static_cast<T*>(params.output) + plane * h.in * w.in;
      if (!every_cell_has_a_tap) {
        const int64_t top = max64(0, first * h.stride - h.pad);
        const int64_t bottom = min64(h.in, (first + rows) * h.stride - h.pad);
        fill(dx + top * w.in, (bottom - top) * w.in, T{});
      }
      unpack_gradient<T>(params, plan, plane, first, rows, dy, taps);
      for (int64_t k = 0; k < phases; ++k) {
        const Term *from = terms + starts[k], *to = terms + starts[k + 1];
        int64_t t = 0;
        for (; t + kBlocks * kStep <= count; t += kBlocks * kStep) {
          sum_terms<A, Tap, kBlocks>(from, to, dy + t, taps + t, phase + t);
        }
        for (; t < count; t += kStep) sum_terms<A, Tap, 1>(from, to, dy + t, taps + t, phase + t);
        write_phase(plan, k / plan.w.slots, k % plan.w.slots, first, rows, phase, dx);
      }
    }
  });
}

}  // namespace

void max_pool2d_nchw(const MaxPool2dParams& params) {
  dispatch_pool(params, [&](auto element, auto tap) {
    const bool track = params.taps || params.indices;
    return track ? forward<decltype(element), decltype(tap), true>(params)
                 : forward<decltype(element), decltype(tap), false>(params);
  });
}

void max_pool2d_backward_nchw(const MaxPool2dParams& params) {
  dispatch_pool(params, [&](auto element, auto tap) { backward<decltype(element), decltype(tap)>(params); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
