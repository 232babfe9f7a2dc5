// The gradient of max-pooling in NCHW with small windows, gathered by vectors along rows: where the stride is
// 2 (3x3, 2x2), and where planes are as large as the pooled ones. Those are one array, however short a row:
// no tap of a window leads into another plane, nor, for that matter, to a row's cell by way of another row.
#include "cpu/max_pool2d_gather.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// Lanes 0, 1, … of a and b in turn (kHalf 1: those from the middle on).
template <int kHalf, class V>
CUDA_CNN_INLINE V interleave(V a, V b) {
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
#if defined(__clang__)
  V mixed;
  for (int i = 0; i < kCount; ++i) mixed[i] = (i % 2 ? b : a)[(i + kHalf * kCount) / 2];
  return mixed;
#else
  decltype(a > b) lanes;
  for (int i = 0; i < kCount; ++i) lanes[i] = i % 2 * kCount + (i + kHalf * kCount) / 2;
  return __builtin_shuffle(a, b, lanes);
#endif
}

// Scratch for NCHW: dy, widened, and taps, with windows around them whose tap names no cell. It is filled
// well ahead of its use: a load that covers parts of two stores waits until both have left the store queue.
template <class T>
struct PaddedWindows {
  static constexpr int64_t kPad = kLanes<T>;  // what put() writes behind its windows
  Accumulator<T>* dy;
  uint8_t* taps;

  explicit PaddedWindows(int64_t count) {
    dy = workspace<Accumulator<T>>(Workspace::kA, count);
    taps = workspace<uint8_t>(Workspace::kB, count);
    clear(0, count);
  }
  void clear(int64_t at, int64_t count) const { memset(taps + at, 255, count); }
  // Windows [from, from + count) of the tensors, which hold `all`, to `at`.
  void put(int64_t at, const MaxPool2dParams& params, int64_t from, int64_t count, int64_t all) const {
    const T* g = static_cast<const T*>(params.input) + from;
    const uint8_t* tap = static_cast<const uint8_t*>(params.taps) + from;
    for (int64_t k = 0; k < count; k += kPad) {
      const int64_t left = all - from - k;
      if (left >= kPad) {
        store(dy + at + k, load(g + k));
        __builtin_memcpy(taps + at + k, tap + k, kPad);
      } else {
        store(dy + at + k, load_first(g + k, left));
        for (int64_t i = 0; i < left; ++i) taps[at + k + i] = tap[k + i];
      }
    }
    __builtin_memset(taps + at + count, 255, kPad);
  }
};

// Planes as large as the pooled ones, as one array, block by block.
template <class T>
void gather_array(const MaxPool2dParams& params) {
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t all = params.batch * params.channels * h.in * w.in, count = h.kernel * w.kernel;
  const int64_t margin = (h.kernel - 1) * h.dilation * w.in + (w.kernel - 1) * w.dilation;
  const int64_t block = max64(1024, 4 * margin);
  Term* terms = workspace<Term>(Workspace::kShared, count);
  for (int64_t tap = 0; tap < count; ++tap) {
    const int64_t row = tap / w.kernel * h.dilation - h.pad, column = tap % w.kernel * w.dilation - w.pad;
    terms[count - 1 - tap] = {margin - row * w.in - column, tap};
  }
  parallel_for(ceil_div(all, block), grain_of(block), [&](int64_t begin, int64_t end) {
    const PaddedWindows<T> windows(2 * margin + block + 2 * kLanes<T>);
    for (int64_t at = begin * block; at < min64(end * block, all); at += block) {
      const int64_t cells = min64(block, all - at);
      const int64_t from = max64(0, at - margin), to = min64(all, at + cells + margin);
      windows.put(margin + from - at, params, from, to - from, all);
      if (to == all) windows.clear(margin + to - at, margin + kLanes<T>);
      gather_cells(terms, count, cells, windows.dy, windows.taps, static_cast<T*>(params.output) + at);
    }
  });
}

// The cells that begin in a row of windows at dy and taps, with a stride of 2: the input rows `dx` (null:
// outside the plane). Vectors lie along the windows: one holds a row's even cells and one the odd.
template <class T, int kSize, int kPad>
void gather_windows(const Accumulator<T>* dy, const uint8_t* taps, int64_t pitch, int64_t width,
                    T* const (&dx)[2]) {
  using V = Vec<Accumulator<T>>;
  constexpr int64_t kStep = kLanes<T>;
  for (int64_t j = 0; j < width; j += 2 * kStep, dy += kStep, taps += kStep) {
    V total[2][2] = {};
#pragma GCC unroll 2
    for (int above = (kSize - 1) / 2; above >= 0; --above) {
#pragma GCC unroll 3
      for (int s = kSize - 1; s >= 0; --s) {
        const int odd = (s + kPad) % 2;
        const int64_t at = (kPad - s + odd) / 2 - above * pitch;
        const V g = load(dy + at);
        const TapLanes<T> tap = load_taps<T>(taps + at);
#pragma GCC unroll 2
        for (int r = 2 * above; r < kSize && r < 2 * above + 2; ++r) {
          total[r % 2][odd] += tap == TapLanes<T>{} + TapLane<T>(r * kSize + s) ? g : V{};
        }
      }
    }
    const auto put = [&](T* row, int64_t first, V cells) {
      if (first + kStep <= width) {
        store(row + first, cells);
      } else if (first < width) {
        store_first(row + first, cells, width - first);
      }
    };
    for (int row = 0; row < 2; ++row) {
      const V *even = &total[row][0], *odd = &total[row][1];
      if (!dx[row]) continue;
      put(dx[row], j, interleave<0>(*even, *odd));
      put(dx[row], j + kStep, interleave<1>(*even, *odd));
    }
  }
}

// Lane i: v's lane (kFirst + i) / 2; any one where there is none.
template <int kFirst, class V>
CUDA_CNN_INLINE V halve_lanes(V v) {
  constexpr int kCount = sizeof(V) / sizeof(v[0]);
#if defined(__clang__)
  V halved;
  for (int i = 0; i < kCount; ++i) halved[i] = v[(kFirst + i) / 2 & (kCount - 1)];
  return halved;
#else
  decltype(v > v) lanes;
  for (int i = 0; i < kCount; ++i) lanes[i] = (kFirst + i) / 2;
  return __builtin_shuffle(v, lanes);
#endif
}

// A vector of an input row's cells, and of each the windows with a stride of 2 that hold its column: `near`
// as their column 0 or 1, `far`, the one before, as their column 2.
template <class T>
struct Columns {
  TapLanes<T> near, far;  // less than any tap of any row: no such window

  Columns() = default;
  Columns(const PoolAxis& w, int64_t first) {
    constexpr int64_t kNone = -2 * kMaxByteTaps;
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      const int64_t window = (first + w.pad + i) / 2, column = (first + w.pad + i) % 2;
      near[i] = static_cast<TapLane<T>>(window < w.out ? column : kNone);
      far[i] = static_cast<TapLane<T>>(column == 0 && window > 0 && window <= w.out ? 2 : kNone);
    }
  }
};

// Those windows' dy and taps, of one row of windows.
template <class T>
struct Holding {
  Vec<Accumulator<T>> near = {}, far = {};
  TapLanes<T> near_tap = TapLanes<T>{} - 1, far_tap = TapLanes<T>{} - 1;

  Holding() = default;
  template <int kFirst>
  CUDA_CNN_INLINE void spread(Vec<Accumulator<T>> dy, TapLanes<T> taps) {
    near = halve_lanes<kFirst>(dy);
    near_tap = halve_lanes<kFirst>(taps);
    far = halve_lanes<kFirst - 2>(dy);
    far_tap = halve_lanes<kFirst - 2>(taps);
  }
  // What the windows' row r gets.
  template <int kSize>
  CUDA_CNN_INLINE void add_row(int r, const Columns<T>& columns, Vec<Accumulator<T>>& total) const {
    const TapLanes<T> corner = TapLanes<T>{} + static_cast<TapLane<T>>(r * kSize);
    if constexpr (kSize > 2) total += far_tap == columns.far + corner ? far : Vec<Accumulator<T>>{};
    total += near_tap == columns.near + corner ? near : Vec<Accumulator<T>>{};
  }
};

// Windows of kSize x kSize with a stride of 2 over rows of at most kVectors vectors of cells: a row's windows
// are one vector, read once, and stay in registers for the three rows of cells that they hold.
template <class T, int kSize, int kPad, int kVectors>
void gather_short_rows(const MaxPool2dParams& params) {
  using V = Vec<Accumulator<T>>;
  constexpr int64_t kStep = kLanes<T>;
  const int64_t planes = params.batch * params.channels, size = params.h.in * params.w.in;
  parallel_for(planes, grain_of(size), [&](int64_t begin, int64_t end) {
    const PoolAxis h = params.h, w = params.w;  // copies: no store to dx changes them
    const T* dy = static_cast<const T*>(params.input);
    const uint8_t* taps = static_cast<const uint8_t*>(params.taps);
    T* dx = static_cast<T*>(params.output) + begin * size;
    const T* dx_end = dx + (end - begin) * size;
    const int64_t all = planes * h.out * w.out;
    Columns<T> columns[kVectors];
    for (int b = 0; b < kVectors; ++b) columns[b] = Columns<T>(w, b * kStep);
    for (int64_t plane = begin; plane < end; ++plane) {
      Holding<T> above[kVectors];
      for (int64_t p = 0, top = -h.pad; top < h.in; ++p, top += 2) {
        Holding<T> here[kVectors];
        if (p < h.out) {
          const int64_t at = (plane * h.out + p) * w.out, left = all - at;
          const V g = left >= kStep ? load(dy + at) : load_first(dy + at, left);
          const TapLanes<T> tap =
              left >= kStep ? load_taps<T>(taps + at) : load_first_taps<T>(taps + at, left);
          here[0].template spread<kPad>(g, tap);
          if constexpr (kVectors > 1) here[1].template spread<kStep + kPad>(g, tap);
        }
#pragma GCC unroll 2
        for (int r = 0; r < 2; ++r) {
          if (top + r < 0 || top + r >= h.in) continue;
#pragma GCC unroll 2
          for (int b = 0; b < kVectors; ++b) {
            V total = {};
            if (r == 0 && kSize > 2) above[b].template add_row<kSize>(2, columns[b], total);
            here[b].template add_row<kSize>(r, columns[b], total);
            // A vector's overhang is overwritten by the rows that follow.
            T* cells = dx + b * kStep;
            dx_end - cells >= kStep ? store(cells, total) : store_first(cells, total, dx_end - cells);
          }
          dx += w.in;
        }
#pragma GCC unroll 2
        for (int b = 0; b < kVectors; ++b) above[b] = here[b];
      }
    }
  });
}

// Windows of kSize x kSize with a stride of 2: the planes' rows of windows, one behind them for a last input
// row and one before that holds nothing, band by band. A band is short enough for reading to overlap writing.
template <class T, int kSize, int kPad>
void gather_long_rows(const MaxPool2dParams& params) {
  const PoolAxis &h = params.h, &w = params.w;
  constexpr int64_t kStep = kLanes<T>, kBand = 1024;
  const int64_t pitch = ceil_div(max64(w.out, (w.in + 1) / 2) + 2, kStep) * kStep + kStep;
  const int64_t rows = 1 + (h.in + h.pad + 1) / 2, band = ceil_div(kBand, 2 * pitch) * 2;
  const int64_t planes = params.batch * params.channels, all = planes * h.out * w.out;
  parallel_for(planes, grain_of(h.in * w.in), [&](int64_t begin, int64_t end) {
    const PaddedWindows<T> windows((band + 2) * pitch + 3 * kStep);
    for (int64_t first = begin * rows; first < end * rows; first += band) {
      const int64_t last = min64(first + band, end * rows);
      const auto place = [=](int64_t row) { return (row - first + 1) * pitch + 1; };
      for (int64_t row = max64(first - 1, 0); row < last; ++row) {
        const int64_t p = row % rows - 1;
        if (p >= 0 && p < h.out) {
          windows.put(place(row), params, (row / rows * h.out + p) * w.out, w.out, all);
        } else {
          windows.clear(place(row), w.out);
        }
      }
      const auto cells = [&](int64_t row, int k) -> T* {
        const int64_t p = row % rows - 1, i = window_start(h, p) + k;
        if (p < 0 || i < 0 || i >= h.in) return nullptr;
        return static_cast<T*>(params.output) + (row / rows * h.in + i) * w.in;
      };
      for (int64_t row = first; row < last; ++row) {
        T* const dx[2] = {cells(row, 0), cells(row, 1)};
        gather_windows<T, kSize, kPad>(windows.dy + place(row), windows.taps + place(row), pitch, w.in, dx);
      }
    }
  });
}

template <class T, int kSize, int kPad>
void gather_rows(const MaxPool2dParams& params) {
  if (params.w.in <= kLanes<T>) return gather_short_rows<T, kSize, kPad, 1>(params);
  if (params.w.in + kPad <= 2 * kLanes<T>) return gather_short_rows<T, kSize, kPad, 2>(params);
  gather_long_rows<T, kSize, kPad>(params);
}

template <class T>
bool gather_strided(const MaxPool2dParams& params) {
  const PoolAxis &h = params.h, &w = params.w;
  if (h.stride != 2 || w.stride != 2 || h.dilation != 1 || w.dilation != 1 || h.kernel != w.kernel) {
    return false;
  }
  if (w.kernel == 3) {
    w.pad ? gather_rows<T, 3, 1>(params) : gather_rows<T, 3, 0>(params);
  } else if (w.kernel == 2) {
    w.pad ? gather_rows<T, 2, 1>(params) : gather_rows<T, 2, 0>(params);
  } else {
    return false;
  }
  return true;
}

}  // namespace

template <class T>
bool max_pool2d_backward_nchw(const MaxPool2dParams& params) {
  const PoolAxis &h = params.h, &w = params.w;
  // A gathered vector looks at each tap, a scattered window only at one.
  if (h.kernel * w.kernel > 2 * kLanes<T>) return false;
  if (h.stride == 1 && w.stride == 1 && h.in == h.out && w.in == w.out) {
    gather_array<T>(params);
    return true;
  }
  // With short vectors a scattered window takes the time of some four cells gathered in long rows.
  const bool long_rows = w.in > 2 * kLanes<T>;
  const bool windows = long_rows && kLanes<T> <= 8 && 17 * h.out * w.out < 4 * h.in * w.in;
  return !windows && gather_strided<T>(params);
}

template bool max_pool2d_backward_nchw<float>(const MaxPool2dParams&);
template bool max_pool2d_backward_nchw<double>(const MaxPool2dParams&);
template bool max_pool2d_backward_nchw<BFloat16>(const MaxPool2dParams&);
template bool max_pool2d_backward_nchw<Half>(const MaxPool2dParams&);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
