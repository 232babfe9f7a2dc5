// Batch normalisation on the CPU, forward: one pass for the statistics, one for y.
//
// A chunk is summed as Σd and Σd² of d = x − pivot, the pivot being the mean of what the group has shown so
// far (of its first rows or run, at first): nothing is lost where the mean is large beside the deviation.
#include "cpu/batch_norm.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// Joins two parts' (mean, Σ(x − mean)²), of n and m elements. Chan, Golub, LeVeque 1979.
CUDA_CNN_INLINE void join(double& mean, double& squares, double n, double other_mean, double other_squares,
                          double m) {
  const double difference = other_mean - mean;
  mean = mean * (n / (n + m)) + other_mean * (m / (n + m));
  squares += other_squares + difference * difference * (n * m / (n + m));
}

// The chunk of each channel of a block: Σd and Σd².
template <class A>
struct Chunk {
  A pivot[kBlock], deviation[kBlock], squares[kBlock];
};

// An infinite pivot would turn finite values into NaN.
template <class A>
CUDA_CNN_INLINE A finite_or_zero(A value) {
  return value - value == 0 ? value : A(0);
}

template <int R, class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void mean_of_rows(const T* x, int64_t pitch, int64_t width, A* mean) {
  for_each_vector<A>(width, [&](int64_t i, int, int64_t lanes) {
    Vec<A> sum = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sum += load_lanes(x + r * pitch + i, lanes);
    store(mean + i, sum / broadcast(A(R)));
  });
}

template <int R, class T, class A = Accumulator<T>>
CUDA_CNN_INLINE void add_rows(const T* x, int64_t pitch, int64_t width, Chunk<A>& chunk) {
  const bool ahead = R > 1 && prefetches<T>(pitch);
  for_each_vector<A>(width, [&](int64_t i, int, int64_t lanes) {
    const Vec<A> pivot = load(chunk.pivot + i);
    Vec<A> deviation = load(chunk.deviation + i), squares = load(chunk.squares + i);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if (ahead) __builtin_prefetch(x + (R + r) * pitch + i);
      const Vec<A> d = load_lanes(x + r * pitch + i, lanes) - pivot;
      deviation += d;
      squares = fma(d, d, squares);
    }
    store(chunk.deviation + i, deviation);
    store(chunk.squares + i, squares);
  });
}

template <class T, class A = Accumulator<T>>
void row_statistics(const T* x, int64_t pitch, int64_t width, int64_t begin, int64_t end, double* mean,
                    double* squares) {
  Chunk<A> chunk;
  if (end - begin >= 4) {
    mean_of_rows<4>(x + begin * pitch, pitch, width, chunk.pivot);
  } else {
    mean_of_rows<1>(x + begin * pitch, pitch, width, chunk.pivot);
  }
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t last = min64(row + kRows, end);
    const double seen = row - begin, count = last - row;
    for (int64_t i = 0; i < width; ++i) {
      chunk.pivot[i] = finite_or_zero(seen == 0 ? chunk.pivot[i] : static_cast<A>(mean[i]));
    }
    for (int64_t i = 0; i < kBlock; ++i) chunk.deviation[i] = chunk.squares[i] = 0;
    for_rows<4>(true, row, last,
                [&](auto rows, int64_t r) { add_rows<rows.value>(x + r * pitch, pitch, width, chunk); });
    for (int64_t i = 0; i < width; ++i) {
      const double shift = chunk.deviation[i] * (1 / count);
      join(mean[i], squares[i], seen, chunk.pivot[i] + shift, chunk.squares[i] - shift * chunk.deviation[i],
           count);
    }
  }
}

// The first `count` lanes; 0 in the others.
template <class A>
CUDA_CNN_INLINE Vec<A> keep_first(Vec<A> v, int64_t count) {
  Vec<A> index;
  for (int i = 0; i < kLanes<A>; ++i) index[i] = i;
  return index < broadcast(A(count)) ? v : Vec<A>{};
}

template <class T, class A = Accumulator<T>>
void plane_statistics(const T* x, const BatchNormShape& s, const Cut& cut, int64_t group, int64_t channel,
                      double& mean, double& squares) {
  double seen = 0;
  for_each_chunk(s, cut, group, channel, [&](int64_t start, int64_t runs, int64_t length) {
    const int64_t pitch = s.channels * s.spatial;
    if (seen == 0) {
      Vec<A> sums[kWide] = {};
      for_each_vector<A>(length, [&](int64_t i, int slot, int64_t lanes) {
        sums[slot] += load_lanes(x + start + i, lanes);
      });
      mean = total<A>(sums) / A(length);
    }
    const A pivot = finite_or_zero(static_cast<A>(mean));
    if (seen == 0) mean = 0;
    Vec<A> deviations[kWide] = {}, square[kWide] = {};
    for (int64_t r = 0; r < runs; ++r) {
      for_each_vector<A>(length, [&](int64_t i, int slot, int64_t lanes) {
        Vec<A> d = load_lanes(x + start + r * pitch + i, lanes) - broadcast(pivot);
        if (lanes < kLanes<A>) d = keep_first<A>(d, lanes);
        deviations[slot] += d;
        square[slot] = fma(d, d, square[slot]);
      });
    }
    const double count = runs * length, deviation = total<A>(deviations), shift = deviation / count;
    join(mean, squares, seen, pivot + shift, total<A>(square) - shift * deviation, count);
    seen += count;
  });
}

template <class T>
void batch_statistics(const BatchNormParams& p) {
  const T* x = static_cast<const T*>(p.x);
  const BatchNormShape& s = p.shape;
  const Cut cut(s);
  double* means = workspace<double>(Workspace::kA, 2 * cut.groups * s.channels);
  double* squares = means + cut.groups * s.channels;
  for_each_part(s, cut, [&](int64_t group, int64_t first, int64_t width) {
    double *mean = means + group * s.channels + first, *square = squares + group * s.channels + first;
    for (int64_t i = 0; i < width; ++i) mean[i] = square[i] = 0;
    if (s.channels_last) {
      row_statistics(x + first, s.channels, width, cut.begin(group), cut.end(group), mean, square);
    } else {
      plane_statistics(x, s, cut, group, first, *mean, *square);
    }
  });
  for (int64_t c = 0; c < s.channels; ++c) p.mean[c] = p.var[c] = 0;
  for (int64_t g = 0; g < cut.groups; ++g) {
    const double seen = cut.begin(g) * cut.per_item, count = cut.count(g);
    for (int64_t c = 0; c < s.channels; ++c) {
      join(p.mean[c], p.var[c], seen, means[g * s.channels + c], squares[g * s.channels + c], count);
    }
  }
  for (int64_t c = 0; c < s.channels; ++c) p.var[c] /= s.per_channel();
}

// y of the rows or planes [begin, end). Everything in locals: a vector's store may alias what a reference
// leads to, which would be read again for every vector.
template <class T, class A = Accumulator<T>>
void normalise(const BatchNormParams& p, const Coefficients<A>& per_channel, int64_t begin, int64_t end) {
  const T *x = static_cast<const T*>(p.x), *residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  const Vec<A> least = broadcast(p.relu ? A(0) : -A(__builtin_inff()));
  const Coefficients<A> coefficients = per_channel;
  const bool streamed = streams<T>(y, p.shape);
  const auto apply = [=](int64_t i, int64_t lanes, const MapLanes<A>& map) {
    Vec<A> v = map(load_lanes(x + i, lanes));
    if (residual) v += load_lanes(residual + i, lanes);
    write_lanes(y + i, v < least ? least : v, lanes, streamed);
  };
  const int64_t channels = p.shape.channels, spatial = p.shape.spatial;
  if (p.shape.channels_last) {
    for_rows<2>(writes_side_by_side<T>(p.shape), begin, end, [=](auto rows, int64_t row) {
      for_each_vector<A>(channels, [=](int64_t c, int, int64_t lanes) {
        const MapLanes<A> map = coefficients.map(c);
#pragma GCC unroll 2
        for (int r = 0; r < rows.value; ++r) apply((row + r) * channels + c, lanes, map);
      });
    });
  } else {
    for (int64_t plane = begin; plane < end; ++plane) {
      const MapLanes<A> map = coefficients.map_of(plane % channels);
      for_each_vector<A>(spatial,
                         [=](int64_t i, int, int64_t lanes) { apply(plane * spatial + i, lanes, map); });
    }
  }
}

template <class T>
void forward(const BatchNormParams& p) {
  using A = Accumulator<T>;
  const int64_t channels = p.shape.channels;
  const Coefficients<A> coefficients(channels);
  if (p.training) {
    batch_statistics<T>(p);
    memcpy(coefficients.mean, p.mean, channels * sizeof(double));
    memcpy(coefficients.var, p.var, channels * sizeof(double));
  } else {
    read_channels(p.running_mean, 0, 0, channels, coefficients.mean);
    read_channels(p.running_var, 1, 0, channels, coefficients.var);
  }
  read_channels(p.weight, 1, 0, channels, coefficients.weight);
  read_channels(p.bias, 0, 0, channels, coefficients.bias);
  coefficients.set_map(0, channels, p.eps);
  for_all(p.shape, [&](int64_t begin, int64_t end) { normalise<T>(p, coefficients, begin, end); });
}

}  // namespace

void batch_norm_forward(const BatchNormParams& p) {
  dispatch_dtype(p.shape.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
