// Input and weight in blocks of pixels (space to depth), for channels that do not fill 16-byte packs: stems
// above all.
//
//   input   z[n][i][j][g][(u, v, c)] = x[n][i*bh - pad_h + u][j*bw - pad_w + v][g*C/groups + c]
//   weight  [k][r][s][(u, v, c)]     = w[k][r*bh + u][s*bw + v][c]
//
// for u < bh and v < bw, with zeros outside of x and of the filter, and up to whole packs. y = z * w then has
// no padding, and stride 1 where the blocks are as large as the stride (block_axis): AlexNet's 11x11/4 on 3
// channels becomes 3x3 on 48, ResNet's 7x7/2 a 4x4 on 12. The prologue is applied here, before the zeros. The
// gradient of the weight comes out in the same order and is brought back while its splits are added.
#include "cuda/conv2d/kernels.h"
#include "cuda/conv2d/load.cuh"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda::conv2d {
namespace {

constexpr int kBlock = 256;

// Numbers below 2^31 throughout (plan.cu), but for offsets in memory.
struct Rearrangement {
  const void* x;
  void* z;
  int64_t pixel;  // elements from one pixel of x to the next
  BlockedPixels blocks;
  FastDivide packs;                  // of a group's cell
  FastDivide groups, columns, rows;  // of z
  Prologue prologue;
};

// One pack of z a thread.
template <class T>
__global__ void __launch_bounds__(kBlock)
    rearrange_pixels(const __grid_constant__ Rearrangement p, int64_t packs) {
  constexpr int kPack = kPackSize<T>;
  const int64_t thread = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (thread >= packs) return;
  const uint32_t i = static_cast<uint32_t>(thread);
  const uint32_t cell = p.packs.quotient(i), at = p.groups.quotient(cell);
  const int group = cell - at * p.groups.divisor;
  const PixelIndex z = pixel_index(at, p.rows, p.columns);
  const T* image = static_cast<const T*>(p.x) + int64_t{z.image} * p.blocks.height * p.blocks.width * p.pixel;
  const int first = static_cast<int>(i - cell * p.packs.divisor) * kPack;
  Pack<T, kPack> pack;
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const BlockedPixels::Element from = p.blocks.locate(z.i, z.j, first + e);
    T value = zero_of<T>();
    if (from.exists) {
      const int channel = group * p.blocks.channels() + from.c;
      value = image[(int64_t{from.row} * p.blocks.width + from.column) * p.pixel + channel];
      if (p.prologue.any()) value = narrow_fast<T>(mapped<T>(p.prologue, widen_fast(value), channel));
    }
    pack.elements[e] = value;
  }
  store_pack(static_cast<T*>(p.z) + thread * kPack, pack);
}

// One pack a thread.
template <class T>
__global__ void __launch_bounds__(kBlock)
    rearrange_filters(FilterBlocks f, int64_t filters, const T* __restrict__ weight, T* __restrict__ packed) {
  constexpr int kPack = kPackSize<T>;
  const int64_t i = (int64_t{blockIdx.x} * kBlock + threadIdx.x) * kPack;
  if (i >= filters * f.length()) return;
  const int64_t k = i / f.length();
  Pack<T, kPack> pack;
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    const int64_t from = f.from_blocks(i % f.length() + e);
    pack.elements[e] = from < 0 ? zero_of<T>() : weight[k * f.own_length() + from];
  }
  store_pack(packed + i, pack);
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    add_rearranged(FilterBlocks f, int64_t filters, int splits, const Accumulator<T>* __restrict__ sums,
                   T* __restrict__ out) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i >= filters * f.own_length()) return;
  const int64_t k = i / f.own_length(), at = k * f.length() + f.to_blocks(i % f.own_length());
  Accumulator<T> sum = sums[at];
  for (int split = 1; split < splits; ++split) sum += sums[split * filters * f.length() + at];
  out[i] = narrow_fast<T>(sum);
}

FilterBlocks filter_blocks(const Conv2dParams& p, const Plan& plan) {
  return {int(p.R), int(p.S), int(p.C / p.groups), plan.block_h, plan.block_w, plan.channels};
}

}  // namespace

void rearrange_input(const Conv2dParams& p, const Plan& plan, void* source, Stream stream) {
  Rearrangement r{};
  r.x = p.x, r.z = source, r.pixel = p.x_pixel;
  r.blocks = BlockedPixels::of(p, plan.block_h, plan.block_w);
  r.packs = FastDivide::by(plan.channels * element_size(p.dtype) / 16);
  r.groups = FastDivide::by(p.groups);
  r.rows = FastDivide::by(plan.block_h.extent), r.columns = FastDivide::by(plan.block_w.extent);
  r.prologue = {p.in_scale, p.in_shift, p.in_relu};
  const int64_t packs = plan.source_bytes / 16;
  dispatch_dtype(p.dtype, [&](auto type) {
    launch(rearrange_pixels<decltype(type)>, ceil_div(packs, kBlock), kBlock, 0, stream, r, packs);
  });
}

void rearrange_weight(const Conv2dParams& p, const Plan& plan, void* packed, Stream stream) {
  const FilterBlocks f = filter_blocks(p, plan);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(rearrange_filters<T>, ceil_div(p.K * f.length() / kPackSize<T>, kBlock), kBlock, 0, stream, f, p.K,
           static_cast<const T*>(p.weight), static_cast<T*>(packed));
  });
}

void add_rearranged_splits(const Conv2dParams& p, const Plan& plan, const void* sums, Stream stream) {
  const FilterBlocks f = filter_blocks(p, plan);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(add_rearranged<T>, ceil_div(p.K * f.own_length(), kBlock), kBlock, 0, stream, f, p.K, plan.splits,
           static_cast<const Accumulator<T>*>(sums), static_cast<T*>(p.dweight));
  });
}

}  // namespace cuda_cnn::cuda::conv2d
