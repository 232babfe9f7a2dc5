// LeNet-5's sub-sampling on the CPU; formulas: kernels/subsample.h.
//
// NHWC: vectors along the channels; a task is a band of output rows of one image. NCHW: a band of one plane.
// What is to be squashed goes to scratch first: the squashing function, the dear part, runs over full vectors
// whatever the number of channels or the row's length. The backward pass sums each band's da and da · Σ
// window into its own slot of `partial`; the slots are added in index order.
#include "kernels/subsample.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kElementsPerTask = 8192;

template <class A>
CUDA_CNN_INLINE Vec<A> squash_lanes(Vec<A> a, Squash kind) {
  A lanes[kLanes<A>];
  store(lanes, a);
  if (kind == Squash::kTanh) {
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = squash(lanes[i], Squash::kTanh);
  } else if (kind == Squash::kSigmoid) {
    for (int i = 0; i < kLanes<A>; ++i) lanes[i] = squash(lanes[i], Squash::kSigmoid);
  }
  return load(lanes);
}

template <class A>
CUDA_CNN_INLINE Vec<A> slope_lanes(Vec<A> y, Squash kind) {
  constexpr A kAmplitude = A(kSquashAmplitude);
  if (kind == Squash::kTanh) return A(kSquashSlope) * (kAmplitude - y * y * A(1 / kSquashAmplitude));
  if (kind == Squash::kSigmoid) return y * (A(1) - y);
  return Vec<A>{} + A(1);
}

template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_lanes(const T* p, int64_t lanes) {
  return lanes == kLanes<T> ? load(p) : load_first(p, lanes);
}
template <class T>
CUDA_CNN_INLINE void store_lanes(T* p, Vec<Accumulator<T>> v, int64_t lanes) {
  if (lanes == kLanes<T>) {
    store(p, v);
  } else {
    store_first(p, v, lanes);
  }
}

// Calls fn(offset, lanes) for each vector of a run.
template <class T, class Fn>
CUDA_CNN_INLINE void for_each_vector(int64_t count, const Fn& fn) {
  int64_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) fn(i, int64_t{kLanes<T>});
  if (i < count) fn(i, count - i);
}

// A band: output rows [first, first + rows) of image n (NHWC) or of plane n (NCHW).
struct Band {
  int64_t n, first, rows, index;
};

// Calls fn(band) over all bands of `images` images, in parallel.
template <class Fn>
CUDA_CNN_INLINE void for_each_band(const SubsampleParams& p, int64_t images, int64_t row_elements,
                                   const Fn& fn) {
  const int64_t bands = ceil_div(p.out_height, kSubsampleBand);
  const int64_t grain = ceil_div(kElementsPerTask, row_elements * min64(kSubsampleBand, p.out_height));
  parallel_for(images * bands, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % bands * kSubsampleBand;
      fn(Band{i / bands, first, min64(kSubsampleBand, p.out_height - first), i});
    }
  });
}

template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> window_sum(const SubsampleParams& p, const T* cell, int64_t lanes) {
  Vec<Accumulator<T>> total = {};
  for (int64_t r = 0; r < p.kernel_h; ++r) {
    for (int64_t s = 0; s < p.kernel_w; ++s)
      total += load_lanes(cell + (r * p.width + s) * p.channels, lanes);
  }
  return total;
}

// coefficient and bias, each `padded` long.
template <class T>
CUDA_CNN_INLINE const Accumulator<T>* channel_vectors(const SubsampleParams& p, int64_t padded) {
  auto* values = workspace<Accumulator<T>>(Workspace::kB, 2 * padded);
  for (int64_t c = 0; c < padded; ++c) {
    const bool inside = c < p.channels;
    values[c] = inside ? widen(static_cast<const T*>(p.coefficient)[c]) : 0;
    values[padded + c] = inside ? widen(static_cast<const T*>(p.bias)[c]) : 0;
  }
  return values;
}

template <class T>
void forward_nhwc(const SubsampleParams& p) {
  using A = Accumulator<T>;
  const T* x = static_cast<const T*>(p.x);
  const T* end = x + p.batch * p.height * p.width * p.channels;
  const int64_t padded = p.channels + kLanes<T>;
  const int64_t last_cell = ((p.kernel_h - 1) * p.width + p.kernel_w - 1) * p.channels;
  for_each_band(p, p.batch, p.out_width * p.channels, [&](const Band& band) {
    const int64_t count = band.rows * p.out_width * p.channels;
    const A* coefficient = channel_vectors<T>(p, padded);
    A* linear = workspace<A>(Workspace::kA, count + kLanes<T>);
    for (int64_t k = 0; k < band.rows * p.out_width; ++k) {
      const int64_t row = band.first + k / p.out_width, q = k % p.out_width;
      const T* cell = x + ((band.n * p.height + row * p.kernel_h) * p.width + q * p.kernel_w) * p.channels;
      // Whole vectors: lanes beyond the last channel are overwritten by the next pixel's.
      for (int64_t c = 0; c < p.channels; c += kLanes<T>) {
        const int64_t lanes = min64(kLanes<T>, end - (cell + last_cell + c));
        const Vec<A> sums = window_sum(p, cell + c, lanes);
        store(linear + k * p.channels + c, fma(load(coefficient + c), sums, load(coefficient + padded + c)));
      }
    }
    T* y = static_cast<T*>(p.y) + (band.n * p.out_height + band.first) * p.out_width * p.channels;
    for_each_vector<T>(count, [&](int64_t t, int64_t lanes) {
      store_lanes(y + t, squash_lanes<A>(load_lanes(linear + t, lanes), p.squash), lanes);
    });
  });
}

template <class T>
void backward_nhwc(const SubsampleParams& p) {
  using A = Accumulator<T>;
  const T* coefficient = static_cast<const T*>(p.coefficient);
  for_each_band(p, p.batch, p.out_width * p.channels, [&](const Band& band) {
    A* sums = static_cast<A*>(p.partial) + band.index * 2 * p.channels;
    for (int64_t c = 0; c < 2 * p.channels; ++c) sums[c] = 0;
    for (int64_t k = 0; k < band.rows * p.out_width; ++k) {
      const int64_t row = band.first + k / p.out_width, q = k % p.out_width;
      const int64_t in = ((band.n * p.height + row * p.kernel_h) * p.width + q * p.kernel_w) * p.channels;
      const int64_t out = ((band.n * p.out_height + row) * p.out_width + q) * p.channels;
      for_each_vector<T>(p.channels, [&](int64_t c, int64_t lanes) {
        const Vec<A> y = load_lanes(static_cast<const T*>(p.y) + out + c, lanes);
        const Vec<A> da =
            load_lanes(static_cast<const T*>(p.dy) + out + c, lanes) * slope_lanes<A>(y, p.squash);
        const Vec<A> window = window_sum(p, static_cast<const T*>(p.x) + in + c, lanes);
        store_lanes(sums + c, fma(da, window, load_lanes(sums + c, lanes)), lanes);
        store_lanes(sums + p.channels + c, da + load_lanes(sums + p.channels + c, lanes), lanes);
        const Vec<A> dx = load_lanes(coefficient + c, lanes) * da;
        for (int64_t cell = 0; cell < p.kernel_h * p.kernel_w; ++cell) {
          const int64_t offset = (cell / p.kernel_w * p.width + cell % p.kernel_w) * p.channels;
          store_lanes(static_cast<T*>(p.dx) + in + offset + c, dx, lanes);
        }
      });
    }
  });
}

// sums[q] += Σ_s row[q · kernel_w + s]
template <class T>
CUDA_CNN_INLINE void add_row(const T* row, int64_t kernel_w, int64_t count, Accumulator<T>* sums) {
  if (kernel_w == 2) {
    for (int64_t q = 0; q < count; ++q) sums[q] += widen(row[2 * q]) + widen(row[2 * q + 1]);
    return;
  }
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t s = 0; s < kernel_w; ++s) sums[q] += widen(row[q * kernel_w + s]);
  }
}

// Window sums of a band of one plane.
template <class T>
CUDA_CNN_INLINE void band_sums(const SubsampleParams& p, const Band& band, Accumulator<T>* sums) {
  const T* plane = static_cast<const T*>(p.x) + band.n * p.height * p.width;
  for (int64_t t = 0; t < band.rows * p.out_width; ++t) sums[t] = 0;
  for (int64_t i = 0; i < band.rows * p.kernel_h; ++i) {
    const T* row = plane + (band.first * p.kernel_h + i) * p.width;
    add_row(row, p.kernel_w, p.out_width, sums + i / p.kernel_h * p.out_width);
  }
}

template <class T>
void forward_nchw(const SubsampleParams& p) {
  using A = Accumulator<T>;
  for_each_band(p, p.batch * p.channels, p.out_width, [&](const Band& band) {
    const int64_t count = band.rows * p.out_width, c = band.n % p.channels;
    A* sums = workspace<A>(Workspace::kA, count);
    band_sums<T>(p, band, sums);
    const Vec<A> coefficient = broadcast(widen(static_cast<const T*>(p.coefficient)[c]));
    const Vec<A> bias = broadcast(widen(static_cast<const T*>(p.bias)[c]));
    T* y = static_cast<T*>(p.y) + (band.n * p.out_height + band.first) * p.out_width;
    for_each_vector<T>(count, [&](int64_t t, int64_t lanes) {
      const Vec<A> a = fma(coefficient, load_lanes(sums + t, lanes), bias);
      store_lanes(y + t, squash_lanes<A>(a, p.squash), lanes);
    });
  });
}

// dx of the cells above one row of windows: every cell has its window's value.
template <class T>
CUDA_CNN_INLINE void spread_row(const Accumulator<T>* values, int64_t kernel_w, int64_t count, T* dx) {
  if (kernel_w == 2) {
    for (int64_t q = 0; q < count; ++q) dx[2 * q] = dx[2 * q + 1] = narrow<T>(values[q]);
    return;
  }
  for (int64_t q = 0; q < count; ++q) {
    for (int64_t s = 0; s < kernel_w; ++s) dx[q * kernel_w + s] = narrow<T>(values[q]);
  }
}

template <class T>
void backward_nchw(const SubsampleParams& p) {
  using A = Accumulator<T>;
  const int64_t bands = ceil_div(p.out_height, kSubsampleBand);
  for_each_band(p, p.batch * p.channels, p.out_width, [&](const Band& band) {
    const int64_t count = band.rows * p.out_width, c = band.n % p.channels;
    A* sums = workspace<A>(Workspace::kA, count);
    A* values = workspace<A>(Workspace::kB, count);
    band_sums<T>(p, band, sums);
    const int64_t out = (band.n * p.out_height + band.first) * p.out_width;
    const A coefficient = widen(static_cast<const T*>(p.coefficient)[c]);
    Vec<A> weighted = {}, plain = {};
    for_each_vector<T>(count, [&](int64_t t, int64_t lanes) {
      const Vec<A> y = load_lanes(static_cast<const T*>(p.y) + out + t, lanes);
      const Vec<A> da =
          load_lanes(static_cast<const T*>(p.dy) + out + t, lanes) * slope_lanes<A>(y, p.squash);
      weighted = fma(da, load_lanes(sums + t, lanes), weighted);
      plain += da;
      store_lanes(values + t, coefficient * da, lanes);
    });
    A* partial =
        static_cast<A*>(p.partial) + (band.n / p.channels * bands + band.index % bands) * 2 * p.channels;
    partial[c] = sum(weighted);
    partial[p.channels + c] = sum(plain);
    T* plane = static_cast<T*>(p.dx) + band.n * p.height * p.width;
    for (int64_t i = 0; i < band.rows * p.kernel_h; ++i) {
      spread_row<T>(values + i / p.kernel_h * p.out_width, p.kernel_w, p.out_width,
                    plane + (band.first * p.kernel_h + i) * p.width);
    }
  });
}

// Cells beyond the last whole window: rows below, columns to the right.
template <class T>
void zero_margin(const SubsampleParams& p) {
  const int64_t rows = p.out_height * p.kernel_h, columns = p.out_width * p.kernel_w;
  if (rows == p.height && columns == p.width) return;
  const int64_t images = p.channels_last ? p.batch : p.batch * p.channels;
  const int64_t step = p.channels_last ? p.channels : 1;
  T* dx = static_cast<T*>(p.dx);
  parallel_for(images * p.height, ceil_div(kElementsPerTask, p.width * step),
               [&](int64_t begin, int64_t end) {
                 for (int64_t row = begin; row < end; ++row) {
                   const int64_t covered = row % p.height < rows ? columns : 0;
                   memset(dx + (row * p.width + covered) * step, 0, (p.width - covered) * step * sizeof(T));
                 }
               });
}

template <class T>
void sum_bands(const SubsampleParams& p) {
  const auto* partial = static_cast<const Accumulator<T>*>(p.partial);
  const int64_t bands = subsample_bands(p.batch, p.out_height);
  for (int64_t c = 0; c < p.channels; ++c) {
    double weighted = 0, plain = 0;
    for (int64_t b = 0; b < bands; ++b) {
      weighted += partial[b * 2 * p.channels + c];
      plain += partial[(b * 2 + 1) * p.channels + c];
    }
    static_cast<T*>(p.dcoefficient)[c] = narrow<T>(static_cast<Accumulator<T>>(weighted));
    static_cast<T*>(p.dbias)[c] = narrow<T>(static_cast<Accumulator<T>>(plain));
  }
}

}  // namespace

void subsample(const SubsampleParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    return p.channels_last ? forward_nhwc<T>(p) : forward_nchw<T>(p);
  });
}

void subsample_backward(const SubsampleParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    zero_margin<T>(p);
    p.channels_last ? backward_nhwc<T>(p) : backward_nchw<T>(p);
    sum_bands<T>(p);
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
