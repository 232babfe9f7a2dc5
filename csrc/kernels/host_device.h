// What every kernel shares, on host and device: element types, the stream, and maths that both sides call.
// Nothing here knows torch.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace cuda_cnn {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// A cudaStream_t; void* so that headers need no CUDA toolkit.
using Stream = void*;

HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

HOST_DEVICE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The upper half of a float32. Rounds to nearest even; a NaN stays a NaN.
struct BFloat16 {
  uint16_t bits;
};

HOST_DEVICE float to_float(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

HOST_DEVICE BFloat16 to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

// IEEE binary16: 1 sign, 5 exponent, 10 fraction bits. Rounds to nearest even.
struct Half {
  uint16_t bits;
};

HOST_DEVICE float to_float(Half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_float(sign | magnitude | 0x7f800000u);  // Inf, NaN
  // Multiplying by 2^112 moves the exponent's bias from 15 to 127, for subnormal numbers too.
  return bits_float(sign | float_bits(bits_float(magnitude) * 5.192296858534828e33f));
}

HOST_DEVICE Half to_half(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 2^16 or more
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves the subnormal's bits, rounded, at the foot of the fraction.
    const uint32_t shifted = float_bits(bits_float(magnitude) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1);
  return {static_cast<uint16_t>(sign | (rounded >> 13))};
}

// Accumulation type: float32 for the 16-bit types.
template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<BFloat16> {
  using type = float;
};
template <>
struct AccumulatorOf<Half> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

HOST_DEVICE float widen(float value) { return value; }
HOST_DEVICE double widen(double value) { return value; }
HOST_DEVICE float widen(BFloat16 value) { return to_float(value); }
HOST_DEVICE float widen(Half value) { return to_float(value); }

template <class T>
HOST_DEVICE T narrow(Accumulator<T> value) {
  return value;
}
template <>
HOST_DEVICE BFloat16 narrow<BFloat16>(float value) {
  return to_bfloat16(value);
}
template <>
HOST_DEVICE Half narrow<Half>(float value) {
  return to_half(value);
}

// Calls fn(T{}) with the element type that dtype names: a launcher's one dtype switch.
template <class Fn>
inline void dispatch_dtype(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat32:
      return fn(float{});
    case DType::kFloat64:
      return fn(double{});
    case DType::kBFloat16:
      return fn(BFloat16{});
    case DType::kFloat16:
      return fn(Half{});
  }
}

HOST_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
HOST_DEVICE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
HOST_DEVICE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace cuda_cnn
