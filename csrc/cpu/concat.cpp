// Concatenation on the CPU: copies, row by row of the output, so that it is written from front to back once.
// Threads share the rows, and long rows (NCHW: an image) by pieces.
#include "kernels/concat.h"

#include "cpu/parallel.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kPieceBytes = 64 << 10;

// The bytes [begin, end) of an output row.
void copy_piece(const ConcatParams& params, int64_t row, int64_t begin, int64_t end) {
  char* output = static_cast<char*>(params.output) + row * params.row_stride;
  for (int64_t k = 0; k < params.count; ++k) {
    const ConcatPart& part = params.parts[k];
    const int64_t from = max64(begin, part.offset), to = min64(end, part.offset + part.bytes);
    if (from >= to) continue;
    const char* input = static_cast<const char*>(part.data) + row * part.row_stride;
    memcpy(output + from, input + (from - part.offset), to - from);
  }
}

}  // namespace

void concat(const ConcatParams& params) {
  const ConcatPart& last = params.parts[params.count - 1];
  const int64_t row_bytes = last.offset + last.bytes, pieces = ceil_div(row_bytes, kPieceBytes);
  const int64_t grain = ceil_div(kPieceBytes, min64(row_bytes, kPieceBytes));
  parallel_for(params.rows * pieces, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % pieces * kPieceBytes;
      copy_piece(params, task / pieces, first, min64(first + kPieceBytes, row_bytes));
    }
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
