// Batch normalisation on the CPU, backward: one pass for Σg and Σg·(x − mean), one for dx; g is dy under the
// mask.
#include "cpu/batch_norm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// dy under the ReLU's mask: y, or where there was no residual what y was computed from, decides.
template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE Vec<A> masked(const BatchNormBackwardParams& p, int64_t i, int64_t lanes, Vec<A> x,
                              const MapLanes<A>& map) {
  const Vec<A> g = load_lanes(static_cast<const T*>(p.dy) + i, lanes);
  if (!p.relu) return g;
  const Vec<A> z = p.y ? load_lanes(static_cast<const T*>(p.y) + i, lanes) : map(x);
  return z <= 0 ? Vec<A>{} : g;
}

template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void accumulate(const BatchNormBackwardParams& p, int64_t i, int64_t lanes,
                                const MapLanes<A>& map, Vec<A>& sum_g, Vec<A>& sum_gx) {
  const Vec<A> x = load_lanes(static_cast<const T*>(p.x) + i, lanes);
  const Vec<A> g = masked<T>(p, i, lanes, x, map);
  if (p.dresidual) store_lanes(static_cast<T*>(p.dresidual) + i, g, lanes);
  sum_g += g;
  sum_gx = fma(g, x - map.mean, sum_gx);  // beyond the last lane g is 0
}

// Adds Σg and Σg·(x − mean) of the rows [begin, end) to sum_g and sum_gx, for the channels from `first`.
template <class T, class A = Accumulator<T>>
void row_sums(const BatchNormBackwardParams& p, const Coefficients<A>& coefficients, int64_t begin,
              int64_t end, int64_t first, int64_t width, double* sum_g, double* sum_gx) {
  A g[kBlock], gx[kBlock];
  for (int64_t chunk = begin; chunk < end; chunk += kRows) {
    for (int64_t i = 0; i < kBlock; ++i) g[i] = gx[i] = 0;
    for_rows<T>(chunk, min64(chunk + kRows, end), p.shape.channels, [&](auto rows, int64_t row) {
      for_each_vector<A>(width, [&](int64_t i, int, int64_t lanes) {
        const MapLanes<A> map = coefficients.map(first + i);
        Vec<A> row_g = load(g + i), row_gx = load(gx + i);
#pragma GCC unroll 4
        for (int r = 0; r < rows.value; ++r) {
          accumulate<T>(p, (row + r) * p.shape.channels + first + i, lanes, map, row_g, row_gx);
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

template <class T, class A = Accumulator<T>>
void plane_sums(const BatchNormBackwardParams& p, const MapLanes<A>& map, const Cut& cut, int64_t group,
                int64_t channel, double& sum_g, double& sum_gx) {
  for_each_chunk(p.shape, cut, group, channel, [&](int64_t start, int64_t runs, int64_t length) {
    Vec<A> g[kWide] = {}, gx[kWide] = {};
    for (int64_t r = 0; r < runs; ++r) {
      const int64_t run = start + r * p.shape.channels * p.shape.spatial;
      for_each_vector<A>(length, [&](int64_t i, int slot, int64_t lanes) {
        accumulate<T>(p, run + i, lanes, map, g[slot], gx[slot]);
      });
    }
    sum_g += total<A>(g);
    sum_gx += total<A>(gx);
  });
}

// Leaves each channel's Σg and Σg·(x − mean) in sums_g and sums_gx, and dresidual in its place.
template <class T, class A = Accumulator<T>>
void gradient_sums(const BatchNormBackwardParams& p, const Coefficients<A>& coefficients, double* sums_g,
                   double* sums_gx) {
  const BatchNormShape& s = p.shape;
  const Cut cut(s);
  double* parts_g = workspace<double>(Workspace::kA, 2 * cut.groups * s.channels);
  double* parts_gx = parts_g + cut.groups * s.channels;
  for_each_part(s, cut, [&](int64_t group, int64_t first, int64_t width) {
    double *part_g = parts_g + group * s.channels + first, *part_gx = parts_gx + group * s.channels + first;
    for (int64_t i = 0; i < width; ++i) part_g[i] = part_gx[i] = 0;
    if (s.channels_last) {
      row_sums<T>(p, coefficients, cut.begin(group), cut.end(group), first, width, part_g, part_gx);
    } else {
      plane_sums<T>(p, coefficients.map_of(first), cut, group, first, *part_g, *part_gx);
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
  for_all(
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

void batch_norm_backward(const BatchNormBackwardParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
