// The gradient of max-pooling, and its transpose for second derivatives.
//
// NHWC with a vector of channels or more: input rows over threads; a cell *gathers* dy from each window that
// holds it and whose tap names it, kBlocks vectors of channels at a time.
//
// NCHW with small windows gathers, too, with vectors along rows: max_pool2d_backward_nchw.cpp.
//
// Else: a plane (NHWC: an image) belongs to one thread, which *scatters* dy to the cells that the taps name.
//
// All add in window order and need no atomics: the same bits for any number of threads.
#include "cpu/max_pool2d_gather.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// A window along one axis that holds a given cell, as its tap `tap`.
struct Holder {
  int64_t window;
  int64_t tap;
};

// The holders of cell `in`, in window order; returns how many.
CUDA_CNN_INLINE int64_t holders_of(const PoolAxis& axis, int64_t in, Holder* out) {
  int64_t count = 0;
  for (int64_t p = first_window(axis, in); p < end_window(axis, in); ++p) {
    const int64_t tap = tap_of(axis, in, p);
    if (tap >= 0) out[count++] = {p, tap};
  }
  return count;
}

template <class T, class Tap>
void gather_nhwc(const MaxPool2dParams& params) {
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t channels = params.channels, image = h.out * w.out * channels;
  // Holders of every column, once for all rows.
  Holder* columns = workspace<Holder>(Workspace::kShared, w.out * w.kernel + w.in + 1);
  int64_t* starts = reinterpret_cast<int64_t*>(columns + w.out * w.kernel);
  starts[0] = 0;
  for (int64_t j = 0; j < w.in; ++j) starts[j + 1] = starts[j] + holders_of(w, j, columns + starts[j]);

  parallel_for(params.batch * h.in, grain_of(w.in * channels), [&](int64_t begin, int64_t end) {
    Holder* rows = workspace<Holder>(Workspace::kA, h.kernel);
    Term* terms = workspace<Term>(Workspace::kB, h.kernel * w.kernel);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t row_count = holders_of(h, row % h.in, rows);
      const T* dy = static_cast<const T*>(params.input) + row / h.in * image;
      const Tap* taps = static_cast<const Tap*>(params.taps) + row / h.in * image;
      T* dx = static_cast<T*>(params.output) + row * w.in * channels;
      for (int64_t j = 0; j < w.in; ++j, dx += channels) {
        int64_t count = 0;
        for (int64_t k = 0; k < row_count; ++k) {
          for (const Holder* column = columns + starts[j]; column < columns + starts[j + 1]; ++column) {
            terms[count++] = {(rows[k].window * w.out + column->window) * channels,
                              rows[k].tap * w.kernel + column->tap};
          }
        }
        gather_cells(terms, count, channels, dy, taps, dx);
      }
    }
  });
}

// Windows whose cells all lie inside the plane, along one axis: [begin, end).
struct Inside {
  int64_t begin, end;

  explicit Inside(const PoolAxis& a) {
    const int64_t last_start = a.in - 1 - (a.kernel - 1) * a.dilation;
    begin = min64(a.out, ceil_div(a.pad, a.stride));
    end = last_start + a.pad < 0 ? begin : max64(begin, min64(a.out, (last_start + a.pad) / a.stride + 1));
  }
};

// A window's cell, from the window's corner.
struct Cell {
  int64_t row, column;
  int64_t offset;
};

// A tap that names no cell of a window counts as 0: whatever the taps hold, memory is safe.
CUDA_CNN_INLINE int64_t valid(uint8_t tap, int64_t) { return tap; }  // the table has 256 entries
CUDA_CNN_INLINE int64_t valid(int32_t tap, int64_t cells) { return tap >= 0 && tap < cells ? tap : 0; }

// The windows [q, end) of output row p; pointers at the first one's channels and at the plane.
template <class T, class Tap>
struct Windows {
  const PoolAxis &h, &w;
  int64_t channels;
  const Cell* cells;  // by tap
  const T* dy;
  const Tap* taps;
  Accumulator<T>* dx;

  // All cells inside the plane.
  CUDA_CNN_INLINE void add_inside(int64_t p, int64_t q, int64_t end) const {
    const int64_t known = h.kernel * w.kernel, step = w.stride * channels, at = (p * w.out + q) * channels;
    const T* g = dy + at;
    const Tap* tap = taps + at;
    Accumulator<T>* corner = dx + (window_start(h, p) * w.in + window_start(w, q)) * channels;
    if (channels == 1) {
      for (int64_t k = 0; k < end - q; ++k)
        corner[k * step + cells[valid(tap[k], known)].offset] += widen(g[k]);
      return;
    }
    for (; q < end; ++q, g += channels, tap += channels, corner += step) {
      for (int64_t c = 0; c < channels; ++c) corner[cells[valid(tap[c], known)].offset + c] += widen(g[c]);
    }
  }

  // Windows that reach into the padding. A tap outside the plane adds nothing.
  CUDA_CNN_INLINE void add_at_edge(int64_t p, int64_t q, int64_t end) const {
    const int64_t known = h.kernel * w.kernel, top = window_start(h, p);
    for (int64_t at = (p * w.out + q) * channels; q < end; ++q) {
      const int64_t left = window_start(w, q), corner = (top * w.in + left) * channels;
      for (int64_t c = 0; c < channels; ++c, ++at) {
        const Cell& cell = cells[valid(taps[at], known)];
        const int64_t i = top + cell.row, j = left + cell.column;
        if (i >= 0 && i < h.in && j >= 0 && j < w.in) dx[corner + cell.offset + c] += widen(dy[at]);
      }
    }
  }
};

template <class T, class Tap>
void scatter(const MaxPool2dParams& params) {
  using A = Accumulator<T>;
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t channels = params.channels_last ? params.channels : 1;
  const int64_t planes = params.batch * params.channels / channels;
  const int64_t size = h.in * w.in * channels, windows = h.out * w.out * channels;
  const int64_t known = h.kernel * w.kernel;
  Cell* cells = workspace<Cell>(Workspace::kShared, max64(known, 256));
  for (int64_t tap = 0; tap < max64(known, 256); ++tap) {
    const int64_t row = tap < known ? tap / w.kernel * h.dilation : 0;
    const int64_t column = tap < known ? tap % w.kernel * w.dilation : 0;
    cells[tap] = {row, column, (row * w.in + column) * channels};
  }
  const Inside rows(h), columns(w);
  parallel_for(planes, grain_of(size), [&](int64_t begin, int64_t end) {
    constexpr bool kDirect = sizeof(T) == sizeof(A);
    for (int64_t plane = begin; plane < end; ++plane) {
      T* dx = static_cast<T*>(params.output) + plane * size;
      A* sums;
      if constexpr (kDirect) {
        sums = dx;
      } else {
        sums = workspace<A>(Workspace::kA, size);
      }
      memset(sums, 0, size * sizeof(A));
      const Windows<T, Tap> here = {h,
                                    w,
                                    channels,
                                    cells,
                                    static_cast<const T*>(params.input) + plane * windows,
                                    static_cast<const Tap*>(params.taps) + plane * windows,
                                    sums};
      for (int64_t p = 0; p < h.out; ++p) {
        const bool inside = p >= rows.begin && p < rows.end;
        const int64_t first = inside ? columns.begin : w.out, last = inside ? columns.end : w.out;
        here.add_at_edge(p, 0, first);
        here.add_inside(p, first, last);
        here.add_at_edge(p, last, w.out);
      }
      for (int64_t k = 0; !kDirect && k < size; ++k) dx[k] = narrow<T>(sums[k]);
    }
  });
}

// Element by element, either layout.
template <class T, class Tap>
void pick(const MaxPool2dParams& params) {
  const PoolAxis &h = params.h, &w = params.w;
  const int64_t channels = params.channels_last ? params.channels : 1;
  const int64_t planes = params.batch * params.channels / channels;
  const Tap* taps = static_cast<const Tap*>(params.taps);
  T* output = static_cast<T*>(params.output);
  parallel_for(planes * h.out, grain_of(w.out * channels), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* plane = static_cast<const T*>(params.input) + row / h.out * h.in * w.in * channels;
      for (int64_t k = 0; k < w.out * channels; ++k) {
        const int64_t q = k / channels, c = k % channels, at = row * w.out * channels + k;
        const int64_t tap = taps[at];
        const int64_t i = window_start(h, row % h.out) + tap / w.kernel * h.dilation;
        const int64_t j = window_start(w, q) + tap % w.kernel * w.dilation;
        output[at] = i >= 0 && i < h.in && j >= 0 && j < w.in ? plane[(i * w.in + j) * channels + c] : T{};
      }
    }
  });
}

}  // namespace

void max_pool2d_backward(const MaxPool2dParams& params) {
  dispatch_pool(params, [&](auto element, auto tap) {
    using T = decltype(element);
    using Tap = decltype(tap);
    if (params.channels_last) {
      return params.channels >= kLanes<T> ? gather_nhwc<T, Tap>(params) : scatter<T, Tap>(params);
    }
    if constexpr (sizeof(Tap) == 1) {
      if (max_pool2d_backward_nchw<T>(params)) return;
    }
    return scatter<T, Tap>(params);
  });
}

void max_pool2d_gather(const MaxPool2dParams& params) {
  dispatch_pool(params, [&](auto element, auto tap) { pick<decltype(element), decltype(tap)>(params); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
