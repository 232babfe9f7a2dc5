// Scratch memory that outlives a call: fresh pages cost a fault each, which can dwarf a small kernel.
#pragma once

#include <cstdint>

namespace cuda_cnn::cpu {

// Slots let one thread hold several workspaces at once.
enum class Workspace : int { kA, kB, kC, kD, kLines, kShared, kBlocks, kCount };

// At least `bytes`, aligned to 64, contents undefined; valid on this thread until its next call for the same
// slot. Other threads may use it while the owner waits for them. Grows, and is freed with its thread.
void* workspace_bytes(Workspace slot, int64_t bytes);

template <class T>
inline __attribute__((always_inline)) T* workspace(Workspace slot, int64_t count) {
  return static_cast<T*>(workspace_bytes(slot, count * static_cast<int64_t>(sizeof(T))));
}

}  // namespace cuda_cnn::cpu
