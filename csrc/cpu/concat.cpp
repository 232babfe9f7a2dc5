// Concatenation on the CPU: copies, row by row of the output, so that it is written from front to back once.
// Short rows (NHWC: a pixel) are taken some at a time, one input after another, so that a run of copies has
// one length; long ones (NCHW: an image) are cut in pieces. Threads share either.
#include "kernels/concat.h"

#include "cpu/parallel.h"
#include "cpu/vec.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {
namespace {

constexpr int64_t kPieceBytes = 32 << 10;
constexpr int64_t kPiecesForThreads = 8;  // one core copies as many while another is told to help

typedef char Bytes __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));

// memcpy without the call, which short runs feel.
CUDA_CNN_INLINE void copy(char* to, const char* from, int64_t bytes) {
  if (bytes < kVectorBytes) {
    memcpy(to, from, bytes);
    return;
  }
  const auto copy_vector = [&](int64_t at) {
    *reinterpret_cast<Bytes*>(to + at) = *reinterpret_cast<const Bytes*>(from + at);
  };
  for (int64_t at = 0; at + kVectorBytes <= bytes; at += kVectorBytes) copy_vector(at);
  copy_vector(bytes - kVectorBytes);  // overlaps the one before
}

// The bytes [begin, end) of one output row.
void copy_piece(const ConcatParams& params, int64_t row, int64_t begin, int64_t end) {
  char* output = static_cast<char*>(params.output) + row * params.row_stride;
  for (int64_t k = 0; k < params.count; ++k) {
    const ConcatPart& part = params.parts[k];
    const int64_t from = max64(begin, part.offset), to = min64(end, part.offset + part.bytes);
    const char* input = static_cast<const char*>(part.data) + row * part.row_stride;
    if (from < to) copy(output + from, input + (from - part.offset), to - from);
  }
}

// Whole rows [begin, end).
void copy_rows(const ConcatParams& params, int64_t begin, int64_t end) {
  for (int64_t k = 0; k < params.count; ++k) {
    const ConcatPart& part = params.parts[k];
    const char* input = static_cast<const char*>(part.data) + begin * part.row_stride;
    char* output = static_cast<char*>(params.output) + begin * params.row_stride + part.offset;
    for (int64_t row = begin; row < end; ++row, input += part.row_stride, output += params.row_stride) {
      copy(output, input, part.bytes);
    }
  }
}

}  // namespace

void concat(const ConcatParams& params) {
  const ConcatPart& last = params.parts[params.count - 1];
  const int64_t row_bytes = last.offset + last.bytes;
  if (row_bytes <= kPieceBytes) {
    const int64_t group = kPieceBytes / row_bytes;
    parallel_for(ceil_div(params.rows, group), kPiecesForThreads, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) copy_rows(params, k * group, min64((k + 1) * group, params.rows));
    });
    return;
  }
  const int64_t pieces = ceil_div(row_bytes, kPieceBytes);
  parallel_for(params.rows * pieces, kPiecesForThreads, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % pieces * kPieceBytes;
      copy_piece(params, task / pieces, first, min64(first + kPieceBytes, row_bytes));
    }
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
