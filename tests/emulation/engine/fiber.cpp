#include "fiber.h"

#include <cstdint>

#if CUDA_CNN_ADDRESS_SANITIZER
#include <pthread.h>
#endif

namespace cuda_cnn::emulation {

namespace {

#if CUDA_CNN_ADDRESS_SANITIZER
void note_stack(FiberContext& context, void* stack, size_t bytes) {
  context.stack = stack;
  context.stack_bytes = bytes;
}
void leave(FiberContext& from, FiberContext& to) {
  __sanitizer_start_switch_fiber(&from.kept, to.stack, to.stack_bytes);
}
void enter_stack(void* kept) { __sanitizer_finish_switch_fiber(kept, nullptr, nullptr); }
void enter(FiberContext& self) { enter_stack(self.kept); }
#else
void note_stack(FiberContext&, void*, size_t) {}
void leave(FiberContext&, FiberContext&) {}
void enter_stack(void*) {}
void enter(FiberContext&) {}
#endif

}  // namespace

void started() { enter_stack(nullptr); }

void prepare_main([[maybe_unused]] FiberContext& context) {
#if CUDA_CNN_ADDRESS_SANITIZER
  pthread_attr_t attributes;
  void* stack = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  note_stack(context, stack, bytes);
#endif
}

#if defined(CUDA_CNN_SWITCH_BY_HAND)

// Pushes what the System V ABI lets a callee keep, exchanges the stacks, and returns on the other one.
extern "C" void cuda_cnn_switch_stack(void** save, void* load);
asm(R"(
  .text
  .hidden cuda_cnn_switch_stack
  .globl cuda_cnn_switch_stack
  .type cuda_cnn_switch_stack, @function
cuda_cnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size cuda_cnn_switch_stack, .-cuda_cnn_switch_stack
)");

void prepare(FiberContext& context, char* stack, size_t stack_bytes, void (*entry)()) {
  note_stack(context, stack, stack_bytes);
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + stack_bytes) & ~uintptr_t{15});
  *--top = nullptr;  // entry's return address: never used, and aligns its stack
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_context(FiberContext& from, FiberContext& to) {
  leave(from, to);
  cuda_cnn_switch_stack(&from.stack_pointer, to.stack_pointer);
  enter(from);
}

#else

void prepare(FiberContext& context, char* stack, size_t stack_bytes, void (*entry)()) {
  note_stack(context, stack, stack_bytes);
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = stack_bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

void switch_context(FiberContext& from, FiberContext& to) {
  leave(from, to);
  swapcontext(&from.context, &to.context);
  enter(from);
}

#endif

}  // namespace cuda_cnn::emulation
