// Concatenation: copies of rows (kernels/concat.h), in units of the alignment that all addresses, strides and
// lengths share: 16 bytes in NHWC with whole packs of channels. A launch takes kMaxParts inputs; blockIdx.y
// names the input.
#include "kernels/concat.h"

#include "cuda/launch.cuh"
#include "cuda/vec.cuh"

namespace cuda_cnn::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxParts = 64;  // 2 KB of the 4 KB that a kernel's parameters may have

struct Parts {
  ConcatPart part[kMaxParts];
};

// Index: uint32_t where all numbers of units fit, for the division by a row's units.
template <class Unit, class Index>
__global__ void __launch_bounds__(kThreads)
    copy_rows(const __grid_constant__ Parts parts, char* __restrict__ output, int64_t row_stride,
              int64_t rows) {
  const ConcatPart& part = parts.part[blockIdx.y];
  const Index units = static_cast<Index>(part.bytes / int64_t{sizeof(Unit)});
  const int64_t thread = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (thread >= rows * units) return;
  const Index row = static_cast<Index>(thread) / units;
  const int64_t at = (static_cast<Index>(thread) - row * units) * int64_t{sizeof(Unit)};
  const char* from = static_cast<const char*>(part.data) + row * part.row_stride + at;
  *reinterpret_cast<Unit*>(output + row * row_stride + part.offset + at) =
      *reinterpret_cast<const Unit*>(from);
}

template <class Unit>
void copy_parts(const ConcatParams& p, Stream stream) {
  for (int64_t first = 0; first < p.count; first += kMaxParts) {
    Parts parts{};
    const int count = static_cast<int>(min64(kMaxParts, p.count - first));
    int64_t longest = 0;
    for (int i = 0; i < count; ++i) {
      parts.part[i] = p.parts[first + i];
      longest = max64(longest, parts.part[i].bytes);
    }
    const int64_t threads = p.rows * (longest / int64_t{sizeof(Unit)});
    const auto kernel =
        threads < (int64_t{1} << 32) - kThreads ? copy_rows<Unit, uint32_t> : copy_rows<Unit, uint64_t>;
    launch(kernel, {ceil_div(threads, kThreads), count}, kThreads, 0, stream, parts,
           static_cast<char*>(p.output), p.row_stride, p.rows);
  }
}

}  // namespace

void concat(const ConcatParams& p, Stream stream) {
  switch (p.alignment) {
    case 16:
      return copy_parts<uint4>(p, stream);
    case 8:
      return copy_parts<uint2>(p, stream);
    case 4:
      return copy_parts<uint32_t>(p, stream);
    case 2:
      return copy_parts<uint16_t>(p, stream);
    default:
      return copy_parts<uint8_t>(p, stream);
  }
}

}  // namespace cuda_cnn::cuda
