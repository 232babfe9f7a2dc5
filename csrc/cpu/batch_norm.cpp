// Batch normalisation on the CPU: two passes over memory each way, one to reduce and one to apply.
//
// A channel's elements are cut into at most kGroups groups, whatever the number of threads, and a group into
// chunks that stay in L1. A chunk is summed in the accumulation type (its mean first, then the deviations
// from that mean, Σd and Σd²); chunks and groups are joined in index order in double. So nothing is lost
// where the mean is large beside the deviation, and the bits do not depend on the threads.
//
//   channels_last  a group is a run of rows; registers hold kWide vectors of channels
//   contiguous     a group is a run of images; a channel's planes are summed lane by lane
#include "kernels/batch_norm.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kGroups = 64;
constexpr int64_t kRows = 64;   // channels_last: rows of a chunk
constexpr int64_t kRun = 4096;  // contiguous: elements of a chunk
constexpr int kWide = 4;        // vectors side by side
constexpr int64_t kElementsPerTask = 32768;

template <class A>
constexpr int64_t kTile = kWide * kLanes<A>;

template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_lanes(const T* p, int64_t lanes) {
  return lanes >= kLanes<T> ? load(p) : load_first(p, lanes);
}
template <class T>
CUDA_CNN_INLINE void store_lanes(T* p, Vec<Accumulator<T>> v, int64_t lanes) {
  if (lanes >= kLanes<T>) {
    store(p, v);
  } else {
    store_first(p, v, lanes);
  }
}

// The first `count` lanes; 0 in the others.
template <class A>
CUDA_CNN_INLINE Vec<A> keep_first(Vec<A> v, int64_t count) {
  Vec<A> index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
  return index < broadcast(A(count)) ? v : Vec<A>{};
}

// ---- Per-channel values
// ------------------------------------------------------------------------------------

template <class A>
struct MapLanes {
  Vec<A> mean, scale, shift;
  CUDA_CNN_INLINE Vec<A> operator()(Vec<A> x) const { return fma(x - mean, scale, shift); }
};
template <class A>
struct GradientLanes {
  Vec<A> scale, slope, offset;
};

// One array for each coefficient; padded, so that whole vectors can be read.
template <class A>
struct Coefficients {
  static constexpr int kArrays = 6;
  A* base;
  int64_t pitch;

  CUDA_CNN_INLINE A* array(int i) const { return base + i * pitch; }
  CUDA_CNN_INLINE MapLanes<A> map(int64_t c) const {
    return {load(array(0) + c), load(array(1) + c), load(array(2) + c)};
  }
  CUDA_CNN_INLINE GradientLanes<A> gradient(int64_t c) const {
    return {load(array(3) + c), load(array(4) + c), load(array(5) + c)};
  }
  // The same channel in every lane.
  CUDA_CNN_INLINE MapLanes<A> map_of(int64_t c) const {
    return {broadcast(array(0)[c]), broadcast(array(1)[c]), broadcast(array(2)[c])};
  }
  CUDA_CNN_INLINE GradientLanes<A> gradient_of(int64_t c) const {
    return {broadcast(array(3)[c]), broadcast(array(4)[c]), broadcast(array(5)[c])};
  }
  CUDA_CNN_INLINE void set(int64_t c, const BatchNormMap<A>& m) const {
    array(0)[c] = m.mean;
    array(1)[c] = m.scale;
    array(2)[c] = m.shift;
  }
  CUDA_CNN_INLINE void set(int64_t c, const BatchNormGradient<A>& g) const {
    array(3)[c] = g.scale;
    array(4)[c] = g.slope;
    array(5)[c] = g.offset;
  }
};

template <class A>
Coefficients<A> allocate_coefficients(int64_t channels) {
  const int64_t pitch = ceil_div(channels, kTile<A>) * kTile<A>;
  return {workspace<A>(Workspace::kShared, Coefficients<A>::kArrays * pitch), pitch};
}

// ---- How a tensor is cut
// -------------------------------------------------------------------------------------

// Groups of the rows (channels_last) or images (contiguous), which this struct calls items.
struct Cut {
  int64_t items, step, groups;
  int64_t per_item;  // elements of a channel

  explicit Cut(const BatchNormShape& s) {
    items = s.channels_last ? s.batch * s.spatial : s.batch;
    per_item = s.channels_last ? 1 : s.spatial;
    const int64_t unit = s.channels_last ? kRows : 1;
    step = ceil_div(ceil_div(items, unit), kGroups) * unit;
    groups = ceil_div(items, step);
  }
  int64_t begin(int64_t group) const { return group * step; }
  int64_t end(int64_t group) const { return min64(items, (group + 1) * step); }
  int64_t count(int64_t group) const { return (end(group) - begin(group)) * per_item; }
};

// Calls fn(group, first channel, channels) for every group and block of channels.
template <class A, class Fn>
void for_each_part(const BatchNormShape& s, const Cut& cut, const Fn& fn) {
  const int64_t width = s.channels_last ? kTile<A> : 1, blocks = ceil_div(s.channels, width);
  const int64_t elements = cut.step * cut.per_item * min64(width, s.channels);
  parallel_for(cut.groups * blocks, ceil_div(kElementsPerTask, elements), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * width;
      fn(i / blocks, first, min64(width, s.channels - first));
    }
  });
}

// contiguous: calls fn(first element, runs, length) for the chunks of a channel in a group of images; a
// chunk's runs lie an image apart.
template <class Fn>
CUDA_CNN_INLINE void for_each_chunk(const BatchNormShape& s, const Cut& cut, int64_t group, int64_t channel,
                                    const Fn& fn) {
  const int64_t images = max64(1, kRun / s.spatial);
  for (int64_t n = cut.begin(group); n < cut.end(group); n += images) {
    const int64_t plane = (n * s.channels + channel) * s.spatial;
    for (int64_t i = 0; i < s.spatial; i += kRun) {
      fn(plane + i, min64(images, cut.end(group) - n), min64(kRun, s.spatial - i));
    }
  }
}

template <int V>
struct Vectors {
  static constexpr int value = V;
};

// channels_last: calls fn(Vectors<V>, first channel, lanes) for a block of channels: all of kWide vectors at
// once, or one after the other.
template <class A, class Fn>
CUDA_CNN_INLINE void for_each_block(int64_t width, const Fn& fn) {
  if (width == kTile<A>) return fn(Vectors<kWide>{}, int64_t{0}, int64_t{kLanes<A>});
  for (int64_t i = 0; i < width; i += kLanes<A>) fn(Vectors<1>{}, i, min64(kLanes<A>, width - i));
}

// Calls fn(i, slot, lanes) for the vectors of a run; neighbouring vectors have different slots below kWide.
template <class A, class Fn>
CUDA_CNN_INLINE void for_each_vector(int64_t length, const Fn& fn) {
  int64_t i = 0;
  for (; i + kTile<A> <= length; i += kTile<A>) {
#pragma GCC unroll 4
    for (int v = 0; v < kWide; ++v) fn(i + v * kLanes<A>, v, int64_t{kLanes<A>});
  }
  for (; i + kLanes<A> <= length; i += kLanes<A>) fn(i, 0, int64_t{kLanes<A>});
  if (i < length) fn(i, 1, length - i);
}

template <class A>
CUDA_CNN_INLINE A total(const Vec<A> (&v)[kWide]) {
  return sum((v[0] + v[1]) + (v[2] + v[3]));
}

// ---- Mean and variance
// ---------------------------------------------------------------------------------------

// A chunk's moments: Σ(x − pivot), Σ(x − pivot)², where pivot is its mean, rounded.
template <class A>
struct Moments {
  A pivot[kTile<A>], deviation[kTile<A>], squares[kTile<A>];
};

// Joins two parts' (mean, Σ(x − mean)²), of n and m elements. Chan, Golub, LeVeque 1979.
CUDA_CNN_INLINE void join(double& mean, double& squares, double n, double other_mean, double other_squares,
                          double m) {
  const double difference = other_mean - mean;
  mean = mean * (n / (n + m)) + other_mean * (m / (n + m));
  squares += other_squares + difference * difference * (n * m / (n + m));
}

// V vectors of channels over `rows` rows.
template <int V, class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void row_moments(const T* x, int64_t rows, int64_t pitch, int64_t lanes, int64_t at,
                                 Moments<A>& chunk) {
  Vec<A> pivot[V] = {}, deviation[V] = {}, squares[V] = {};
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) pivot[v] += load_lanes(x + r * pitch + v * kLanes<A>, lanes);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) pivot[v] /= broadcast(A(rows));
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec<A> d = load_lanes(x + r * pitch + v * kLanes<A>, lanes) - pivot[v];
      deviation[v] += d;
      squares[v] = fma(d, d, squares[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    store(chunk.pivot + at + v * kLanes<A>, pivot[v]);
    store(chunk.deviation + at + v * kLanes<A>, deviation[v]);
    store(chunk.squares + at + v * kLanes<A>, squares[v]);
  }
}

// One channel over `runs` runs.
template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void plane_moments(const T* x, int64_t runs, int64_t pitch, int64_t length,
                                   Moments<A>& chunk) {
  Vec<A> sums[kWide] = {}, deviation[kWide] = {}, squares[kWide] = {};
  for (int64_t r = 0; r < runs; ++r) {
    for_each_vector<A>(length, [&](int64_t i, int slot, int64_t lanes) {
      sums[slot] += load_lanes(x + r * pitch + i, lanes);
    });
  }
  const A mean = total<A>(sums) / A(runs * length);
  const Vec<A> pivot = broadcast(mean);
  for (int64_t r = 0; r < runs; ++r) {
    for_each_vector<A>(length, [&](int64_t i, int slot, int64_t lanes) {
      Vec<A> d = load_lanes(x + r * pitch + i, lanes) - pivot;
      if (lanes < kLanes<A>) d = keep_first<A>(d, lanes);
      deviation[slot] += d;
      squares[slot] = fma(d, d, squares[slot]);
    });
  }
  chunk.pivot[0] = mean;
  chunk.deviation[0] = total<A>(deviation);
  chunk.squares[0] = total<A>(squares);
}

template <class T>
void batch_statistics(const BatchNormParams& p) {
  using A = Accumulator<T>;
  const T* x = static_cast<const T*>(p.x);
  const BatchNormShape& s = p.shape;
  const Cut cut(s);
  double* means = workspace<double>(Workspace::kA, 2 * cut.groups * s.channels);
  double* squares = means + cut.groups * s.channels;
  for_each_part<A>(s, cut, [&](int64_t group, int64_t first, int64_t width) {
    double *mean = means + group * s.channels + first, *square = squares + group * s.channels + first;
    for (int64_t i = 0; i < width; ++i) mean[i] = square[i] = 0;
    double seen = 0;
    Moments<A> chunk;
    const auto join_next = [&](double count) {
      for (int64_t i = 0; i < width; ++i) {
        const double shift = chunk.deviation[i] / count;
        join(mean[i], square[i], seen, chunk.pivot[i] + shift, chunk.squares[i] - shift * chunk.deviation[i],
             count);
      }
      seen += count;
    };
    if (s.channels_last) {
      for (int64_t row = cut.begin(group); row < cut.end(group); row += kRows) {
        const int64_t rows = min64(kRows, cut.end(group) - row);
        for_each_block<A>(width, [&](auto vectors, int64_t at, int64_t lanes) {
          row_moments<vectors.value>(x + row * s.channels + first + at, rows, s.channels, lanes, at, chunk);
        });
        join_next(rows);
      }
    } else {
      for_each_chunk(s, cut, group, first, [&](int64_t start, int64_t runs, int64_t length) {
        plane_moments(x + start, runs, s.channels * s.spatial, length, chunk);
        join_next(runs * length);
      });
    }
  });
  parallel_for(s.channels, ceil_div(kElementsPerTask, 8 * cut.groups), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double mean = 0, square = 0;
      for (int64_t g = 0; g < cut.groups; ++g) {
        join(mean, square, cut.begin(g) * cut.per_item, means[g * s.channels + c],
             squares[g * s.channels + c], cut.count(g));
      }
      p.mean[c] = mean;
      p.var[c] = square / s.per_channel();
    }
  });
}

// ---- y
// -------------------------------------------------------------------------------------------------------

template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void apply(const BatchNormParams& p, int64_t i, int64_t lanes, const MapLanes<A>& map) {
  Vec<A> v = map(load_lanes(static_cast<const T*>(p.x) + i, lanes));
  if (p.residual) v += load_lanes(static_cast<const T*>(p.residual) + i, lanes);
  store_lanes(static_cast<T*>(p.y) + i, p.relu ? relu(v) : v, lanes);
}

// Calls fn(element, lanes, channel) for every vector; the last element that the reducing pass has seen comes
// first, as it is still in the cache.
template <class A, class RowFn, class PlaneFn>
CUDA_CNN_INLINE void for_all(const BatchNormShape& s, const RowFn& row, const PlaneFn& plane) {
  if (s.channels_last) {
    parallel_for(s.per_channel(), ceil_div(kElementsPerTask, s.channels), [&](int64_t begin, int64_t end) {
      for (int64_t r = end - 1; r >= begin; --r) row(r * s.channels);
    });
  } else {
    parallel_for(s.batch * s.channels, ceil_div(kElementsPerTask, s.spatial),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t i = end - 1; i >= begin; --i) plane(i * s.spatial, i % s.channels);
                 });
  }
}

template <class T>
void forward(const BatchNormParams& p) {
  using A = Accumulator<T>;
  if (p.training) batch_statistics<T>(p);
  const BatchNormShape& s = p.shape;
  const Coefficients<A> coefficients = allocate_coefficients<A>(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) {
    const double mean = p.training ? p.mean[c] : p.running_mean.at(c, 0);
    const double var = p.training ? p.var[c] : p.running_var.at(c, 1);
    coefficients.set(c, batch_norm_map<A>(mean, var, p.weight.at(c, 1), p.bias.at(c, 0), p.eps));
  }
  for_all<A>(
      s,
      [&](int64_t start) {
        for_each_vector<A>(s.channels, [&](int64_t c, int, int64_t lanes) {
          apply<T>(p, start + c, lanes, coefficients.map(c));
        });
      },
      [&](int64_t start, int64_t c) {
        const MapLanes<A> map = coefficients.map_of(c);
        for_each_vector<A>(s.spatial,
                           [&](int64_t i, int, int64_t lanes) { apply<T>(p, start + i, lanes, map); });
      });
}

// ---- Gradients
// -----------------------------------------------------------------------------------------------

// dy under the ReLU's mask: y, or where there was no residual what y was computed from, decides.
template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE Vec<A> masked(const BatchNormBackwardParams& p, int64_t i, int64_t lanes, Vec<A> x,
                              const MapLanes<A>& map) {
  const Vec<A> g = load_lanes(static_cast<const T*>(p.dy) + i, lanes);
  if (!p.relu) return g;
  const Vec<A> z = p.y ? load_lanes(static_cast<const T*>(p.y) + i, lanes) : map(x);
  return z <= 0 ? Vec<A>{} : g;
}

// A chunk's Σg and Σg·(x − mean).
template <class A>
struct GradientSums {
  A g[kTile<A>], gx[kTile<A>];
};

template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void accumulate(const BatchNormBackwardParams& p, int64_t i, int64_t lanes,
                                const MapLanes<A>& map, Vec<A>& sum_g, Vec<A>& sum_gx) {
  const Vec<A> x = load_lanes(static_cast<const T*>(p.x) + i, lanes);
  const Vec<A> g = masked<T>(p, i, lanes, x, map);
  if (p.dresidual) store_lanes(static_cast<T*>(p.dresidual) + i, g, lanes);
  sum_g += g;
  sum_gx = fma(g, x - map.mean, sum_gx);  // beyond the last lane g is 0
}

template <int V, class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void row_sums(const BatchNormBackwardParams& p, const Coefficients<A>& coefficients,
                              int64_t row, int64_t rows, int64_t channel, int64_t lanes, int64_t at,
                              GradientSums<A>& sums) {
  Vec<A> g[V] = {}, gx[V] = {};
  MapLanes<A> map[V];
  for (int v = 0; v < V; ++v) map[v] = coefficients.map(channel + v * kLanes<A>);
  for (int64_t r = row; r < row + rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      accumulate<T>(p, r * p.shape.channels + channel + v * kLanes<A>, lanes, map[v], g[v], gx[v]);
    }
  }
  for (int v = 0; v < V; ++v) {
    store(sums.g + at + v * kLanes<A>, g[v]);
    store(sums.gx + at + v * kLanes<A>, gx[v]);
  }
}

template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void plane_sums(const BatchNormBackwardParams& p, const MapLanes<A>& map, int64_t start,
                                int64_t runs, int64_t length, GradientSums<A>& sums) {
  Vec<A> g[kWide] = {}, gx[kWide] = {};
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t run = start + r * p.shape.channels * p.shape.spatial;
    for_each_vector<A>(length, [&](int64_t i, int slot, int64_t lanes) {
      accumulate<T>(p, run + i, lanes, map, g[slot], gx[slot]);
    });
  }
  sums.g[0] = total<A>(g);
  sums.gx[0] = total<A>(gx);
}

// Leaves each channel's Σg and Σg·(x − mean) in sums_g and sums_gx, and dresidual in its place.
template <class T, class A = Accumulator<T>>
void gradient_sums(const BatchNormBackwardParams& p, const Coefficients<A>& coefficients, double* sums_g,
                   double* sums_gx) {
  const BatchNormShape& s = p.shape;
  const Cut cut(s);
  double* parts_g = workspace<double>(Workspace::kA, 2 * cut.groups * s.channels);
  double* parts_gx = parts_g + cut.groups * s.channels;
  for_each_part<A>(s, cut, [&](int64_t group, int64_t first, int64_t width) {
    double *part_g = parts_g + group * s.channels + first, *part_gx = parts_gx + group * s.channels + first;
    for (int64_t i = 0; i < width; ++i) part_g[i] = part_gx[i] = 0;
    GradientSums<A> sums;
    const auto add = [&] {
      for (int64_t i = 0; i < width; ++i) {
        part_g[i] += sums.g[i];
        part_gx[i] += sums.gx[i];
      }
    };
    if (s.channels_last) {
      for (int64_t row = cut.begin(group); row < cut.end(group); row += kRows) {
        const int64_t rows = min64(kRows, cut.end(group) - row);
        for_each_block<A>(width, [&](auto vectors, int64_t at, int64_t lanes) {
          row_sums<vectors.value, T>(p, coefficients, row, rows, first + at, lanes, at, sums);
        });
        add();
      }
    } else {
      const MapLanes<A> map = coefficients.map_of(first);
      for_each_chunk(s, cut, group, first, [&](int64_t start, int64_t runs, int64_t length) {
        plane_sums<T>(p, map, start, runs, length, sums);
        add();
      });
    }
  });
  for (int64_t c = 0; c < s.channels; ++c) sums_g[c] = sums_gx[c] = 0;
  for (int64_t g = 0; g < cut.groups; ++g) {
    for (int64_t c = 0; c < s.channels; ++c) {
      sums_g[c] += parts_g[g * s.channels + c];
      sums_gx[c] += parts_gx[g * s.channels + c];
    }
  }
}

template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void apply_gradient(const BatchNormBackwardParams& p, int64_t i, int64_t lanes,
                                    const MapLanes<A>& map, const GradientLanes<A>& gradient) {
  const Vec<A> x = load_lanes(static_cast<const T*>(p.x) + i, lanes);
  const Vec<A> g = p.dresidual ? load_lanes(static_cast<const T*>(p.dresidual) + i, lanes)
                               : masked<T>(p, i, lanes, x, map);
  const Vec<A> from_statistics = p.training ? fma(gradient.slope, x - map.mean, gradient.offset) : Vec<A>{};
  store_lanes(static_cast<T*>(p.dx) + i, fma(gradient.scale, g, from_statistics), lanes);
}

template <class T>
void backward(const BatchNormBackwardParams& p) {
  using A = Accumulator<T>;
  const BatchNormShape& s = p.shape;
  const Coefficients<A> coefficients = allocate_coefficients<A>(s.channels);
  for (int64_t c = 0; c < s.channels; ++c) {
    coefficients.set(
        c, batch_norm_map<A>(p.mean.at(c, 0), p.var.at(c, 1), p.weight.at(c, 1), p.bias.at(c, 0), p.eps));
  }
  double* sums_g = workspace<double>(Workspace::kB, 2 * s.channels);
  double* sums_gx = sums_g + s.channels;
  if (p.training || p.dweight.data || p.dbias.data || p.dresidual) {
    gradient_sums<T>(p, coefficients, sums_g, sums_gx);
  } else {
    for (int64_t c = 0; c < 2 * s.channels; ++c) sums_g[c] = 0;
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    const BatchNormGradient<A> gradient =
        batch_norm_gradient<A>(sums_g[c], sums_gx[c], p.mean.at(c, 0), p.var.at(c, 1), p.weight.at(c, 1),
                               p.eps, s.per_channel(), p.training);
    coefficients.set(c, gradient);
    p.dweight.set(c, gradient.dweight);
    p.dbias.set(c, gradient.dbias);
  }
  if (!p.dx) return;
  for_all<A>(
      s,
      [&](int64_t start) {
        for_each_vector<A>(s.channels, [&](int64_t c, int, int64_t lanes) {
          apply_gradient<T>(p, start + c, lanes, coefficients.map(c), coefficients.gradient(c));
        });
      },
      [&](int64_t start, int64_t c) {
        const MapLanes<A> map = coefficients.map_of(c);
        const GradientLanes<A> gradient = coefficients.gradient_of(c);
        for_each_vector<A>(s.spatial, [&](int64_t i, int, int64_t lanes) {
          apply_gradient<T>(p, start + i, lanes, map, gradient);
        });
      });
}

}  // namespace

void batch_norm_forward(const BatchNormParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

void batch_norm_backward(const BatchNormBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
