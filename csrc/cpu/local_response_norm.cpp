// Local response normalisation on the CPU: one pass over memory each way.
//
// A tile is a strip of `width` neighbouring positions times all channels (channels_last: all channels of one
// position, width 1). Its squares go to scratch in L1 with zero rows above and below, so that a window is n
// plain loads `width` apart, and both layouts share every line.
#include "kernels/local_response_norm.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kStrip = 64;  // contiguous layout: 256 bytes of a row at a time
constexpr int64_t kElementsPerTask = 32768;

template <class A>
CUDA_CNN_INLINE Vec<A> inverse_power(Vec<A> s, A beta) {
  if (beta == A(0.75)) {
    const Vec<A> root = sqrt(s);
    return A(1) / (root * sqrt(root));
  }
  for (int i = 0; i < kLanes<A>; ++i) s[i] = lrn_inverse_power(A(s[i]), beta);
  return s;
}

// Where a tile lies in memory, and how its scratch is laid out.
struct Tile {
  int64_t offset;            // of its first element
  int64_t rows, row_length;  // contiguous runs in memory, row_stride apart
  int64_t row_stride;
  int64_t width;  // distance between neighbouring channels in scratch
  int64_t count() const { return rows * row_length; }
};

// Calls fn(tile) for the tiles of this task.
template <class Fn>
CUDA_CNN_INLINE void for_each_tile(const LocalResponseNormParams& p, const Fn& fn) {
  if (p.inner == 1) {
    parallel_for(p.outer, ceil_div(kElementsPerTask, p.channels), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fn(Tile{i * p.channels, 1, p.channels, 0, 1});
    });
    return;
  }
  const int64_t strips = ceil_div(p.inner, kStrip);
  const int64_t grain = ceil_div(kElementsPerTask, p.channels * min64(p.inner, kStrip));
  parallel_for(p.outer * strips, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % strips * kStrip, width = min64(kStrip, p.inner - first);
      fn(Tile{i / strips * p.channels * p.inner + first, p.channels, width, p.inner, width});
    }
  });
}

// Calls fn(memory offset, scratch offset, lanes) for each vector of the tile; lanes < kLanes at a row's end.
template <class A, class Fn>
CUDA_CNN_INLINE void for_each_vector(const Tile& tile, const Fn& fn) {
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t memory = tile.offset + row * tile.row_stride, scratch = row * tile.row_length;
    int64_t i = 0;
    for (; i + kLanes<A> <= tile.row_length; i += kLanes<A>) fn(memory + i, scratch + i, int64_t{kLanes<A>});
    if (i < tile.row_length) fn(memory + i, scratch + i, tile.row_length - i);
  }
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

// Of the usual size: without a loop.
template <class A>
CUDA_CNN_INLINE Vec<A> window_sum(const A* first, int64_t size, int64_t step) {
  Vec<A> total = load(first);
  if (size == 5) {
    total += load(first + step);
    return (total + load(first + 2 * step)) + (load(first + 3 * step) + load(first + 4 * step));
  }
  for (int64_t j = 1; j < size; ++j) total += load(first + j * step);
  return total;
}

template <class A>
CUDA_CNN_INLINE void fill_zero(A* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = 0;
}

// Scratch of a tile: `above` rows of zeros, the tile, `below` rows of zeros, one vector to read past.
template <class A>
CUDA_CNN_INLINE A* padded(Workspace slot, const Tile& tile, int64_t above, int64_t below) {
  const int64_t count = tile.count();
  A* scratch = workspace<A>(slot, count + (above + below) * tile.width + kLanes<A>);
  fill_zero(scratch, above * tile.width);
  fill_zero(scratch + above * tile.width + count, below * tile.width + kLanes<A>);
  return scratch;
}

// Leaves in scratch the squares, padded so that window c starts `before` channels above c.
template <class T, class A = Accumulator<T>>
CUDA_CNN_INLINE const A* squares_of(const T* x, const Tile& tile, int64_t size) {
  A* squares = padded<A>(Workspace::kA, tile, lrn_before(size), lrn_after(size));
  A* body = squares + lrn_before(size) * tile.width;
  for_each_vector<A>(tile, [&](int64_t memory, int64_t scratch, int64_t lanes) {
    const Vec<A> v = load_lanes(x + memory, lanes);
    store_lanes(body + scratch, v * v, lanes);
  });
  return squares;
}

template <class T>
void forward(const LocalResponseNormParams& p) {
  using A = Accumulator<T>;
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.out);
  const Vec<A> scale = broadcast(A(p.alpha / p.size)), k = broadcast(A(p.k));
  for_each_tile(p, [&](const Tile& tile) {
    const A* squares = squares_of(x, tile, p.size);
    for_each_vector<A>(tile, [&](int64_t memory, int64_t scratch, int64_t lanes) {
      const Vec<A> s = fma(scale, window_sum(squares + scratch, p.size, tile.width), k);
      store_lanes(y + memory, load_lanes(x + memory, lanes) * inverse_power(s, A(p.beta)), lanes);
    });
  });
}

template <class T>
void backward(const LocalResponseNormParams& p) {
  using A = Accumulator<T>;
  const T *x = static_cast<const T*>(p.x), *dy = static_cast<const T*>(p.dy);
  T* dx = static_cast<T*>(p.out);
  const Vec<A> scale = broadcast(A(p.alpha / p.size)), k = broadcast(A(p.k));
  const Vec<A> factor = broadcast(A(-2 * p.alpha * p.beta / p.size));
  // The window of "whose window holds c" is the forward window mirrored.
  const int64_t before = lrn_after(p.size), after = lrn_before(p.size);
  for_each_tile(p, [&](const Tile& tile) {
    const A* squares = squares_of(x, tile, p.size);
    A* terms = padded<A>(Workspace::kB, tile, before, after);           // dy · x · s^(−β−1)
    A* direct = workspace<A>(Workspace::kC, tile.count() + kLanes<A>);  // dy · s^−β
    for_each_vector<A>(tile, [&](int64_t memory, int64_t scratch, int64_t lanes) {
      const Vec<A> s = fma(scale, window_sum(squares + scratch, p.size, tile.width), k);
      const Vec<A> d = load_lanes(dy + memory, lanes) * inverse_power(s, A(p.beta));
      store_lanes(direct + scratch, d, lanes);
      store_lanes(terms + before * tile.width + scratch, d * load_lanes(x + memory, lanes) / s, lanes);
    });
    for_each_vector<A>(tile, [&](int64_t memory, int64_t scratch, int64_t lanes) {
      const Vec<A> sum = window_sum(terms + scratch, p.size, tile.width);
      const Vec<A> x_lanes = load_lanes(x + memory, lanes);
      store_lanes(dx + memory, fma(factor * x_lanes, sum, load(direct + scratch)), lanes);
    });
  });
}

}  // namespace

void local_response_norm_forward(const LocalResponseNormParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) { forward<decltype(element)>(p); });
}

void local_response_norm_backward(const LocalResponseNormParams& p) {
  dispatch_dtype(p.dtype, [&](auto element) { backward<decltype(element)>(p); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
