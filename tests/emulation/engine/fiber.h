// Switching between stacks: six registers by hand on x86-64, ucontext elsewhere (about thirty times slower).
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(CUDA_CNN_UCONTEXT)
#define CUDA_CNN_SWITCH_BY_HAND
#else
#include <ucontext.h>
#endif

namespace cuda_cnn::emulation {

struct FiberContext {
#if defined(CUDA_CNN_SWITCH_BY_HAND)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
};

// Prepares a context that starts in entry() on the given stack; entry never returns.
void prepare(FiberContext& context, char* stack, size_t stack_bytes, void (*entry)());

// Saves the running context in `from` and continues `to`.
void switch_context(FiberContext& from, FiberContext& to);

}  // namespace cuda_cnn::emulation
