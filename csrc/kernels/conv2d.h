// 2-D convolution (cross-correlation) on NHWC activations and KRSC weights:
//
//   y[n,p,q,k] = bias[k] + sum over r, s, c of  w[k,r,s,c] * x[n, h, w, g*C/groups + c],  c in [0, C/groups)
//
// with h = p*stride_h + r*dilation_h - pad_h, w = q*stride_w + s*dilation_w - pad_w, g = k / (K/groups), and
// x = 0 outside the image. Its gradients, for dy = dL/dy:
//
//   dx[n,h,w,c] = sum over k, r, s of  w[k,r,s,c] * dy[n,p,q,k],  for the p and q that h and w stem from
//   dw[k,r,s,c] = sum over n, p, q of  dy[n,p,q,k] * x[n,h,w,c]
//   db[k]       = sum over n, p, q of  dy[n,p,q,k]
//
// Each launcher reads and writes what its line below names; the other pointers may be null.
// Extents of 0 are legal: an empty sum is 0.
#pragma once

#include "cpu/isa.h"
#include "kernels/host_device.h"

namespace cuda_cnn {

// The algorithms of csrc/cpu/conv2d, fastest first where they apply; kAuto leaves it to choose().
enum class Conv2dAlgorithm : int32_t {
  kAuto,
  kWinograd,
  kDepthwise,
  kGemmNchw,
  kFewPixels,
  kFewChannels,
  kGemm,
  kReference
};
enum class Conv2dDirection : int32_t { kForward, kInputGrad, kWeightGrad };

struct Conv2dParams {
  DType dtype;         // of x, weight, bias, y, residual and of their gradients
  int64_t N, H, W, C;  // x
  int64_t K, R, S;     // weight (K, R, S, C/groups), contiguous in this order
  int64_t P, Q;        // y (N, P, Q, K); given, so that padding below and right may differ from pad_h, pad_w
  int64_t stride_h, stride_w;
  int64_t pad_h, pad_w;  // above and on the left; may be negative
  int64_t dilation_h, dilation_w;
  int64_t groups;

  const void* x;  // channels contiguous; pixels x_pixel elements apart, rows W and images H*W pixels apart
  const void* weight;
  const void* bias;  // K, or null
  const void* dy;    // as y
  void* y;           // pixels y_pixel elements apart
  void* dx;          // pixels x_pixel elements apart
  void* dweight;     // dweight or dbias may be null: it is not wanted
  void* dbias;
  int64_t x_pixel;  // >= C: a channel slice of a wider buffer is a pointer and a pixel stride
  int64_t y_pixel;

  // Fused forms, forward. Padding is zero after the prologue. Vectors are float (double for float64), or
  // null.
  const void* in_scale;  // x <- in_scale[c] * x + in_shift[c]
  const void* in_shift;
  bool in_relu;          // x <- max(x, 0)
  bool relu;             // y <- max(y + residual, 0)
  const void* packed;    // CPU, forward: the weight as conv2d_pack lays it out, or null
  const void* residual;  // as y, pixels residual_pixel elements apart, or null
  int64_t residual_pixel;
  void* mean;  // K: of y over its pixels, and the biased variance; or null
  void* variance;

  // CPU, Winograd's algorithm: weight, or dweight, is (K, C/groups, R, S) contiguous, the rest as ever.
  bool weight_planes;
  // CPU: x, dy, y and dx are NCHW, weight and dweight (K, C/groups, R, S), all contiguous. Of the algorithms
  // only kGemmNchw computes so: a caller asks conv2d_choose, and else makes NHWC of them and clears this.
  bool nchw;
  Conv2dAlgorithm algorithm;  // forced, or kAuto
  bool allow_winograd;        // it rounds otherwise than a direct sum
  bool allow_tf32;            // CUDA, float32: torch.backends.cudnn.conv.fp32_precision
  void* workspace;            // CUDA: conv2d_workspace_bytes, from torch's allocator
};

// to[i][column][row] = from[i][row][column]: NCHW to NHWC with rows = C, columns = H*W, and back.
struct Conv2dTransposeParams {
  DType dtype;
  int64_t count, rows, columns;
  const void* from;
  void* to;
};

// Extent of the output along one axis; 0 where the kernel does not fit.
HOST_DEVICE int64_t conv2d_output_extent(int64_t in, int64_t pad_both, int64_t kernel, int64_t stride,
                                         int64_t dilation) {
  const int64_t room = in + pad_both - (dilation * (kernel - 1) + 1);
  return room < 0 ? 0 : room / stride + 1;
}

// The input row (column) that tap r reads for output row p; it may lie outside the image.
HOST_DEVICE int64_t conv2d_input_index(int64_t p, int64_t r, int64_t stride, int64_t pad, int64_t dilation) {
  return p * stride + r * dilation - pad;
}

// A strided input gradient falls into stride_h * stride_w phases, each a correlation of stride 1. On an axis:
//   dx[first + i*stride] = sum over j in [0, taps) of  w[tap + j*tap_step] * dy[base + i - j*dy_step]
// for 0 <= i < count, with dy = 0 outside its extent. taps == 0: the phase is zero.
struct Conv2dPhase {
  int64_t first, count;
  int64_t tap, tap_step, taps;
  int64_t base, dy_step;
};

HOST_DEVICE Conv2dPhase conv2d_phase(int64_t phase, int64_t in, int64_t kernel, int64_t stride, int64_t pad,
                                     int64_t dilation) {
  int64_t gcd = stride, rest = dilation;
  while (rest) {
    const int64_t next = gcd % rest;
    gcd = rest;
    rest = next;
  }
  const int64_t count = in > phase ? (in - phase - 1) / stride + 1 : 0;
  Conv2dPhase out{phase, count, 0, stride / gcd, 0, 0, dilation / gcd};
  // Tap r meets row h where h + pad - r*dilation is a multiple of stride. The first r is below stride/gcd.
  const int64_t last = min64(out.tap_step, kernel);
  while (out.tap < last && (phase + pad - out.tap * dilation) % stride != 0) ++out.tap;
  if (out.tap < last) {
    out.taps = (kernel - out.tap - 1) / out.tap_step + 1;
    out.base = (phase + pad - out.tap * dilation) / stride;
  }
  return out;
}

// The prologue's map of one input element.
template <class Acc>
HOST_DEVICE Acc conv2d_prologue(Acc x, Acc scale, Acc shift, bool relu) {
  const Acc mapped = x * scale + shift;
  return relu && mapped < 0 ? Acc(0) : mapped;
}

namespace cuda {
int64_t conv2d_workspace_bytes(Conv2dDirection direction, const Conv2dParams& params);
void conv2d_forward(const Conv2dParams& params, Stream stream);      // x, weight, bias, … -> y
void conv2d_input_grad(const Conv2dParams& params, Stream stream);   // dy, weight -> dx
void conv2d_weight_grad(const Conv2dParams& params, Stream stream);  // x, dy -> dweight, dbias
void conv2d_statistics(const Conv2dParams& params, Stream stream);   // y -> mean, variance
}  // namespace cuda

}  // namespace cuda_cnn

CUDA_CNN_CPU_KERNEL(conv2d_forward, Conv2dParams)
CUDA_CNN_CPU_KERNEL(conv2d_input_grad, Conv2dParams)
CUDA_CNN_CPU_KERNEL(conv2d_weight_grad, Conv2dParams)
CUDA_CNN_CPU_KERNEL(conv2d_statistics, Conv2dParams)
CUDA_CNN_CPU_KERNEL(conv2d_transpose, Conv2dTransposeParams)
// weight -> y, in the order and type in which forward's kernels read it: for each group panels of
// conv2d_panel_columns output channels, [R*S*C/groups][columns].
CUDA_CNN_CPU_KERNEL(conv2d_pack, Conv2dParams)

namespace cuda_cnn::cpu {
// A filter as large as its image (LeNet-5's C5, a classifier as a convolution) is a 1x1 one on R*S*C
// channels: such a call as that, any other as it is.
Conv2dParams conv2d_flattened(const Conv2dParams& params);
// The sizes of a call on blocks of stride_h x stride_w pixels, which has stride 1 (winograd_blocks.cpp); one
// of stride 1 as it is.
Conv2dParams conv2d_in_blocks(const Conv2dParams& params);
// The algorithm that a call with these parameters takes: params.algorithm where it applies, else the first
// that does.
Conv2dAlgorithm conv2d_choose(Conv2dDirection direction, const Conv2dParams& params);
const char* conv2d_algorithm_name(Conv2dAlgorithm algorithm);
// Whether conv2d_pack packs the weight, of C, R, S and groups, in pairs of bfloat16 (AVX512-BF16): a panel is
// [R*S*C/groups / 2, rounded up][columns][2].
bool conv2d_packs_pairs(const Conv2dParams& params);
// What a pass on NHWC is to do with a weight, or its gradient, of [K][C/groups][R][S]: make it of NHWC, or
// NHWC of it; pack it (conv2d_pack, with nchw), as forward's kernel would do from NHWC; or give it to a
// kernel that packs or writes it as it is.
enum class Conv2dPlanes { kConvert, kPack, kKeep };
Conv2dPlanes conv2d_planes(Conv2dDirection direction, const Conv2dParams& params);
// Depends on the instruction set.
int64_t conv2d_panel_columns(DType dtype);
}  // namespace cuda_cnn::cpu
