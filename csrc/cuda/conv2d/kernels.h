// The kernels behind the three launchers, each compiled for every element type in the file named.
#pragma once

#include "cuda/conv2d/plan.h"

namespace cuda_cnn::cuda::conv2d {

// product_<type>.cu
template <class T>
void correlate_product(const Correlation& problem, const Plan& plan, Stream stream);
template <class T>
void weight_gradient_product(const WeightGradient& problem, const Plan& plan, Stream stream);

// pack.cu: the weight's rows as forward passes and input gradients read them; the sums of splits.
void pack_forward_weight(const Conv2dParams& params, const Plan& plan, void* packed, Stream stream);
void pack_input_grad_weight(const Conv2dParams& params, const Plan& plan, void* packed, Stream stream);
void add_splits(const Conv2dParams& params, int splits, const void* sums, Stream stream);

// rearrange.cu: the same for an input in blocks of pixels, and that input.
void rearrange_input(const Conv2dParams& params, const Plan& plan, void* source, Stream stream);
void rearrange_weight(const Conv2dParams& params, const Plan& plan, void* packed, Stream stream);
void add_rearranged_splits(const Conv2dParams& params, const Plan& plan, const void* sums, Stream stream);

// channel_sums.cu
struct ColumnPartials {
  void* data;    // [part][channel][sum, M2]
  int64_t rows;  // pixels of a part; the last one may have fewer
};
void finish_statistics(const Conv2dParams& params, const ColumnPartials& partials, Stream stream);
void output_statistics(const Conv2dParams& params, void* workspace, Stream stream);
void bias_gradient(const Conv2dParams& params, void* workspace, Stream stream);

// direct.cu, depthwise.cu, few_channels.cu; vectors: four neighbouring outputs may be read and written at
// once
void direct_forward(const Conv2dParams& params, Stream stream);
void direct_input_grad(const Conv2dParams& params, Stream stream);
void direct_weight_grad(const Conv2dParams& params, Stream stream);
void depthwise_forward(const Conv2dParams& params, Stream stream);
void depthwise_input_grad(const Conv2dParams& params, Stream stream);
void depthwise_weight_grad(const Conv2dParams& params, const Plan& plan, Stream stream);
void few_channels_forward(const Conv2dParams& params, bool vectors, Stream stream);
void few_channels_input_grad(const Conv2dParams& params, bool vectors, Stream stream);
void few_channels_weight_grad(const Conv2dParams& params, const Plan& plan, Stream stream);

}  // namespace cuda_cnn::cuda::conv2d
