// The blocks of a launch, in 64 bits: too many are refused by launch(), never cut off. Needs no toolkit.
#pragma once

#include "kernels/host_device.h"

namespace cuda_cnn::cuda {

// What the hardware counts (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;
constexpr int64_t kMaxGrid = 65535;  // in y and z

struct Grid {
  int64_t x, y, z;

  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
  bool empty() const { return x == 0 || y == 0 || z == 0; }
  bool fits() const { return x <= kMaxGridX && y <= kMaxGrid && z <= kMaxGrid; }
};

}  // namespace cuda_cnn::cuda
