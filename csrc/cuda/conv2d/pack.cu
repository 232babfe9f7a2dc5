// The weight as the products read it: for each column of the result one row (r, s, channel), of whole 16-byte
// packs.
//
//   forward         the weight's own rows, with zeros up to a whole pack
//   input gradient  rows of input channels: for each phase its taps, and the output channels in turn
//
// and the sum of a weight gradient's splits, in the order of their numbers.
#include "cuda/conv2d/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda::conv2d {
namespace {

constexpr int kBlock = 256;
constexpr int kSquare = 32;

template <class T>
__global__ void __launch_bounds__(kBlock) pad_rows(int64_t rows, int64_t length, int64_t padded,
                                                   const T* __restrict__ source, T* __restrict__ packed) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i >= rows * padded) return;
  const int64_t row = i / padded, column = i % padded;
  packed[i] = column < length ? source[row * length + column] : narrow<T>(0);
}

// The taps of one phase along one axis.
struct PhaseTaps {
  int first, step, count;
};

struct Transposition {
  PhaseTaps h[kMaxPhases], w[kMaxPhases];
  int phases_w, phases_of_row, groups;
  int taps, R, S, group_c, group_k;  // taps: the grid's, of the phase that has most
  int64_t weight_row, weight_phase;
};

template <class T>
struct SquareShared {
  T square[kSquare][kSquare + 1];  // rows begin in different banks
};

// A block moves 32 output channels x 32 input channels of one tap of one phase and group.
template <class T>
__global__ void __launch_bounds__(kBlock)
    transpose_weight(const __grid_constant__ Transposition p, const T* __restrict__ weight,
                     T* __restrict__ packed) {
  auto& shared = shared_storage<SquareShared<T>>();
  const int group = blockIdx.z % p.groups, phase = blockIdx.z / p.groups;
  const PhaseTaps &h = p.h[phase / p.phases_w], &w = p.w[phase % p.phases_w];
  const int tap = blockIdx.y;
  if (tap >= h.count * w.count) return;
  const int r = h.first + tap / w.count * h.step, s = w.first + tap % w.count * w.step;
  const int squares = (p.group_c + kSquare - 1) / kSquare;
  const int first_c = blockIdx.x % squares * kSquare, first_k = blockIdx.x / squares * kSquare;
  const int lane = threadIdx.x % kSquare;
  for (int i = threadIdx.x / kSquare; i < kSquare; i += kBlock / kSquare) {
    const int64_t k = group * p.group_k + first_k + i;
    if (first_k + i < p.group_k && first_c + lane < p.group_c) {
      shared.square[i][lane] = weight[((k * p.R + r) * p.S + s) * p.group_c + first_c + lane];
    }
  }
  __syncthreads();
  T* out = packed + ((phase / p.phases_w) * p.phases_of_row + phase % p.phases_w) * p.weight_phase;
  for (int i = threadIdx.x / kSquare; i < kSquare; i += kBlock / kSquare) {
    const int64_t c = group * p.group_c + first_c + i;
    if (first_c + i < p.group_c && first_k + lane < p.group_k) {
      out[c * p.weight_row + int64_t{tap} * p.group_k + first_k + lane] = shared.square[lane][i];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kBlock)
    add_all(int64_t count, int splits, const Accumulator<T>* __restrict__ sums, T* __restrict__ out) {
  const int64_t i = int64_t{blockIdx.x} * kBlock + threadIdx.x;
  if (i >= count) return;
  Accumulator<T> sum = sums[i];
  for (int split = 1; split < splits; ++split) sum += sums[split * count + i];
  out[i] = narrow_fast<T>(sum);
}

PhaseTaps phase_taps(int64_t phase, int64_t in, int64_t kernel, int64_t stride, int64_t pad,
                     int64_t dilation) {
  const Conv2dPhase of = conv2d_phase(phase, in, kernel, stride, pad, dilation);
  return {int(of.tap), int(of.tap_step), int(of.taps)};
}

// A block of at most kMaxPhases x kMaxPhases phases from (first_h, first_w) on.
template <class T>
void transpose_phases(const Conv2dParams& p, const Plan& plan, int64_t first_h, int64_t first_w, T* packed,
                      Stream stream) {
  Transposition t{};
  const int phases_h = static_cast<int>(min64(kMaxPhases, p.stride_h - first_h));
  t.phases_w = static_cast<int>(min64(kMaxPhases, p.stride_w - first_w));
  t.phases_of_row = static_cast<int>(p.stride_w);
  t.groups = static_cast<int>(p.groups);
  t.R = int(p.R), t.S = int(p.S), t.group_c = int(p.C / p.groups), t.group_k = int(p.K / p.groups);
  t.weight_row = plan.weight_row, t.weight_phase = plan.weight_phase;
  int taps_h = 0, taps_w = 0;
  for (int i = 0; i < phases_h; ++i) {
    t.h[i] = phase_taps(first_h + i, p.H, p.R, p.stride_h, p.pad_h, p.dilation_h);
    taps_h = taps_h > t.h[i].count ? taps_h : t.h[i].count;
  }
  for (int i = 0; i < t.phases_w; ++i) {
    t.w[i] = phase_taps(first_w + i, p.W, p.S, p.stride_w, p.pad_w, p.dilation_w);
    taps_w = taps_w > t.w[i].count ? taps_w : t.w[i].count;
  }
  // The grid's y holds at most 65535 taps; choose_method leaves larger filters to the direct kernel.
  const Grid grid(ceil_div(t.group_c, kSquare) * ceil_div(t.group_k, kSquare), taps_h * taps_w,
                  p.groups * phases_h * t.phases_w);
  launch(transpose_weight<T>, grid, kBlock, sizeof(SquareShared<T>), stream, t,
         static_cast<const T*>(p.weight), packed + (first_h * p.stride_w + first_w) * plan.weight_phase);
}

}  // namespace

void pack_forward_weight(const Conv2dParams& p, const Plan& plan, void* packed, Stream stream) {
  const int64_t blocks = ceil_div(p.K * plan.weight_row, kBlock);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(pad_rows<T>, blocks, kBlock, 0, stream, p.K, p.R * p.S * (p.C / p.groups), plan.weight_row,
           static_cast<const T*>(p.weight), static_cast<T*>(packed));
  });
}

void pack_input_grad_weight(const Conv2dParams& p, const Plan& plan, void* packed, Stream stream) {
  // Phases with fewer taps, and rows that do not fill their last pack, end in zeros.
  if (plan.weight_row != p.R * p.S * (p.K / p.groups)) {
    check(cudaMemsetAsync(packed, 0, plan.packed_bytes, static_cast<cudaStream_t>(stream)),
          "conv2d: clearing weights");
  }
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t h = 0; h < p.stride_h; h += kMaxPhases) {
      for (int64_t w = 0; w < p.stride_w; w += kMaxPhases) {
        transpose_phases(p, plan, h, w, static_cast<T*>(packed), stream);
      }
    }
  });
}

void add_splits(const Conv2dParams& p, int splits, const void* sums, Stream stream) {
  const int64_t count = p.K * p.R * p.S * (p.C / p.groups);
  dispatch_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    launch(add_all<T>, ceil_div(count, kBlock), kBlock, 0, stream, count, splits,
           static_cast<const Accumulator<T>*>(sums), static_cast<T*>(p.dweight));
  });
}

}  // namespace cuda_cnn::cuda::conv2d
