// Sums of parts, joined to those of a whole channel in an order that the number of parts alone decides.
#pragma once

#include "cuda/vec.cuh"

namespace cuda_cnn::cuda {

// A block that joins: neighbouring channels, and lines that take the parts in turn.
constexpr int kJoinChannels = 32, kJoinLines = 8, kJoinThreads = kJoinChannels * kJoinLines;

struct Sums {
  double first, second;

  __device__ __forceinline__ void join(const Sums& other) {
    first += other.first;
    second += other.second;
  }
};

// Sum of `count` values, and of their squared distances from their mean. Joined as Chan, Golub and LeVeque
// (1979) do, nothing is lost where the mean is large beside the deviation.
struct Moments {
  double count, sum, squares;

  __device__ __forceinline__ void join(const Moments& other) {
    if (other.count == 0) return;
    if (count > 0) {
      const double apart = sum * other.count - other.sum * count;
      squares += apart * apart / (count * other.count * (count + other.count));
    }
    count += other.count;
    sum += other.sum;
    squares += other.squares;
  }
  __device__ __forceinline__ double mean() const { return sum / count; }
  __device__ __forceinline__ double variance() const { return squares / count; }
};

template <class Value>
struct JoinShared {
  Value lines[kJoinLines][kJoinChannels];
};

// All read(part) of this thread's channel, joined; valid in line 0.
template <class Value, class Read>
__device__ __forceinline__ Value join_parts(JoinShared<Value>& shared, bool exists, int64_t parts,
                                            Read read) {
  const int column = threadIdx.x % kJoinChannels, line = threadIdx.x / kJoinChannels;
  Value all{};
  for (int64_t part = line; exists && part < parts; part += kJoinLines) all.join(read(part));
  shared.lines[line][column] = all;
  __syncthreads();
  for (int other = 1; line == 0 && other < kJoinLines; ++other) all.join(shared.lines[other][column]);
  return all;
}

// The channel of this thread.
__device__ __forceinline__ int64_t join_channel() {
  return int64_t{blockIdx.x} * kJoinChannels + threadIdx.x % kJoinChannels;
}

}  // namespace cuda_cnn::cuda
