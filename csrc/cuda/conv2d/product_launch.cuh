// Starts the implicit products for one element type: which of the compiled tiles and loads the plan names.
// Instances for a type on tensor cores: three tiles of asynchronous loads, and one each of the two rarer
// loads.
#pragma once

#include "cuda/conv2d/correlate.cuh"
#include "cuda/conv2d/kernels.h"
#include "cuda/conv2d/weight_grad.cuh"

namespace cuda_cnn::cuda::conv2d {

template <class Product, Load kLoad>
void start(const Correlation& p, Stream stream) {
  int64_t rows = 0;
  for (int i = 0; i < p.phases_h; ++i) {
    for (int j = 0; j < p.phases_w; ++j) rows = max64(rows, int64_t{p.images} * p.h[i].count * p.w[j].count);
  }
  const int64_t tiles = ceil_div(rows, Product::kTileRows) * ceil_div(p.columns, Product::kTileColumns);
  launch(correlate<Product, kLoad>, {tiles, 1, int64_t{p.groups} * p.phases_h * p.phases_w}, kThreads,
         sizeof(CorrelateShared<Product>), stream, p);
}

template <class Product, Load kLoad>
void start(const WeightGradient& p, Stream stream) {
  const int64_t columns = int64_t{p.h.taps} * p.w.taps * p.x.channels;
  const int64_t tiles = ceil_div(p.rows, Product::kTileRows) * ceil_div(columns, Product::kTileColumns);
  launch(weight_gradient<Product, kLoad>, {tiles, p.splits, p.groups}, kThreads,
         sizeof(WeightGradShared<Product>), stream, p);
}

template <class T, int kRows, int kColumns>
using CorrelateTensor = TensorCoreProduct<T, ReductionRows<T>, ReductionRows<T>, kRows, kColumns>;
template <class T, int kRows, int kColumns>
using CorrelateFma = FmaProduct<T, ReductionRows<T>, ReductionRows<T>, kRows, kColumns>;
template <class T, int kRows, int kColumns>
using GradientTensor =
    TensorCoreProduct<T, ReductionColumns<T, kRows>, ReductionColumns<T, kColumns>, kRows, kColumns>;
template <class T, int kRows, int kColumns>
using GradientFma = FmaProduct<T, ReductionColumns<T, kRows>, ReductionColumns<T, kColumns>, kRows, kColumns>;

template <class T>
void correlate_tensor_cores(const Correlation& p, const Plan& plan, Stream stream) {
  if (plan.load == Load::kScalar) return start<CorrelateTensor<T, 128, 64>, Load::kScalar>(p, stream);
  if (plan.load == Load::kMapped) return start<CorrelateTensor<T, 128, 64>, Load::kMapped>(p, stream);
  if (plan.tile_columns == 128) return start<CorrelateTensor<T, 128, 128>, Load::kAsync>(p, stream);
  if (plan.tile_rows == 128) return start<CorrelateTensor<T, 128, 64>, Load::kAsync>(p, stream);
  start<CorrelateTensor<T, 64, 64>, Load::kAsync>(p, stream);
}

template <class T>
void weight_gradient_tensor_cores(const WeightGradient& p, const Plan& plan, Stream stream) {
  if (plan.load == Load::kScalar) return start<GradientTensor<T, 64, 64>, Load::kScalar>(p, stream);
  if (plan.load == Load::kMapped) return start<GradientTensor<T, 128, 64>, Load::kMapped>(p, stream);
  if (plan.tile_rows == 128) return start<GradientTensor<T, 128, 128>, Load::kAsync>(p, stream);
  start<GradientTensor<T, 64, 64>, Load::kAsync>(p, stream);
}

}  // namespace cuda_cnn::cuda::conv2d
