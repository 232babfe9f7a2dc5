#include "cpu/workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <new>

namespace cuda_cnn::cpu {
namespace {

constexpr int64_t kPage = 4096, kHugePage = 2097152;
// From here on in pages of 2 MiB, where the system has them. Those of 4 KiB lie anywhere in memory, and where
// many share their sets of L2 a kernel takes twice as long, for as long as the process lives.
constexpr int64_t kLarge = 131072;

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[static_cast<int>(Workspace::kCount)];

}  // namespace

void* workspace_bytes(Workspace slot, int64_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    const int64_t unit = bytes < kLarge ? kPage : kHugePage;
    const int64_t size = (bytes + unit - 1) / unit * unit;
    buffer.data = std::aligned_alloc(unit, size);
#if defined(__linux__)
    if (buffer.data && unit == kHugePage) madvise(buffer.data, size, MADV_HUGEPAGE);
#endif
    buffer.size = buffer.data ? size : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data;
}

}  // namespace cuda_cnn::cpu
