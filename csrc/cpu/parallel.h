// The only door to threads: the framework's own pool, with its number of threads.
#pragma once

#include <cstdint>

namespace cuda_cnn::cpu {

using RangeFn = void (*)(void* context, int64_t begin, int64_t end);

// Runs fn on [0, count) cut into ranges of at least `grain`; on the calling thread alone when count <= grain,
// inside another parallel region, or in a forked child (whose pool the fork has left behind).
// The cut depends on the number of threads: a kernel must give the same bits for every cut.
void parallel_ranges(int64_t count, int64_t grain, void* context, RangeFn fn);

int num_threads();

}  // namespace cuda_cnn::cpu

#if defined(CUDA_CNN_ISA)
namespace cuda_cnn::cpu::CUDA_CNN_ISA {

// parallel_for(count, grain, [&](int64_t begin, int64_t end) { … });
template <class Fn>
inline void parallel_for(int64_t count, int64_t grain, const Fn& fn) {
  parallel_ranges(count, grain, const_cast<Fn*>(&fn), [](void* context, int64_t begin, int64_t end) {
    (*static_cast<const Fn*>(context))(begin, end);
  });
}

}  // namespace cuda_cnn::cpu::CUDA_CNN_ISA
#endif
