#include "cpu/workspace.h"

#include <cstdlib>
#include <new>

namespace cuda_cnn::cpu {
namespace {

constexpr int64_t kAlignment = 64;
#if defined(__SANITIZE_ADDRESS__)  // memory of its own for each call: a slot that is in use twice is found
constexpr bool kKeeps = false;
constexpr int64_t kUnit = kAlignment;
#else
constexpr bool kKeeps = true;
constexpr int64_t kUnit = 4096;
#endif

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;
  ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[static_cast<int>(Workspace::kCount)];

}  // namespace

void* workspace_bytes(Workspace slot, int64_t bytes) {
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < bytes || !kKeeps) {
    std::free(buffer.data);
    const int64_t size = (bytes + kUnit - 1) / kUnit * kUnit;
    buffer.data = std::aligned_alloc(kAlignment, size);
    buffer.size = buffer.data ? size : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data;
}

}  // namespace cuda_cnn::cpu
