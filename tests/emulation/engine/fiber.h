// Switching between stacks: six registers by hand on x86-64, ucontext elsewhere (about thirty times slower).
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(CUDA_CNN_UCONTEXT)
#define CUDA_CNN_SWITCH_BY_HAND
#else
#include <ucontext.h>
#endif

// With AddressSanitizer (CUDA_CNN_SANITIZE=1) the stacks are made known to it.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define CUDA_CNN_ADDRESS_SANITIZER 1
#else
#define CUDA_CNN_ADDRESS_SANITIZER 0
#define __asan_poison_memory_region(begin, bytes)
#define __asan_unpoison_memory_region(begin, bytes)
#endif

namespace cuda_cnn::emulation {

struct FiberContext {
#if CUDA_CNN_ADDRESS_SANITIZER
  void* stack = nullptr;
  size_t stack_bytes = 0;
  void* kept = nullptr;
#endif
#if defined(CUDA_CNN_SWITCH_BY_HAND)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Before the first switch away from a thread's own stack: its context.
void prepare_main(FiberContext& context);

// Prepares a context that starts in entry() on the given stack; entry never returns, and calls started()
// first.
void started();
void prepare(FiberContext& context, char* stack, size_t stack_bytes, void (*entry)());

// Saves the running context in `from` and continues `to`.
void switch_context(FiberContext& from, FiberContext& to);

}  // namespace cuda_cnn::emulation
