// The memory of a result.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cuda_cnn::ops {

// Asks Linux for pages of 2 MiB where a large result lies. Memory that malloc has just fetched is mapped page
// by page as the kernel touches it, and a fault for every 4 KiB can take longer than the kernel itself. It is
// advice: a system without such pages goes on as before.
inline void ask_for_huge_pages([[maybe_unused]] const at::Tensor& result) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (!result.is_cpu() || result.nbytes() < 2 * kHuge) return;
  const auto begin = reinterpret_cast<uintptr_t>(result.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge,
                  end = (begin + result.nbytes()) / kHuge * kHuge;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

// at::empty for a result of a kernel.
inline at::Tensor empty_result(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor result = at::empty(shape, options);
  ask_for_huge_pages(result);
  return result;
}

}  // namespace cuda_cnn::ops
