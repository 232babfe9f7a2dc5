// Memory of CPU tensors while the emulated operators are loaded: starts as NaN, so that what a kernel leaves
// unwritten shows, and is known to the emulator, so that an access outside of every tensor is caught. It
// stays for the rest of the process, so it tells the profiler what it gives and takes, as torch's own does.
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstring>

extern "C" void emulation_register(const void* pointer, size_t bytes);
extern "C" void emulation_unregister(const void* pointer);

namespace {

class PoisoningAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes);
    if (memory != nullptr) {
      std::memset(memory, 0xff, bytes);
      emulation_register(memory, bytes);
      c10::profiledCPUMemoryReporter().New(memory, bytes);
    }
    return {memory, memory, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

 private:
  static void release(void* memory) {
    emulation_unregister(memory);
    c10::profiledCPUMemoryReporter().Delete(memory);
    c10::free_cpu(memory);
  }
};

PoisoningAllocator allocator;
const bool installed = [] {
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
  return true;
}();

}  // namespace
