// The algorithms behind the three launchers of kernels/conv2d.h, each for the element type T.
#pragma once

#include "cpu/parallel.h"
#include "cpu/vec.h"
#include "cpu/workspace.h"
#include "kernels/conv2d.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// conv2d/reference.cpp: the formula, one loop an index.
template <class T>
void forward_reference(const Conv2dParams& p);
template <class T>
void input_grad_reference(const Conv2dParams& p);
template <class T>
void weight_grad_reference(const Conv2dParams& p);

// conv2d/passes.cpp, weight_grad.cpp: implicit matrix products. The weight
// gradient's takes NCHW too.
template <class T>
void forward_gemm(const Conv2dParams& p);
template <class T>
void input_grad_gemm(const Conv2dParams& p);
template <class T>
void weight_grad_gemm(const Conv2dParams& p);

// conv2d/gemm_nchw.cpp: the same for NCHW. Its input gradient is that of 1x1 filters of stride 1.
template <class T>
void forward_gemm_nchw(const Conv2dParams& p);
template <class T>
void input_grad_gemm_nchw(const Conv2dParams& p);

// conv2d/few_channels_forward.cpp, few_channels.cpp, few_channels_weight_grad.cpp: one group of less than a
// vector of channels.
template <class T>
void forward_few_channels(const Conv2dParams& p);
template <class T>
void input_grad_few_channels(const Conv2dParams& p);
template <class T>
void weight_grad_few_channels(const Conv2dParams& p);

// conv2d/few_pixels.cpp: 1x1, stride 1, one group.
template <class T>
void forward_few_pixels(const Conv2dParams& p);
template <class T>
void input_grad_few_pixels(const Conv2dParams& p);

// conv2d/passes.cpp, winograd_weight_grad.cpp: 3x3 to 5x5 taps and stride 1, or a stride by way of the next.
void forward_winograd(const Conv2dParams& p);
void input_grad_winograd(const Conv2dParams& p);
void weight_grad_winograd(const Conv2dParams& p);

// conv2d/winograd_blocks.cpp: as many blocks of taps, of a larger stride; one group.
void forward_winograd_blocks(const Conv2dParams& p);
void weight_grad_winograd_blocks(const Conv2dParams& p);

// conv2d/depthwise.cpp, depthwise_weight_grad.cpp: groups of a vector of channels at most, as many filters.
template <class T>
void forward_depthwise(const Conv2dParams& p);
template <class T>
void input_grad_depthwise(const Conv2dParams& p);
template <class T>
void weight_grad_depthwise(const Conv2dParams& p);

// conv2d/channel_sums.cpp: reductions over pixels.
template <class T>
void bias_grad(const Conv2dParams& p);
template <class T>
void output_statistics(const Conv2dParams& p);

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
