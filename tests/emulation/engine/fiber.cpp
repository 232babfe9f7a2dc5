#include "fiber.h"

#include <cstdint>

namespace cuda_cnn::emulation {

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
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + stack_bytes) & ~uintptr_t{15});
  *--top = nullptr;  // entry's return address: never used, and aligns its stack
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_context(FiberContext& from, FiberContext& to) {
  cuda_cnn_switch_stack(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare(FiberContext& context, char* stack, size_t stack_bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = stack_bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

void switch_context(FiberContext& from, FiberContext& to) { swapcontext(&from.context, &to.context); }

#endif

}  // namespace cuda_cnn::emulation
