#include "cpu/workspace.h"

#include <cstdlib>
#include <new>

namespace cuda_cnn::cpu {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kPage = 4096;

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
    const int64_t size = (bytes + kPage - 1) / kPage * kPage;
    buffer.data = std::aligned_alloc(kAlignment, size);
    buffer.size = buffer.data ? size : 0;
    if (!buffer.data) throw std::bad_alloc();
  }
  return buffer.data;
}

}  // namespace cuda_cnn::cpu
