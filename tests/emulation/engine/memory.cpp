// Plain loads and stores. Kernels are compiled with -fsanitize=thread but without its runtime: the functions
// that the instrumentation calls are these, and so no access needs a wrapper in the kernel's source.
#include "block.h"

extern "C" const char __ehdr_start
    __attribute__((visibility("hidden")));  // this library's image, by the linker
extern "C" const char _end __attribute__((visibility("hidden")));

namespace cuda_cnn::emulation {

namespace {

bool is_within(const void* pointer, const void* begin, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) - reinterpret_cast<uintptr_t>(begin) < bytes;
}

bool is_image(const void* pointer) {
  return is_within(pointer, &__ehdr_start, static_cast<size_t>(&_end - &__ehdr_start));
}

void shared_access(const void* pointer, uint32_t bytes, Access access, const Site& site) {
  const uint32_t offset = static_cast<uint32_t>(static_cast<const char*>(pointer) - block.shared);
  if (offset + bytes > block.launch->shared_bytes) {
    report(true, site, "shared %s of %u bytes at +%u, outside the %zu bytes of the launch",
           access == Access::kRead ? "read" : "write", bytes, offset, block.launch->shared_bytes);
  }
  if (options.counters) {
    count_access(access == Access::kRead ? Traffic::kSharedLoad : Traffic::kSharedStore, pointer, bytes,
                 site);
  }
  if (options.races) shadow_access(offset, bytes, access, site);
}

void global_access(const void* pointer, uint32_t bytes, Access access, const Site& site) {
  if (options.bounds && !in_registered_range(pointer, bytes)) {
    report(true, site, "global %s of %u bytes at %p, outside every tensor",
           access == Access::kRead ? "read" : "write", bytes, pointer);
  }
  if (options.counters) {
    count_access(access == Access::kRead ? Traffic::kGlobalLoad : Traffic::kGlobalStore, pointer, bytes,
                 site);
  }
  if (options.races) global_shadow_access(pointer, bytes, access, site);
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - block.shared) + kSharedBase;
}

void* shared_pointer(uint32_t address, uint32_t bytes, const Site& site) {
  const uint32_t offset = address - kSharedBase;
  if (offset > block.launch->shared_bytes || offset + bytes > block.launch->shared_bytes) {
    report(true, site, "shared access of %u bytes at +%d, outside the %zu bytes of the launch", bytes,
           static_cast<int>(offset), block.launch->shared_bytes);
  }
  return block.shared + offset;
}

void memory_access(const void* pointer, uint32_t bytes, Access access, const Site& site) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) {
    report(true, site, "misaligned access of %u bytes at %p", bytes, pointer);
  }
  if (is_within(pointer, block.shared, kSharedLimit)) {
    shared_access(pointer, bytes, access, site);
  } else if (!is_image(pointer)) {
    global_access(pointer, bytes, access, site);
  }
}

}  // namespace cuda_cnn::emulation

#if !CUDA_CNN_ADDRESS_SANITIZER  // which sees every access itself

namespace cuda_cnn::emulation {

namespace {

// Registers that live on a fiber's stack, and the kernel's arguments, are no memory to a kernel.
bool is_register(const void* pointer) {
  return current == nullptr || is_within(pointer, block.stacks, block.stacks_bytes) ||
         is_within(pointer, block.launch->arguments, block.launch->argument_bytes);
}

void plain_access(const void* pointer, uint32_t bytes, Access access, const void* pc) {
  if (!is_register(pointer)) memory_access(pointer, bytes, access, Site(pc));
}

// Where the type does not promise alignment, the device too would go byte by byte.
void bytewise_access(const void* pointer, size_t bytes, Access access, const void* pc) {
  if (is_register(pointer)) return;
  for (size_t i = 0; i < bytes; ++i)
    memory_access(static_cast<const char*>(pointer) + i, 1, access, Site(pc));
}

}  // namespace

}  // namespace cuda_cnn::emulation

using namespace cuda_cnn::emulation;

#define CUDA_CNN_HOOKS(bytes)                                                                                \
  void __tsan_read##bytes(void* p) { plain_access(p, bytes, Access::kRead, __builtin_return_address(0)); }   \
  void __tsan_write##bytes(void* p) { plain_access(p, bytes, Access::kWrite, __builtin_return_address(0)); } \
  void __tsan_unaligned_read##bytes(void* p) {                                                               \
    bytewise_access(p, bytes, Access::kRead, __builtin_return_address(0));                                   \
  }                                                                                                          \
  void __tsan_unaligned_write##bytes(void* p) {                                                              \
    bytewise_access(p, bytes, Access::kWrite, __builtin_return_address(0));                                  \
  }

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
CUDA_CNN_HOOKS(1)
CUDA_CNN_HOOKS(2)
CUDA_CNN_HOOKS(4)
CUDA_CNN_HOOKS(8)
CUDA_CNN_HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) {
  bytewise_access(p, bytes, Access::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  bytewise_access(p, bytes, Access::kWrite, __builtin_return_address(0));
}
}

#endif
