// Concatenation as copies of rows: whatever the dimension, the layout and the element type, the output is
// `rows` rows of `row_bytes` bytes, and each input fills the same stretch of every row.
//   channels of NHWC: a row is a pixel.   channels of NCHW: a row is an image.
#pragma once

#include "cpu/isa.h"
#include "kernels/host_device.h"

namespace cuda_cnn {

struct ConcatPart {
  const void* data;
  int64_t bytes;       // of one row
  int64_t row_stride;  // bytes from one row to the next: more than `bytes` for a slice of a wider tensor
  int64_t offset;      // where it begins in the output's row
};

struct ConcatParams {
  const ConcatPart* parts;  // host memory; every part has bytes > 0
  int64_t count;
  void* output;
  int64_t rows;
  int64_t row_stride;  // of the output: row_bytes, or more when it is a slice
  int64_t alignment;   // the largest of 1, 2, 4, 8, 16 that divides every address, stride, offset and length
};

namespace cuda {
void concat(const ConcatParams& params, Stream stream);
}  // namespace cuda

}  // namespace cuda_cnn

CUDA_CNN_CPU_KERNEL(concat, ConcatParams)
