// Batch normalisation on the CPU, backward: one pass for Σg and Σg·(x − mean), one for dx; g is dy under the
// mask.
#include "cpu/batch_norm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

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
              int64_t width, double* sum_g, double* sum_gx) {
  const Pass<T, kMask> pass = given;
  A g[kBlock], gx[kBlock];
  for (int64_t chunk = begin; chunk < end; chunk += kRows) {
    for (int64_t i = 0; i < kBlock; ++i) g[i] = gx[i] = 0;
    for_rows<4>(reads_side_by_side<T>(channels), chunk, min64(chunk + kRows, end),
                [&](auto rows, int64_t row) {
                  for_each_vector<A>(width, [&](int64_t i, int, int64_t lanes) {
                    const MapLanes<A> map = pass.coefficients.map(first + i);
                    Vec<A> row_g = load(g + i), row_gx = load(gx + i);
#pragma GCC unroll 4
                    for (int r = 0; r < rows.value; ++r) {
                      pass.accumulate((row + r) * channels + first + i, lanes, map, row_g, row_gx);
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

template <class T, Mask kMask, class A = Accumulator<T>>
void plane_sums(const Pass<T, kMask>& given, const BatchNormShape& s, const Cut& cut, int64_t group,
                int64_t channel, double& sum_g, double& sum_gx) {
  const Pass<T, kMask> pass = given;
  const MapLanes<A> map = pass.coefficients.map_of(channel);
  const int64_t pitch = s.channels * s.spatial;
  for_each_chunk(s, cut, group, channel, [&](int64_t start, int64_t runs, int64_t length) {
    Vec<A> g[kWide] = {}, gx[kWide] = {};
    for (int64_t r = 0; r < runs; ++r) {
      for_each_vector<A>(length, [&](int64_t i, int slot, int64_t lanes) {
        pass.accumulate(start + r * pitch + i, lanes, map, g[slot], gx[slot]);
      });
    }
    sum_g += total<A>(g);
    sum_gx += total<A>(gx);
  });
}

// Leaves each channel's Σg and Σg·(x − mean) in the coefficients, and dresidual in its place.
template <class T, Mask kMask>
void gradient_sums(const Pass<T, kMask>& pass, const BatchNormShape& s) {
  const Cut cut(s);
  double* parts_g = workspace<double>(Workspace::kA, 2 * cut.groups * s.channels);
  double* parts_gx = parts_g + cut.groups * s.channels;
  for_each_part(s, cut, [&](int64_t group, int64_t first, int64_t width) {
    double *part_g = parts_g + group * s.channels + first, *part_gx = parts_gx + group * s.channels + first;
    for (int64_t i = 0; i < width; ++i) part_g[i] = part_gx[i] = 0;
    if (s.channels_last) {
      row_sums(pass, s.channels, cut.begin(group), cut.end(group), first, width, part_g, part_gx);
    } else {
      plane_sums(pass, s, cut, group, first, *part_g, *part_gx);
    }
  });
  double *sums_g = pass.coefficients.sum_g, *sums_gx = pass.coefficients.sum_gx;
  for (int64_t g = 0; g < cut.groups; ++g) {
    for (int64_t c = 0; c < s.channels; ++c) {
      sums_g[c] += parts_g[g * s.channels + c];
      sums_gx[c] += parts_gx[g * s.channels + c];
    }
  }
}

// From the sums to the coefficients of dx, and to dweight and dbias, which take the place of mean and var:
// vector code, thanks to locals of which it is known that they do not overlap.
template <class A>
void finish_channels(const BatchNormBackwardParams& p, const Coefficients<A>& k) {
  const int64_t channels = p.shape.channels, count = p.shape.per_channel();
  const double eps = p.eps;
  const bool training = p.training;
  const double* __restrict__ sum_g = k.sum_g, * __restrict__ sum_gx = k.sum_gx, * __restrict__ weight = k.weight;
  double* __restrict__ mean = k.mean, * __restrict__ var = k.var;
  A* __restrict__ scale = k.array(3), * __restrict__ slope = k.array(4), * __restrict__ offset = k.array(5);
  for (int64_t c = 0; c < channels; ++c) {
    const BatchNormGradient<A> gradient =
        batch_norm_gradient<A>(sum_g[c], sum_gx[c], mean[c], var[c], weight[c], eps, count, training);
    scale[c] = gradient.scale;
    slope[c] = gradient.slope;
    offset[c] = gradient.offset;
    mean[c] = gradient.dweight;
    var[c] = gradient.dbias;
  }
  write_channels(mean, channels, p.dweight);
  write_channels(var, channels, p.dbias);
}

// dx of the rows or planes [begin, end).
template <class T, Mask kMask, class A = Accumulator<T>>
void gradient_of_input(const Pass<T, kMask>& given, const BatchNormShape& s, int64_t begin, int64_t end) {
  const Pass<T, kMask> pass = given;
  const int64_t channels = s.channels, spatial = s.spatial;
  if (s.channels_last) {
    for_rows<2>(writes_side_by_side<T>(channels), begin, end, [=](auto rows, int64_t row) {
      for_each_vector<A>(channels, [=](int64_t c, int, int64_t lanes) {
        const MapLanes<A> map = pass.coefficients.map(c);
        const GradientLanes<A> gradient = pass.coefficients.gradient(c);
#pragma GCC unroll 2
        for (int r = 0; r < rows.value; ++r) pass.apply((row + r) * channels + c, lanes, map, gradient);
      });
    });
    return;
  }
  for (int64_t plane = begin; plane < end; ++plane) {
    const MapLanes<A> map = pass.coefficients.map_of(plane % channels);
    const GradientLanes<A> gradient = pass.coefficients.gradient_of(plane % channels);
    for_each_vector<A>(spatial, [=](int64_t i, int, int64_t lanes) {
      pass.apply(plane * spatial + i, lanes, map, gradient);
    });
  }
}

template <class T, Mask kMask>
void backward(const BatchNormBackwardParams& p) {
  using A = Accumulator<T>;
  const int64_t channels = p.shape.channels;
  const Coefficients<A> k(channels);
  read_channels(p.mean, 0, channels, k.mean);
  read_channels(p.var, 1, channels, k.var);
  read_channels(p.weight, 1, channels, k.weight);
  read_channels(p.bias, 0, channels, k.bias);
  k.set_map(channels, p.eps);
  const Pass<T, kMask> pass = {static_cast<const T*>(p.x),   static_cast<const T*>(p.dy),
                               static_cast<const T*>(p.y),   static_cast<T*>(p.dx),
                               static_cast<T*>(p.dresidual), p.training,
                               streams<T>(p.dx, p.shape),    k};
  for (int64_t c = 0; c < channels; ++c) k.sum_g[c] = k.sum_gx[c] = 0;
  if (p.training || p.dweight.data || p.dbias.data || p.dresidual) gradient_sums(pass, p.shape);
  finish_channels(p, k);
  if (!p.dx) return;
  for_all(p.shape, [&](int64_t begin, int64_t end) { gradient_of_input(pass, p.shape, begin, end); });
}

}  // namespace

void batch_norm_backward(const BatchNormBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto element) {
    using T = decltype(element);
    if (!p.relu) return backward<T, Mask::kNone>(p);
    return p.y ? backward<T, Mask::kFromY>(p) : backward<T, Mask::kFromX>(p);
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
