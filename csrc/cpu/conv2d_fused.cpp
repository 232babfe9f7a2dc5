// The passes of kernels/conv2d_fused.h, row by row.
//
// The gradient sums blocks of pixels, whose size the number of channels decides, in the accumulation type,
// and joins them in index order in double: the bits do not depend on the threads.
#include "kernels/conv2d_fused.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kBlockElements = 32768;  // a task's least work, and a chain of sums' greatest length
constexpr int64_t kLongestChain = 512;
constexpr int kRowsAtOnce = 4;

template <class T>
CUDA_CNN_INLINE Vec<Accumulator<T>> load_up_to(const T* p, int64_t left) {
  return left >= kLanes<T> ? load(p) : load_first(p, left);
}
template <class T>
CUDA_CNN_INLINE void store_up_to(T* p, Vec<Accumulator<T>> v, int64_t left) {
  if (left >= kLanes<T>) {
    store(p, v);
  } else {
    store_first(p, v, left);
  }
}

template <class T>
CUDA_CNN_INLINE const T* row_of(const PixelRowsView& view, int64_t row) {
  return static_cast<const T*>(view.data) + row * view.pixel;
}

template <class T>
void map_rows(const ChannelMapParams& p, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const A *scale = static_cast<const A*>(p.scale), *shift = static_cast<const A*>(p.shift);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = row_of<T>(p.x, row);
    const T* residual = p.residual.data ? row_of<T>(p.residual, row) : nullptr;
    T* z = static_cast<T*>(p.z) + row * p.z_pixel;
    for (int64_t c = 0; c < p.channels; c += kLanes<A>) {
      const int64_t left = p.channels - c;
      const Vec<A> from = load_up_to(x + c, left);
      Vec<A> value = fma(from, load_up_to(scale + c, left), load_up_to(shift + c, left));
      if (residual) value += load_up_to(residual + c, left);
      store_up_to(z + c, channel_map_end(value, from, p.end), left);
    }
  }
}

template <class T>
struct GradientRows {
  using A = Accumulator<T>;
  const ChannelMapGradParams& p;

  CUDA_CNN_INLINE Vec<A> vector(const void* values, int64_t c, int64_t left, A if_null) const {
    return values ? load_up_to(static_cast<const A*>(values) + c, left) : broadcast(if_null);
  }

  // kRows rows of one vector of channels: what they add to the sums.
  template <int kRows>
  CUDA_CNN_INLINE void add(int64_t row, int64_t c, A* sum_g, A* sum_gx) const {
    const int64_t left = p.channels - c;
    const Vec<A> scale = vector(p.scale, c, left, 1), shift = vector(p.shift, c, left, 0);
    Vec<A> total_g = load(sum_g + c), total_gx = load(sum_gx + c);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = row + i, dense = at * p.channels + c;
      Vec<A> g = load_up_to(row_of<T>(p.dz, at) + c, left);
      const Vec<A> x = p.x.data ? load_up_to(row_of<T>(p.x, at) + c, left) : Vec<A>{};
      if (p.relu) {
        const Vec<A> z = p.z.data ? load_up_to(row_of<T>(p.z, at) + c, left) : fma(x, scale, shift);
        g = z <= 0 ? Vec<A>{} : g;
      }
      total_g += g;
      total_gx = fma(g, x, total_gx);
      if (p.dresidual) store_up_to(static_cast<T*>(p.dresidual) + dense, g, left);
      if (p.dx) {
        Vec<A> dx = g * scale;
        if (p.added.data) dx += load_up_to(row_of<T>(p.added, at) + c, left);
        store_up_to(static_cast<T*>(p.dx) + dense, dx, left);
      }
    }
    store(sum_g + c, total_g);
    store(sum_gx + c, total_gx);
  }

  void run(int64_t begin, int64_t end, A* sum_g, A* sum_gx) const {
    int64_t row = begin;
    for (; row + kRowsAtOnce <= end; row += kRowsAtOnce) {
      for (int64_t c = 0; c < p.channels; c += kLanes<A>) add<kRowsAtOnce>(row, c, sum_g, sum_gx);
    }
    for (; row < end; ++row) {
      for (int64_t c = 0; c < p.channels; c += kLanes<A>) add<1>(row, c, sum_g, sum_gx);
    }
  }
};

template <class T>
void gradient(const ChannelMapGradParams& p) {
  using A = Accumulator<T>;
  const int64_t size = max64(1, min64(kLongestChain, kBlockElements / p.channels));
  const int64_t blocks = ceil_div(p.pixels, size), width = ceil_div(p.channels, kLanes<A>) * kLanes<A>;
  A* sums = workspace<A>(Workspace::kShared, blocks * 2 * width);
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      A *sum_g = sums + block * 2 * width, *sum_gx = sum_g + width;
      for (int64_t c = 0; c < 2 * width; c += kLanes<A>) store(sum_g + c, Vec<A>{});
      GradientRows<T>{p}.run(block * size, min64(p.pixels, (block + 1) * size), sum_g, sum_gx);
    }
  });
  if (!p.sum_g) return;
  double* totals = workspace<double>(Workspace::kA, 2 * width);
  for (int64_t c = 0; c < 2 * width; ++c) totals[c] = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t c = 0; c < 2 * width; ++c) totals[c] += sums[block * 2 * width + c];
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    static_cast<A*>(p.sum_g)[c] = static_cast<A>(totals[c]);
    static_cast<A*>(p.sum_gx)[c] = static_cast<A>(totals[width + c]);
  }
}

}  // namespace

void channel_map(const ChannelMapParams& p) {
  if (p.pixels * p.channels == 0) return;
  dispatch_dtype(p.dtype, [&](auto type) {
    parallel_for(p.pixels, ceil_div(kBlockElements, p.channels),
                 [&](int64_t begin, int64_t end) { map_rows<decltype(type)>(p, begin, end); });
  });
}

void channel_map_grad(const ChannelMapGradParams& p) {
  if (p.channels == 0) return;
  dispatch_dtype(p.dtype, [&](auto type) { gradient<decltype(type)>(p); });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
