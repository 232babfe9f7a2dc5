"""The index arithmetic of the CUDA products, called on the host and compared with torch's own unfold and fold."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]

SOURCE = """
#include "cuda/conv2d/geometry.h"
using namespace cuda_cnn;
using namespace cuda_cnn::cuda;
using namespace cuda_cnn::cuda::conv2d;

// position[count][taps] of the source, and where output i lies; -1: outside.
static void write(const Axis& axis, int* position, int* output) {
  for (int i = 0; i < axis.count; ++i) {
    output[i] = output_at(axis, i);
    for (int t = 0; t < axis.taps; ++t) {
      const int at = source_at(axis, i, t);
      position[i * axis.taps + t] = inside(at, axis.extent) ? at : -1;
    }
  }
}
extern "C" {
void forward(int in, int out, int kernel, int stride, int pad, int dilation, int* position, int* output) {
  write(forward_axis(in, out, kernel, stride, pad, dilation), position, output);
}
// sizes: count, taps, first tap, its step
void input_grad(int phase, int in, int out, int kernel, int stride, int pad, int dilation, int* sizes, int* position,
                int* output) {
  const Conv2dPhase of = conv2d_phase(phase, in, kernel, stride, pad, dilation);
  const Axis axis = input_grad_axis(of, out, stride);
  sizes[0] = axis.count, sizes[1] = axis.taps, sizes[2] = int(of.tap), sizes[3] = int(of.tap_step);
  write(axis, position, output);
}
void walk(int start, int step, int count, int channels, int taps_w, int* rsc) {
  TapWalk at = TapWalk::at(start, channels, taps_w);
  for (int i = 0; i < count; ++i, at.advance(step, channels, taps_w)) {
    rsc[3 * i] = at.r, rsc[3 * i + 1] = at.s, rsc[3 * i + 2] = at.c;
  }
}
// r, s, c, row, column, offset of each step, 64-bit
void source_walk(int start, int step, int count, int channels, const int* taps, const int* tap, int width,
                 int64_t pixel, int64_t* out) {
  Axis h{}, w{};
  h.taps = taps[0], w.taps = taps[1], h.tap = tap[0], w.tap = tap[1];
  SourceWalk at = SourceWalk::at(start, channels, h, w, width, pixel);
  for (int i = 0; i < count; ++i, at.advance(step, channels, h, w)) {
    const int numbers[] = {at.r, at.s, at.c, at.row, at.column};
    for (int number : numbers) *out++ = number;
    *out++ = at.offset;
  }
}
unsigned quotient(unsigned n, unsigned divisor) { return FastDivide::by(divisor).quotient(n); }
void pixel(int n, int height, int width, int* out) {
  const PixelIndex at = pixel_index(n, FastDivide::by(height), FastDivide::by(width));
  out[0] = at.image, out[1] = at.i, out[2] = at.j;
}
// sizes: H, W, C, R, S, P, Q, groups, stride, padding, dilation (one for both axes), elements in a pack
static Conv2dParams params(const int* n) {
  Conv2dParams p{};
  p.N = 1, p.H = n[0], p.W = n[1], p.C = n[2], p.R = n[3], p.S = n[4], p.P = n[5], p.Q = n[6], p.groups = n[7];
  p.stride_h = p.stride_w = n[8], p.pad_h = p.pad_w = n[9], p.dilation_h = p.dilation_w = n[10];
  return p;
}
static void blocks(const int* n, BlockAxis* h, BlockAxis* w, int* channels) {
  *h = block_axis(n[5], n[3], n[8], n[10]), *w = block_axis(n[6], n[4], n[8], n[10]);
  *channels = int(ceil_div(h->block * w->block * n[2] / n[7], n[11]) * n[11]);
}
// extents, taps and stride along both axes, channels of a group
void block_sizes(const int* n, int* out) {
  BlockAxis h, w;
  blocks(n, &h, &w, out + 6);
  out[0] = h.extent, out[1] = w.extent, out[2] = h.taps, out[3] = w.taps, out[4] = h.stride, out[5] = w.stride;
}
// Numbers of x's elements, NHWC, in z's places; of w's in the rearranged filter's; of the latter in w's. -1: a zero
void block_numbers(const int* n, int* z, int* filter, int* back) {
  BlockAxis h, w;
  int channels;
  blocks(n, &h, &w, &channels);
  const Conv2dParams p = params(n);
  const BlockedPixels pixels = BlockedPixels::of(p, h, w);
  for (int i = 0; i < h.extent; ++i) {
    for (int j = 0; j < w.extent; ++j) {
      for (int g = 0; g < n[7]; ++g) {
        for (int e = 0; e < channels; ++e) {
          const auto from = pixels.locate(i, j, e);
          *z++ = from.exists ? (from.row * n[1] + from.column) * n[2] + g * pixels.channels() + from.c : -1;
        }
      }
    }
  }
  const FilterBlocks f{n[3], n[4], n[2] / n[7], h, w, channels};
  for (int i = 0; i < f.length(); ++i) filter[i] = int(f.from_blocks(i));
  for (int i = 0; i < f.own_length(); ++i) back[i] = int(f.to_blocks(i));
}
void range(int total, int parts, int index, int* out) {
  const Range part = split_range(total, parts, index);
  out[0] = part.begin, out[1] = part.end;
}
}
"""


@pytest.fixture(scope="module")
def geometry(tmp_path_factory) -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "c++").split()
    if shutil.which(compiler[-1]) is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("geometry")
    source, library = folder / "geometry.cpp", folder / "geometry.so"
    source.write_text(SOURCE)
    subprocess.run(
        [*compiler, "-O1", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}", source, "-o", library], check=True
    )
    built = ctypes.CDLL(str(library))
    built.quotient.argtypes = [ctypes.c_uint, ctypes.c_uint]
    built.quotient.restype = ctypes.c_uint
    return built


def integers(count: int) -> ctypes.Array:
    return (ctypes.c_int * max(count, 1))()


# extent of the input, kernel, stride, padding (beyond the kernel too), dilation
AXES = st.tuples(
    st.integers(1, 23), st.integers(1, 7), st.integers(1, 7), st.integers(0, 9), st.integers(1, 5)
)


def output_extent(extent: int, kernel: int, stride: int, pad: int, dilation: int) -> int:
    room = extent + 2 * pad - dilation * (kernel - 1) - 1
    assume(room >= 0)
    return room // stride + 1


def unfolded(extent: int, kernel: int, stride: int, pad: int, dilation: int) -> torch.Tensor:
    """[output][tap]: the number of the input cell that unfold reads, -1 in the padding."""
    cells = torch.arange(1, extent + 1, dtype=torch.float64).view(1, 1, extent, 1)
    columns = torch.nn.functional.unfold(cells, (kernel, 1), (dilation, 1), (pad, 0), (stride, 1))
    return columns[0].T.long() - 1


@given(axis=AXES)
def test_forward_reads_what_unfold_reads(geometry, axis):
    extent, kernel, stride, pad, dilation = axis
    out = output_extent(*axis)
    position, output = integers(out * kernel), integers(out)
    geometry.forward(extent, out, kernel, stride, pad, dilation, position, output)
    assert list(output) == list(range(out))
    assert torch.equal(torch.tensor(position).view(out, kernel), unfolded(*axis))


@given(axis=AXES)
def test_phases_of_the_input_gradient_are_the_transpose_of_unfold(geometry, axis):
    """Each (input cell, output, tap) that unfold joins is met by exactly one phase, and no other is."""
    extent, kernel, stride, pad, dilation = axis
    out = output_extent(*axis)
    expected = {
        (cell, p, tap)
        for p, row in enumerate(unfolded(*axis).tolist())
        for tap, cell in enumerate(row)
        if cell >= 0
    }
    met, written = [], []
    for phase in range(stride):
        sizes, position, output = integers(4), integers(extent * kernel), integers(extent)
        geometry.input_grad(phase, extent, out, kernel, stride, pad, dilation, sizes, position, output)
        count, taps, first, step = sizes
        written += list(output)[:count]
        for i in range(count):
            for j in range(taps):
                if position[i * taps + j] >= 0:
                    met.append((output[i], position[i * taps + j], first + j * step))
    assert sorted(written) == list(range(extent))
    assert len(met) == len(set(met))
    assert set(met) == expected


@given(
    start=st.integers(0, 500),
    step=st.sampled_from([1, 2, 4, 8, 16, 32]),
    channels=st.integers(1, 70),
    taps_w=st.integers(1, 11),
)
def test_a_walk_over_taps_and_channels(geometry, start, step, channels, taps_w):
    out = integers(3 * 20)
    geometry.walk(start, step, 20, channels, taps_w, out)
    for i in range(20):
        flat = start + i * step
        expected = [flat // channels // taps_w, flat // channels % taps_w, flat % channels]
        assert out[3 * i : 3 * i + 3] == expected


@given(
    start=st.integers(0, 500),
    step=st.sampled_from([1, 4, 8, 16, 32]),
    channels=st.integers(1, 70),
    taps=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    tap=st.tuples(st.integers(-5, 5), st.integers(-5, 5)),  # negative: input gradients
    width=st.integers(1, 2**20),
    pixel=st.integers(1, 2**31 - 1),
)
def test_a_walk_over_the_source(geometry, start, step, channels, taps, tap, width, pixel):
    """Offsets in memory far past 2^31 elements."""
    out = (ctypes.c_int64 * (6 * 20))()
    pairs = [(ctypes.c_int * 2)(*pair) for pair in (taps, tap)]
    geometry.source_walk(start, step, 20, channels, *pairs, width, ctypes.c_int64(pixel), out)
    for i in range(20):
        flat = start + i * step
        r, s, c = flat // channels // taps[1], flat // channels % taps[1], flat % channels
        row, column = r * tap[0], s * tap[1]
        assert out[6 * i : 6 * i + 6] == [r, s, c, row, column, (row * width + column) * pixel + c]


@given(
    n=st.one_of(st.integers(0, 2**31 - 1), st.sampled_from([2**31 - 1, 2**31 - 2, 2**30])),
    divisor=st.one_of(st.integers(1, 2**31 - 1), st.integers(1, 300), st.sampled_from([2**30, 2**31 - 1])),
)
def test_division_by_multiplication(geometry, n, divisor):
    for value in {n, n // divisor * divisor, max(n // divisor * divisor - 1, 0)}:
        assert geometry.quotient(value, divisor) == value // divisor


@given(n=st.integers(0, 2**31 - 1), height=st.integers(1, 5000), width=st.integers(1, 5000))
def test_pixel_of_a_number(geometry, n, height, width):
    out = integers(3)
    geometry.pixel(n, height, width, out)
    assert list(out) == [n // width // height, n // width % height, n % width]


@given(
    height=AXES,
    width=st.tuples(st.integers(1, 23), st.integers(1, 7)),
    channels=st.integers(1, 5),
    groups=st.integers(1, 3),
    pack=st.sampled_from([4, 8]),
)
def test_convolution_of_blocks_is_the_convolution(geometry, height, width, channels, groups, pack):
    """Input and filter in blocks of pixels: the same sums, without padding; and the filter's way back."""
    (extent, kernel, stride, pad, dilation), (extent_w, kernel_w) = height, width
    out, out_w = output_extent(*height), output_extent(extent_w, kernel_w, stride, pad, dilation)
    count = channels * groups
    sizes = [extent, extent_w, count, kernel, kernel_w, out, out_w, groups, stride, pad, dilation, pack]
    sizes = (ctypes.c_int * len(sizes))(*sizes)
    new = integers(7)
    geometry.block_sizes(sizes, new)
    rows, columns, taps, taps_w, step, step_w, block_channels = new
    z, filter = integers(rows * columns * groups * block_channels), integers(taps * taps_w * block_channels)
    back = integers(kernel * kernel_w * channels)
    geometry.block_numbers(sizes, z, filter, back)

    x = torch.randint(-8, 9, (extent, extent_w, count), dtype=torch.float64)
    w = torch.randint(-8, 9, (groups, kernel, kernel_w, channels), dtype=torch.float64)  # one filter a group

    def gather(values: torch.Tensor, numbers: ctypes.Array) -> torch.Tensor:
        return torch.cat([values, values.new_zeros(*values.shape[:-1], 1)], -1)[..., torch.tensor(numbers)]

    blocks = gather(x.flatten(), z).view(1, rows, columns, -1).permute(0, 3, 1, 2)
    filters = gather(w.flatten(1), filter).view(groups, taps, taps_w, -1).permute(0, 3, 1, 2)
    actual = torch.nn.functional.conv2d(blocks, filters, None, (step, step_w), 0, dilation, groups)
    expected = torch.nn.functional.conv2d(
        x.permute(2, 0, 1)[None], w.permute(0, 3, 1, 2), None, stride, pad, dilation, groups
    )
    assert torch.equal(actual, expected)
    assert torch.equal(gather(w.flatten(1), filter)[:, torch.tensor(back)], w.flatten(1))


@given(total=st.integers(0, 10_000), parts=st.integers(1, 130))
def test_ranges_cover_everything_once(geometry, total, parts):
    end = 0
    lengths = []
    for index in range(parts):
        out = integers(2)
        geometry.range(total, parts, index, out)
        assert out[0] == end
        end = out[1]
        lengths.append(out[1] - out[0])
    assert end == total
    assert max(lengths) - min(lengths) <= 1
