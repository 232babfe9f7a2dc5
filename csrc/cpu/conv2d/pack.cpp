#include "cpu/conv2d/pack.h"

#include "cpu/conv2d/prefetch.h"
#include "cpu/conv2d/transpose.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

// A vector of channels, widened or as it is; and its first `count`, with zeros behind.
template <class T, class To>
CUDA_CNN_INLINE void copy_vector(const T* from, To* out) {
  if constexpr (sizeof(To) == 2) {
    store_half_words(out, load_half_words(from));
  } else {
    store(out, load(from));
  }
}
template <class T, class To>
CUDA_CNN_INLINE void copy_first(const T* from, int64_t count, To* out) {
  if constexpr (sizeof(To) == 2) {
    for (int64_t c = 0; c < kLanes<To>; ++c) out[c] = c < count ? from[c] : To{};
  } else {
    store(out, load_first(from, count));
  }
}
template <class To>
CUDA_CNN_INLINE void zero_vector(To* out) {
  if constexpr (sizeof(To) == 2) {
    store_half_words(out, HalfWords{});
  } else {
    store(out, Vec<To>{});
  }
}

// Of the rows that are packed together, more than a hardware prefetcher follows, what is asked for ahead: to
// L2, as L1 has few sets for rows a multiple of 2 KiB apart.
template <class T>
constexpr int64_t kAhead = 512 / sizeof(T);
constexpr int64_t kRowsAhead = 16;  // where a row is a line or two, far from the next

// May write up to a vector behind out + count; reads nothing at or behind `end`.
template <class T, class To>
CUDA_CNN_INLINE void copy_channels(const T* from, int64_t count, const T* end, To* out) {
  constexpr int kWidth = kLanes<T>;
  if (count < kWidth) return from + kWidth <= end ? copy_vector(from, out) : copy_first(from, count, out);
  for (int64_t c = 0; c + kWidth <= count; c += kWidth) copy_vector(from + c, out + c);
  copy_vector(from + count - kWidth, out + count - kWidth);  // overlaps the one before
}

template <class To>
CUDA_CNN_INLINE void zero_channels(int64_t count, To* out) {
  for (int64_t c = 0; c < count; c += kLanes<To>) zero_vector(out + c);
}

// A row of taps from column w0 on, of which not all are inside the image.
template <class T, class To>
void copy_clipped(const Gather<T>& g, const T* from, int64_t w0, const T* end, To* out) {
  const int64_t depth = g.S * g.channels, left = min64(max64(-w0, 0), g.S) * g.channels;
  const int64_t right = max64(min64(g.W - w0, g.S) * g.channels, left);
  if (left > 0) zero_channels(left, out);
  if (left < right) copy_channels(from + left, right - left, end, out + left);
  if (right < depth) zero_channels(depth - right, out + right);
}

// Channels [channel, channel + count) of a pixel through the prologue; writes as copy_channels does.
template <class T, class To>
CUDA_CNN_INLINE void map_channels(const Gather<T>& g, const T* from, int64_t channel, int64_t count,
                                  To* out) {
  using Acc = Accumulator<T>;
  constexpr int kWidth = kLanes<Acc>;
  const Acc* scale = g.scale ? g.scale + channel : nullptr;
  const Acc* shift = g.scale ? g.shift + channel : nullptr;
  int64_t c = 0;
  if (scale && g.relu) {  // most: without a branch a vector
    for (; c + kWidth <= count; c += kWidth) {
      store(out + c, relu(fma(load(from + c), load(scale + c), load(shift + c))));
    }
  }
  for (; c < count; c += kWidth) {
    const int64_t left = count - c;
    const auto values = [&](const auto* p) __attribute__((always_inline)) {
      return left >= kWidth ? load(p + c) : load_first(p + c, left);
    };
    Vec<Acc> value = values(from);
    if (scale) value = fma(value, values(scale), values(shift));
    store(out + c, g.relu ? relu(value) : value);
  }
}

}  // namespace

template <class T, class To>
void pack_positions(const Gather<T>& g, int64_t position, int64_t count, int64_t depth_begin,
                    int64_t depth_end, To* out, int64_t step) {
  const int64_t first_tap = depth_begin / g.channels, first_channel = depth_begin % g.channels;
  const int64_t depth = depth_end - depth_begin, row_depth = g.S * g.channels;
  const bool mapped = g.scale || g.relu;
  // A whole row of taps is one run of memory where neighbouring taps are neighbouring pixels.
  const bool joined = g.tap_w == 1 && g.pixel == g.channels && !mapped && depth_begin % row_depth == 0 &&
                      depth % row_depth == 0;
  const bool narrow = row_depth <= kLanes<T>;
  const int64_t first_row = first_tap / g.S * g.tap_h,
                last_row = first_row + (depth / row_depth - 1) * g.tap_h;

  int64_t q = position % g.Q, p = position / g.Q % g.P, n = position / (g.Q * g.P);
  for (int64_t i = 0; i < count; ++i, out += step) {
    const int64_t h0 = g.base_h + p * g.stride_h, w0 = g.base_w + q * g.stride_w;
    const T* image = g.source + n * g.H * g.W * g.pixel;
    const T* end = image + (g.H * g.W - 1) * g.pixel + g.channels;
    int64_t r = first_tap / g.S, s = first_tap % g.S;
    if (joined) {
      const bool inside = w0 >= 0 && w0 + g.S <= g.W;
      // Short rows are a vector each, for all the positions whose taps are inside the image.
      if (narrow && inside && h0 + first_row >= 0 && h0 + last_row < g.H) {
        const T* from = image + ((h0 + first_row) * g.W + w0) * g.pixel;
        const int64_t to_end = end - kLanes<T> - from - (last_row - first_row) * g.W * g.pixel;
        const int64_t length = min64(min64(count - i, (g.W - g.S - w0) / g.stride_w + 1),
                                     min64(g.Q - q, to_end < 0 ? 0 : to_end / (g.stride_w * g.pixel) + 1));
        if (length > 0) {
          for (int64_t k = 0; k < length; ++k, out += step, from += g.stride_w * g.pixel) {
            const T* row = from;
            for (int64_t d = 0; d < depth; d += row_depth, row += g.tap_h * g.W * g.pixel) {
              copy_vector(row, out + d);
            }
          }
          i += length - 1, q += length - 1, out -= step;
          if (++q == g.Q) {
            q = 0;
            if (++p == g.P) p = 0, ++n;
          }
          continue;
        }
      }
      int64_t h = h0 + r * g.tap_h, at = (h * g.W + w0) * g.pixel;
      for (int64_t d = 0; d < depth; d += row_depth, h += g.tap_h, at += g.tap_h * g.W * g.pixel) {
        if (h < 0 || h >= g.H) {
          zero_channels(row_depth, out + d);
        } else if (inside) {
          copy_channels(image + at, row_depth, end, out + d);
        } else {
          copy_clipped(g, image + at, w0, end, out + d);
        }
      }
    } else {
      int64_t channel = first_channel;
      for (int64_t d = 0, part; d < depth; d += part, channel = 0) {
        part = min64(g.channels - channel, depth - d);
        const int64_t h = h0 + r * g.tap_h, w = w0 + s * g.tap_w;
        if (h >= 0 && h < g.H && w >= 0 && w < g.W) {
          const T* from = image + (h * g.W + w) * g.pixel + channel;
          if (mapped) {
            map_channels(g, from, channel, part, out + d);
          } else {
            copy_channels(from, part, end, out + d);
          }
        } else {
          zero_channels(part, out + d);
        }
        if (++s == g.S) s = 0, ++r;
      }
    }
    if (++q == g.Q) {
      q = 0;
      if (++p == g.P) p = 0, ++n;
    }
  }
}

template <class T, class Acc>
void pack_panel_transposed(const T* rows, int64_t pitch, int64_t columns, int64_t depth, Acc* panel) {
  pack_panel_of_planes(rows, pitch, columns, depth, 1, 0, panel);
}

template <class T, class Acc>
void pack_panel_of_planes(const T* rows, int64_t pitch, int64_t columns, int64_t channels, int64_t taps,
                          int64_t tap_step, Acc* panel) {
  constexpr int kWidth = kLanes<Acc>;
  const int64_t depth = channels * taps;
  Acc* places[kWidth];
  int64_t channel = 0, tap = 0;
  for (int64_t d = 0; d < depth; d += kWidth) {
    const int64_t left = min64(depth - d, kWidth);
    for (int64_t i = 0; i < left; ++i) {
      places[i] = panel + tap * tap_step + channel * kTileColumns<Acc>;
      if (++tap == taps) tap = 0, ++channel;
    }
    for (int j = 0; j < kTileVectors; ++j) {
      Vec<Acc> square[kWidth];
      const T* from = rows + j * kWidth * pitch + d;
      for (int i = 0; i < kWidth; ++i, from += pitch) {
        const bool inside = j * kWidth + i < columns;
        prefetch_to_l2(from + kAhead<T>, 1);
        square[i] = !inside ? Vec<Acc>{} : left == kWidth ? load(from) : load_first(from, left);
      }
      transpose<Acc>(square);
      for (int64_t i = 0; i < left; ++i) store(places[i] + j * kWidth, square[i]);
    }
  }
}

template <class T, class Acc>
void pack_panel(const T* rows, int64_t pitch, int64_t columns, int64_t depth, Acc* panel) {
  constexpr int kWidth = kLanes<Acc>;
  for (int64_t d = 0; d < depth; ++d, rows += pitch, panel += kTileColumns<Acc>) {
    prefetch_to_l2(rows + kRowsAhead * pitch, kTileColumns<Acc>);
    for (int j = 0; j < kTileVectors; ++j) {
      const int64_t left = columns - j * kWidth;
      const T* from = rows + j * kWidth;
      store(panel + j * kWidth, left >= kWidth ? load(from) : left > 0 ? load_first(from, left) : Vec<Acc>{});
    }
  }
}

template <class T>
void unpack_panel_transposed(const Accumulator<T>* panel, int64_t columns, int64_t depth, T* rows,
                             int64_t pitch) {
  unpack_panel_to_planes(panel, columns, depth, 1, 0, rows, pitch);
}

template <class T>
void unpack_panel_to_planes(const Accumulator<T>* panel, int64_t columns, int64_t channels, int64_t taps,
                            int64_t tap_step, T* rows, int64_t pitch) {
  using Acc = Accumulator<T>;
  constexpr int kWidth = kLanes<Acc>;
  const int64_t depth = channels * taps;
  const Acc* places[kWidth];
  int64_t channel = 0, tap = 0;
  for (int64_t d = 0; d < depth; d += kWidth) {
    const int64_t left = min64(depth - d, kWidth);
    for (int64_t i = 0; i < left; ++i) {
      places[i] = panel + tap * tap_step + channel * kTileColumns<Acc>;
      if (++tap == taps) tap = 0, ++channel;
    }
    for (int j = 0; j < kTileVectors && j * kWidth < columns; ++j) {
      Vec<Acc> square[kWidth];
      for (int i = 0; i < kWidth; ++i) square[i] = i < left ? load(places[i] + j * kWidth) : Vec<Acc>{};
      transpose<Acc>(square);
      T* to = rows + j * kWidth * pitch + d;
      for (int64_t i = 0; i < min64(kWidth, columns - j * kWidth); ++i, to += pitch) {
        if (left == kWidth) {
          store(to, square[i]);
        } else {
          store_first(to, square[i], left);
        }
      }
    }
  }
}

#if defined(CUDA_CNN_HAS_PAIRS)
// Not for pairs, of which a tap's are not neighbours there: a caller makes NHWC of the weight.
template <>
void pack_panel_of_planes(const BFloat16*, int64_t, int64_t, int64_t, int64_t, int64_t, Bf16Pair*) {}

// 32 of a row's depth are a vector of 16 pairs, so that a square of pairs is transposed as one of floats.
template <>
void pack_panel_transposed(const BFloat16* rows, int64_t pitch, int64_t columns, int64_t depth,
                           Bf16Pair* panel) {
  constexpr int kWidth = kLanes<Bf16Pair>, kDepth = 2 * kWidth;
  for (int64_t d = 0; d < depth; d += kDepth) {
    const int64_t left = min64(depth - d, kDepth);
    for (int j = 0; j < kTileVectors; ++j) {
      Vec<float> square[kWidth];
      const BFloat16* from = rows + j * kWidth * pitch + d;
      for (int i = 0; i < kWidth; ++i, from += pitch) {
        prefetch_to_l2(from + kAhead<BFloat16>, 1);
        if (j * kWidth + i >= columns) {
          square[i] = Vec<float>{};
        } else if (left == kDepth) {
          square[i] = reinterpret_cast<Vec<float>>(load(reinterpret_cast<const Bf16Pair*>(from)));
        } else {
          BFloat16 first[kDepth] = {};
          for (int64_t k = 0; k < left; ++k) first[k] = from[k];
          square[i] = reinterpret_cast<Vec<float>>(load(reinterpret_cast<const Bf16Pair*>(first)));
        }
      }
      transpose<float>(square);
      for (int64_t i = 0; i < operands<Bf16Pair>(left); ++i) {
        store(panel + (d / 2 + i) * kTileColumns<Bf16Pair> + j * kWidth, reinterpret_cast<Words>(square[i]));
      }
    }
  }
}

void pack_pairs(const BFloat16* even, const BFloat16* odd, int64_t count, Bf16Pair* out) {
  constexpr int kWidth = kLanes<Bf16Pair>;
  int64_t c = 0;
  for (; odd && c + 2 * kWidth <= count; c += 2 * kWidth) zip_rows(even + c, odd + c, out + c);
  for (; c + kWidth <= count; c += kWidth) {
    store(out + c, zip(load_half_words(even + c), odd ? load_half_words(odd + c) : HalfWords{}));
  }
  if (c == count) return;
  BFloat16 rest[2][kWidth] = {};
  for (int64_t k = 0; c + k < count; ++k) {
    rest[0][k] = even[c + k];
    if (odd) rest[1][k] = odd[c + k];
  }
  store(out + c, zip(load_half_words(rest[0]), load_half_words(rest[1])));
}

template <>
void pack_panel(const BFloat16* rows, int64_t pitch, int64_t columns, int64_t depth, Bf16Pair* panel) {
  constexpr int64_t kColumns = kTileColumns<Bf16Pair>;
  int64_t d = 0;
  // Most panels are whole.
  for (; columns >= kColumns && d + 1 < depth; d += 2, rows += 2 * pitch, panel += kColumns) {
    prefetch_to_l2(rows + kRowsAhead * pitch, kColumns);
    prefetch_to_l2(rows + (kRowsAhead + 1) * pitch, kColumns);
    zip_rows(rows, rows + pitch, panel);
  }
  for (; d < depth; d += 2, rows += 2 * pitch, panel += kColumns) {
    pack_pairs(rows, d + 1 < depth ? rows + pitch : nullptr, min64(columns, kColumns), panel);
    for (int64_t c = ceil_div(columns, kLanes<float>) * kLanes<float>; c < kColumns; c += kLanes<float>) {
      store(panel + c, Words{});
    }
  }
}
#endif

#define INSTANTIATE(T)                                                                                \
  template void pack_positions(const Gather<T>&, int64_t, int64_t, int64_t, int64_t, Accumulator<T>*, \
                               int64_t);                                                              \
  template void pack_panel_transposed(const T*, int64_t, int64_t, int64_t, Accumulator<T>*);          \
  template void pack_panel_of_planes(const T*, int64_t, int64_t, int64_t, int64_t, int64_t,           \
                                     Accumulator<T>*);                                                \
  template void pack_panel(const T*, int64_t, int64_t, int64_t, Accumulator<T>*);                     \
  template void unpack_panel_transposed(const Accumulator<T>*, int64_t, int64_t, T*, int64_t);        \
  template void unpack_panel_to_planes(const Accumulator<T>*, int64_t, int64_t, int64_t, int64_t, T*, \
                                       int64_t);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
template void pack_positions(const Gather<BFloat16>&, int64_t, int64_t, int64_t, int64_t, BFloat16*, int64_t);
template void pack_positions(const Gather<Half>&, int64_t, int64_t, int64_t, int64_t, Half*, int64_t);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
