#pragma once

#include "cpu/vec.h"

namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// Asks for the lines of the rows that come next, a few at a time, while these are worked on: their columns
// are read down, which no hardware prefetcher foresees.
struct Prefetch {
  const char* row;
  int64_t row_step, row_bytes, rows_left;
  int64_t at = 0;
  bool to_l2 = false;  // of many lines: L1 waits for few at a time

  int64_t count() const { return rows_left * ceil_div(row_bytes, 64); }
  CUDA_CNN_INLINE void lines(int64_t count) {
    for (; count > 0 && rows_left > 0; --count) {
      if (to_l2) {
        __builtin_prefetch(row + at, 0, 2);
      } else {
        __builtin_prefetch(row + at);
      }
      at += 64;
      if (at < row_bytes) continue;
      at = 0;
      row += row_step;
      --rows_left;
    }
  }
};

template <class T>
CUDA_CNN_INLINE Prefetch prefetch_rows(const T* rows, int64_t pixel, int64_t columns, int64_t count) {
  const int64_t size = sizeof(T);
  return {reinterpret_cast<const char*>(rows), pixel * size, columns * size, count};
}

template <class T>
CUDA_CNN_INLINE void prefetch_run(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i);
}

template <class T>
CUDA_CNN_INLINE void prefetch_to_l2(const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
}

// Asks for the lines that are written soon.
template <class T>
CUDA_CNN_INLINE void prefetch_output(const T* c, int64_t step, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i, c += step) {
    for (int64_t j = 0; j < columns; j += 64 / sizeof(T)) __builtin_prefetch(c + j, 1);
  }
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
