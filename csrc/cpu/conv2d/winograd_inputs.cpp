// Winograd's input transform: the pixels of tiles to their values at the points.
#include "cpu/conv2d/winograd.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

using winograd::V;
constexpr int kLane = kLanes<float>;

template <class E, class T>
struct InputTiles {
  static constexpr int kIn = kWinogradIn<E>, kLine = 64 / sizeof(T);
  const Gather<T>& g;
  int64_t point_step;

  // The rows and columns [first, last) of a tile that are inside the image, and where row 0, column 0 would
  // be.
  struct Square {
    const T* origin;
    int64_t first_row, last_row, first_column, last_column;

    bool whole() const {
      return first_row == 0 && last_row >= kIn && first_column == 0 && last_column >= kIn;
    }
  };
  Square square(const WinogradTile& t) const {
    const int64_t h = g.base_h + t.p, w = g.base_w + t.q;
    return {g.source + ((t.n * g.H + h) * g.W + w) * g.pixel, max64(-h, 0), g.H - h, max64(-w, 0), g.W - w};
  }

  // Asks for the line at channel c of what a tile does not share with its neighbour before it: for L2, as L1
  // waits for few lines at a time.
  CUDA_CNN_INLINE void prefetch(const Square& tile, int64_t c) const {
    const T* row = tile.origin + c;
    for (int i = 0; i < kIn; ++i, row += g.W * g.pixel) {
      for (int j = kIn - winograd_out<E>(3); j < kIn; ++j) __builtin_prefetch(row + j * g.pixel, 0, 2);
    }
  }

  template <bool kMapped, bool kWhole>
  void transform(const Square& tile, const Square& next, Element<E>* out) const {
    for (int64_t c = 0; c < g.channels; c += kLane) {
      if (c % kLine == 0) prefetch(next, c);
      const int64_t left = g.channels - c;
      const WinogradPrologue map(g, c, left);
      const T* rows[kIn];
#pragma GCC unroll 6
      for (int i = 0; i < kIn; ++i) rows[i] = tile.origin + i * g.W * g.pixel + c;
      winograd::transform_square<kIn, kIn>(
          winograd::input,
          [&](int i, int j) __attribute__((always_inline)) {
            const bool inside =
                i >= tile.first_row && i < tile.last_row && j >= tile.first_column && j < tile.last_column;
            if (!kWhole && !inside) return V{};
            const T* from = rows[i] + j * g.pixel;
            const V x = left >= kLane ? load(from) : load_first(from, left);
            return kMapped ? map(x) : x;
          },
          [&](int i, int j, V value) __attribute__((always_inline)) {
            store_result<E>(out + (i * kIn + j) * point_step + c, value);
          });
    }
  }

  template <bool kMapped>
  void run(int64_t begin, int64_t end, Element<E>* out, int64_t tile_step) const {
    Square next = square(winograd_tile<E>(g, begin));
    for (int64_t t = begin; t < end; ++t, out += tile_step) {
      const Square tile = next;
      next = square(winograd_tile<E>(g, t + 1));
      if (tile.whole()) {
        transform<kMapped, true>(tile, next, out);
      } else {
        transform<kMapped, false>(tile, next, out);
      }
    }
  }
};

}  // namespace

template <class E, class T>
void winograd_inputs(const Gather<T>& g, int64_t begin, int64_t end, Element<E>* out, int64_t point_step,
                     int64_t tile_step) {
  const InputTiles<E, T> tiles{g, point_step};
  if (g.scale || g.relu) {
    tiles.template run<true>(begin, end, out, tile_step);
  } else {
    tiles.template run<false>(begin, end, out, tile_step);
  }
}

#define INSTANTIATE(T, E) \
  template void winograd_inputs<E>(const Gather<T>&, int64_t, int64_t, Element<E>*, int64_t, int64_t);
INSTANTIATE(float, float)
INSTANTIATE(Half, float)
INSTANTIATE(BFloat16, float)
#if defined(CUDA_CNN_HAS_PAIRS)
INSTANTIATE(BFloat16, Bf16Pair)
#endif

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
