// Batch normalisation on the CPU, backward: one pass for Σg and Σg·(x − mean), one for dx; g is dy under the
// mask. A thread makes both over some of the channels, or all threads make one after the other: the same
// bits.
#include "cpu/batch_norm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kCachedBytes = 512 << 10;  // of x, dy and dx: half of a core's second cache
// The fewest that a thread takes of channels (contiguous) or of cache lines in each row (channels_last).
constexpr int64_t kUnits = 8;
// With as many one thread takes as long as two, where cores share no cache but the last and exchange slowly
// the lines at which their work meets.
constexpr int64_t kElementsForThreads = 65536;

// What says which elements the ReLU let pass.
enum class Mask { kNone, kFromX, kFromY };

// The tensors of a pass and the coefficients, to be copied into locals: a vector's store may alias what a
// reference leads to, which would be read again for every vector.
template <class T, Mask kMask>
struct Pass {
  using A = Accumulator<T>;
  const T *x, *dy, *y;
  T *dx, *dresidual;
  bool training, streamed;
  Coefficients<A> coefficients;

  CUDA_CNN_INLINE Vec<A> masked(int64_t i, int64_t lanes, Vec<A> x_lanes, const MapLanes<A>& map) const {
    const Vec<A> g = load_lanes(dy + i, lanes);
    if constexpr (kMask == Mask::kNone) return g;
    const Vec<A> z = kMask == Mask::kFromY ? load_lanes(y + i, lanes) : map(x_lanes);
    return z <= 0 ? Vec<A>{} : g;
  }
  CUDA_CNN_INLINE void prefetch(int64_t i) const {
    __builtin_prefetch(x + i);
    __builtin_prefetch(dy + i);
  }
  CUDA_CNN_INLINE void accumulate(int64_t i, int64_t lanes, const MapLanes<A>& map, Vec<A>& sum_g,
                                  Vec<A>& sum_gx) const {
    const Vec<A> x_lanes = load_lanes(x + i, lanes), g = masked(i, lanes, x_lanes, map);
    if (dresidual) store_lanes(dresidual + i, g, lanes);
    sum_g += g;
    sum_gx = fma(g, x_lanes - map.mean, sum_gx);  // beyond the last lane g is 0
  }
  CUDA_CNN_INLINE void apply(int64_t i, int64_t lanes, const MapLanes<A>& map,
                             const GradientLanes<A>& gradient) const {
    const Vec<A> x_lanes = load_lanes(x + i, lanes);
    const Vec<A> g = dresidual ? load_lanes(dresidual + i, lanes) : masked(i, lanes, x_lanes, map);
    // Outside training an infinite x has a finite gradient.
    const Vec<A> from_statistics =
        training ? fma(gradient.slope, x_lanes - map.mean, gradient.offset) : Vec<A>{};
    write_lanes(dx + i, fma(gradient.scale, g, from_statistics), lanes, streamed);
  }
};

// Adds Σg and Σg·(x − mean) of the rows [begin, end) to sum_g and sum_gx, for the channels from `first`.
template <class T, Mask kMask, class A = Accumulator<T>>
void row_sums(const Pass<T, kMask>& given, int64_t channels, int64_t begin, int64_t end, int64_t first,
              int64_t width, bool side_by_side, double* sum_g, double* sum_gx) {
  const Pass<T, kMask> pass = given;
  const bool ahead = prefetches<T>(channels);
  A g[kBlock], gx[kBlock];
  for (int64_t chunk = begin; chunk < end; chunk += kRows) {
    for (int64_t i = 0; i < ceil_div(width, kTile<A>) * kTile<A>; ++i) g[i] = gx[i] = 0;
    for_rows<4>(side_by_side, chunk, min64(chunk + kRows, end), [&](auto rows, int64_t row) {
      for_each_vector<A>(width, [&](int64_t i, int, int64_t lanes) {
        const MapLanes<A> map = pass.coefficients.map(first + i);
        Vec<A> row_g = load(g + i), row_gx = load(gx + i);
#pragma GCC unroll 4
        for (int r = 0; r < rows.value; ++r) {
          const int64_t at = (row + r) * channels + first + i;
          if (rows.value > 1 && ahead) pass.prefetch(at + rows.value * channels);
          pass.accumulate(at, lanes, map, row_g, row_gx);
        }
        store(g + i, row_g);
        store(gx + i, row_gx);
      });
    });
    for (int64_t i = 0; i < width; ++i) {
      sum_g[i] += g[i];
      sum_gx[i] += gx[i];
    }
  }
}

// The same of a group's planes.
template <class T, Mask kMask, class A = Accumulator<T>>
void plane_sums(const Pass<T, kMask>& given, const BatchNormShape& s, const Cut& cut, int64_t group,
                int64_t first, int64_t width, double* sum_g, double* sum_gx) {
  const Pass<T, kMask> pass = given;
  const int64_t pitch = s.channels * s.spatial;
  for (int64_t c = 0; c < width; ++c) {
    const MapLanes<A> map = pass.coefficients.map_of(first + c);
    for_each_chunk(s, cut, group, first + c, [&](int64_t start, int64_t runs, int64_t length) {
      Vec<A> g[kWide] = {}, gx[kWide] = {};
      for (int64_t r = 0; r < runs; ++r) {
        for_each_vector<A>(length, [&](int64_t i, int slot, int64_t lanes) {
          pass.accumulate(start + r * pitch + i, lanes, map, g[slot], gx[slot]);
        });
      }
      sum_g[c] += total<A>(g);
      sum_gx[c] += total<A>(gx);
    });
  }
}

// dx of the rows [begin, end), of the channels from `first`.
template <class T, Mask kMask, class A = Accumulator<T>>
void rows_gradient(const Pass<T, kMask>& given, int64_t channels, int64_t begin, int64_t end, int64_t first,
                   int64_t width, bool side_by_side) {
  const Pass<T, kMask> pass = given;
  for_rows<2>(side_by_side, begin, end, [=](auto rows, int64_t row) {
    for_each_vector<A>(width, [=](int64_t i, int, int64_t lanes) {
      const MapLanes<A> map = pass.coefficients.map(first + i);
      const GradientLanes<A> gradient = pass.coefficients.gradient(first + i);
#pragma GCC unroll 2
      for (int r = 0; r < rows.value; ++r) {
        pass.apply((row + r) * channels + first + i, lanes, map, gradient);
      }
    });
  });
}

// dx of the planes [begin, end), the first of which is of channel `channel`.
template <class T, Mask kMask, class A = Accumulator<T>>
void planes_gradient(const Pass<T, kMask>& given, const BatchNormShape& s, int64_t begin, int64_t end,
                     int64_t channel) {
  const Pass<T, kMask> pass = given;
  const int64_t channels = s.channels, spatial = s.spatial;
  for (int64_t plane = begin; plane < end; ++plane) {
    const MapLanes<A> map = pass.coefficients.map_of(channel);
    const GradientLanes<A> gradient = pass.coefficients.gradient_of(channel);
    for_each_vector<A>(spatial, [=](int64_t i, int, int64_t lanes) {
      pass.apply(plane * spatial + i, lanes, map, gradient);
    });
    if (++channel == channels) channel = 0;
  }
}

// A call, in steps over channels [begin, end), groups, rows and planes, which any threads can take.
template <class T, Mask kMask>
struct Backward {
  using A = Accumulator<T>;
  const BatchNormBackwardParams& p;
  const BatchNormShape& s;
  const Cut cut;
  const Coefficients<A> k;
  const Pass<T, kMask> pass;
  double *const parts_g, *const parts_gx;

  explicit Backward(const BatchNormBackwardParams& params)
      : p(params),
        s(p.shape),
        cut(s),
        k(s.channels),
        pass{static_cast<const T*>(p.x),   static_cast<const T*>(p.dy),
             static_cast<const T*>(p.y),   static_cast<T*>(p.dx),
             static_cast<T*>(p.dresidual), p.training,
             streams<T>(p.dx, s),          k},
        parts_g(workspace<double>(Workspace::kA, 2 * cut.groups * s.channels)),
        parts_gx(parts_g + cut.groups * s.channels) {}

  bool needs_sums() const { return p.training || p.dweight.data || p.dbias.data || p.dresidual; }

  void read_statistics(int64_t begin, int64_t end) const {
    read_channels(p.mean, 0, begin, end, k.mean);
    read_channels(p.var, 1, begin, end, k.var);
    read_channels(p.weight, 1, begin, end, k.weight);
    if (kMask == Mask::kFromX) {
      read_channels(p.bias, 0, begin, end, k.bias);
      k.set_map(begin, end, p.eps);
    } else {
      for (int64_t c = begin; c < end; ++c) k.array(0)[c] = static_cast<A>(k.mean[c]);
    }
  }

  // Leaves Σg and Σg·(x − mean) of the group among the parts, and dresidual in its place.
  void sum_part(int64_t group, int64_t first, int64_t width, bool side_by_side) const {
    double *part_g = parts_g + group * s.channels + first, *part_gx = parts_gx + group * s.channels + first;
    for (int64_t i = 0; i < width; ++i) part_g[i] = part_gx[i] = 0;
    if (s.channels_last) {
      row_sums(pass, s.channels, cut.begin(group), cut.end(group), first, width, side_by_side, part_g,
               part_gx);
      return;
    }
    plane_sums(pass, s, cut, group, first, width, part_g, part_gx);
  }

  // From the parts to the coefficients of dx, and to dweight and dbias, which take the place of mean and var.
  void finish_channels(int64_t begin, int64_t end) const {
    double *sum_g = k.sum_g, *sum_gx = k.sum_gx, *mean = k.mean, *var = k.var;
    for (int64_t c = begin; c < end; ++c) sum_g[c] = sum_gx[c] = 0;
    for (int64_t g = 0; needs_sums() && g < cut.groups; ++g) {
      for (int64_t c = begin; c < end; ++c) {
        sum_g[c] += parts_g[g * s.channels + c];
        sum_gx[c] += parts_gx[g * s.channels + c];
      }
    }
    const int64_t count = s.per_channel();
    const double eps = p.eps, *weight = k.weight;
    const bool training = p.training;
    A *scale = k.array(3), *slope = k.array(4), *offset = k.array(5);
#pragma GCC ivdep  // vector code: no array overlaps another
    for (int64_t c = begin; c < end; ++c) {
      const BatchNormGradient<A> gradient =
          batch_norm_gradient<A>(sum_g[c], sum_gx[c], mean[c], var[c], weight[c], eps, count, training);
      scale[c] = gradient.scale;
      slope[c] = gradient.slope;
      offset[c] = gradient.offset;
      mean[c] = gradient.dweight;
      var[c] = gradient.dbias;
    }
    write_channels(mean, begin, end, p.dweight);
    write_channels(var, begin, end, p.dbias);
  }

  // Both passes over channels that no other thread touches.
  void run_channels(int64_t begin, int64_t end) const {
    read_statistics(begin, end);
    for (int64_t g = 0; needs_sums() && g < cut.groups; ++g) sum_part(g, begin, end - begin, true);
    finish_channels(begin, end);
    if (!p.dx) return;
    if (s.channels_last) {
      return rows_gradient(pass, s.channels, 0, s.per_channel(), begin, end - begin, true);
    }
    for (int64_t n = 0; n < s.batch; ++n) {
      planes_gradient(pass, s, n * s.channels + begin, n * s.channels + end, begin);
    }
  }

  // Each pass with all the threads: for parts of a channel too.
  void run_passes() const {
    read_statistics(0, s.channels);
    if (needs_sums()) {
      for_each_part(s, cut, [&](int64_t group, int64_t first, int64_t width) {
        sum_part(group, first, width, reads_side_by_side<T>(s));
      });
    }
    finish_channels(0, s.channels);
    if (!p.dx) return;
    for_all(s, [&](int64_t begin, int64_t end) {
      if (s.channels_last) {
        return rows_gradient(pass, s.channels, begin, end, 0, s.channels, writes_side_by_side<T>(s));
      }
      planes_gradient(pass, s, begin, end, begin % s.channels);
    });
  }

  // Channels apart, x and dy come once from memory, and the threads meet once. Not where too few channels are
  // left for each thread, nor where, in channels_last, the strips that a core's cache holds would be narrow,
  // or several threads would have one each: a core asks for lines behind its strip, which another one writes.
  // (Of few rows the strips are wide, and rows would be too few for the threads.)
  void run() const {
    const int64_t unit = s.channels_last ? kCacheLine / static_cast<int64_t>(sizeof(T)) : 1;
    const int64_t units = ceil_div(s.channels, unit), elements = unit * s.per_channel();
    const int64_t cached = kCachedBytes / (3 * elements * static_cast<int64_t>(sizeof(T)));
    const bool several = s.per_channel() * s.channels > kElementsForThreads;
    const bool wide = cut.groups < num_threads() && s.channels >= kBlock * num_threads();  // and few rows
    if (several && ((s.channels_last && !wide) || units < kUnits * num_threads())) return run_passes();
    if (s.channels_last && !wide && cached < kUnits) return run_passes();
    const int64_t block = min64(kBlock, max64(1, cached) * unit);
    parallel_for(units, max64(kUnits, kElementsForThreads / elements), [&](int64_t begin, int64_t end) {
      const int64_t last = min64(s.channels, end * unit);
      for (int64_t c = begin * unit; c < last; c += block) run_channels(c, min64(c + block, last));
      end_of_stream();
    });
  }
};

}  // namespace

void batch_norm_backward(const BatchNormBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    if (!p.relu) return Backward<T, Mask::kNone>(p).run();
    return p.y ? Backward<T, Mask::kFromY>(p).run() : Backward<T, Mask::kFromX>(p).run();
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
