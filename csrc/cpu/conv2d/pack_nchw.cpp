// A row of the matrix is, for positions that are neighbours, a run of a plane. Where neighbours are not so in
// memory (a stride) or not inside (padding), the rows of the image are first laid out as "lines" that have
// both: padded with zeros, and cut into stride_w phases, so that tap s reads the run that begins at
// s*tap_w / stride_w of phase s*tap_w % stride_w.
#include "cpu/conv2d/pack_nchw.h"

#include "cpu/conv2d/prefetch.h"
#include "cpu/workspace.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kPlanesAhead = 4;  // whose lines are asked for: planes are too far apart to be foreseen

struct Run {
  int64_t from, to, count;
};

template <class T>
struct Lines {
  const Gather<T>& g;
  int64_t elements;  // of a padded row of the image, from tap 0 of position 0 on
  int64_t phase;     // elements of a phase, with room for a vector behind those that are read
  int64_t line;      // elements of a line
};

template <class T>
Lines<T> make_lines(const Gather<T>& g) {
  const int64_t elements = (g.Q - 1) * g.stride_w + (g.S - 1) * g.tap_w + 1;
  const int64_t phase = ceil_div(elements, g.stride_w) + 2 * kLanes<T>;
  return {g, elements, phase, phase * g.stride_w};
}

// The stride is a constant so that the compiler sees which lanes go where.
template <int kStride, int kPhases, class Acc>
CUDA_CNN_INLINE void split_by(const Acc* row, int64_t count, Acc* out, int64_t phase) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
    for (int f = 0; f < kPhases; ++f) out[f * phase + i] = row[i * kStride + f];
  }
}

template <class Acc>
void split_phases(const Acc* row, int64_t count, int64_t stride, Acc* out, int64_t phase) {
  if (stride == 2) return split_by<2, 2>(row, count, out, phase);
  if (stride == 4) return split_by<4, 4>(row, count, out, phase);
  for (int64_t f = 0; f < stride; ++f) {
    for (int64_t i = 0; i < count; ++i) out[f * phase + i] = row[i * stride + f];
  }
}

// The line of image row h of a plane; `row` is scratch.
template <class T>
void make_line(const Lines<T>& lines, const T* plane, int64_t h, Accumulator<T>* row, Accumulator<T>* out) {
  using Acc = Accumulator<T>;
  const Gather<T>& g = lines.g;
  if (h < 0 || h >= g.H) {
    for (int64_t i = 0; i < lines.line; ++i) out[i] = 0;
    return;
  }
  Acc* padded = g.stride_w == 1 ? out : row;
  const int64_t left = min64(max64(-g.base_w, 0), lines.elements);
  const int64_t right = max64(left, min64(g.W - g.base_w, lines.elements));
  const T* from = plane + h * g.W + g.base_w;
  prefetch_run(from + left + kPlanesAhead * g.H * g.W, right - left);
  // One tap of a stride: every other element, from where they lie.
  if constexpr (sizeof(T) == sizeof(Acc)) {
    if (g.S == 1 && g.stride_w == 2 && right - left == lines.elements) {
      return split_by<2, 1>(from, g.Q, out, lines.phase);
    }
  }
  int64_t i = 0;
  for (; i < left; ++i) padded[i] = 0;
  for (; i + kLanes<T> <= right; i += kLanes<T>) store(padded + i, load(from + i));
  for (; i < right; ++i) padded[i] = widen(from[i]);
  for (; i < lines.elements; ++i) padded[i] = 0;
  const int64_t count = ceil_div(lines.elements, g.stride_w);
  for (; i < count * g.stride_w; ++i) padded[i] = 0;
  if (g.stride_w > 1) split_phases(padded, count, g.stride_w, out, lines.phase);
}

// In order, so that what a run writes behind its end is written again by the next, or by the next row.
template <class T>
CUDA_CNN_INLINE void copy_runs(const T* from, const T* end, const Run* runs, int64_t count,
                               Accumulator<T>* out) {
  for (const Run* run = runs; run < runs + count; ++run) {
    for (int64_t i = 0; i < run->count; i += kLanes<T>) {
      const T* source = from + run->from + i;
      store(out + run->to + i, source + kLanes<T> <= end ? load(source) : load_first(source, run->count - i));
    }
  }
}

}  // namespace

template <class T>
void pack_planes(const Gather<T>& g, const T* end, int64_t position, int64_t count, int64_t depth_begin,
                 int64_t depth_end, const PositionPanels<Accumulator<T>>& out) {
  using Acc = Accumulator<T>;
  const bool as_it_lies = g.R * g.S == 1 && g.stride_h == 1 && g.stride_w == 1 && g.base_h == 0 &&
                          g.base_w == 0 && g.P == g.H && g.Q == g.W;
  const Lines<T> lines = make_lines(g);
  const int64_t plane = g.H * g.W, image = plane * g.pixel;
  // Positions that follow each other in memory, and what lies between the first of them.
  const int64_t row = as_it_lies ? plane : g.Q, row_step = as_it_lies ? image : lines.line;
  const int64_t first = position / row, rows = (position + count - 1) / row - first + 1;

  Run* runs = workspace<Run>(Workspace::kD, count);
  int64_t run_count = 0;
  for (int64_t i = 0, length; i < count; i += length) {
    const int64_t at = position + i, q = at % row;
    length = min64(count - i, min64(row - q, out.width - i % out.width));
    const int64_t from = (at / row - (as_it_lies ? 0 : first)) * row_step + q;
    runs[run_count++] = {from, i / out.width * out.panel_step + i % out.width, length};
  }

  Acc* line = as_it_lies ? nullptr : workspace<Acc>(Workspace::kLines, rows * lines.line + lines.line);
  Acc* const scratch = line + (as_it_lies ? 0 : rows * lines.line);
  int64_t c = depth_begin / (g.R * g.S), r = depth_begin / g.S % g.R, s = depth_begin % g.S;
  Acc* to = out.data;
  for (int64_t d = depth_begin; d < depth_end; ++d, to += out.row_step) {
    const T* channel = g.source + c * plane;
    if (as_it_lies) {
      for (const Run* run = runs; run < runs + run_count; ++run) {
        prefetch_run(channel + run->from + kPlanesAhead * plane, run->count);
      }
      copy_runs(channel, end, runs, run_count, to);
      ++c;
      continue;
    }
    if (s == 0 || d == depth_begin) {
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t n = (first + i) / g.P, p = (first + i) % g.P;
        make_line(lines, channel + n * image, g.base_h + p * g.stride_h + r * g.tap_h, scratch,
                  line + i * lines.line);
      }
    }
    const Acc* tap = line + s * g.tap_w % g.stride_w * lines.phase + s * g.tap_w / g.stride_w;
    copy_runs<Acc>(tap, scratch + lines.line, runs, run_count, to);
    if (++s == g.S) {
      s = 0;
      if (++r == g.R) r = 0, ++c;
    }
  }
}

#define INSTANTIATE(T)                                                                      \
  template void pack_planes(const Gather<T>&, const T*, int64_t, int64_t, int64_t, int64_t, \
                            const PositionPanels<Accumulator<T>>&);
INSTANTIATE(float)
INSTANTIATE(double)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
