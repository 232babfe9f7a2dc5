// Division by a number that a whole launch shares, on host and device. The hardware has no integer division:
// one of 32 bits takes about twenty instructions, one of 64 about a hundred, a multiplication two or three.
#pragma once

#include "kernels/host_device.h"

namespace cuda_cnn::cuda {

// Of 0 <= n < 2^31: with 2^shift >= divisor, ceil(2^(31+shift) / divisor) is exact enough. A divisor of 0
// counts as 1.
struct FastDivide {
  uint32_t divisor, magic;
  int shift;

  HOST_DEVICE static FastDivide by(int64_t number) {
    const uint32_t divisor = number > 0 ? static_cast<uint32_t>(number) : 1;
    int shift = 0;
    while ((uint64_t{1} << shift) < divisor) ++shift;
    const uint64_t power = uint64_t{1} << (31 + shift);
    return {divisor, static_cast<uint32_t>((power + divisor - 1) / divisor), shift};
  }
  HOST_DEVICE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> (31 + shift));
  }
};

// The same for a kernel that comes in two forms, with 32-bit numbers (below 2^31) and with 64-bit ones.
template <class Index>
struct Divide {
  Index divisor;

  HOST_DEVICE static Divide by(int64_t divisor) { return {static_cast<Index>(divisor)}; }
  HOST_DEVICE Index quotient(Index n) const { return n / divisor; }
};

template <>
struct Divide<int32_t> {
  FastDivide fast;
  int32_t divisor;

  HOST_DEVICE static Divide by(int64_t divisor) {
    return {FastDivide::by(divisor), static_cast<int32_t>(divisor)};
  }
  HOST_DEVICE int32_t quotient(int32_t n) const { return static_cast<int32_t>(fast.quotient(n)); }
};

// Leaves the remainder in n, returns the quotient.
template <class Index>
HOST_DEVICE Index split_off(Index& n, const Divide<Index>& divide) {
  const Index quotient = divide.quotient(n);
  n -= quotient * divide.divisor;
  return quotient;
}

}  // namespace cuda_cnn::cuda
