#include "cpu/parallel.h"

#include <ATen/Parallel.h>
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace cuda_cnn::cpu {
namespace {

bool in_forked_child = false;

#if !defined(_WIN32)
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

}  // namespace

void parallel_ranges(int64_t count, int64_t grain, void* context, RangeFn fn) {
  if (count <= 0) return;
  if (count <= grain || in_forked_child || at::get_num_threads() == 1 || at::in_parallel_region()) {
    fn(context, 0, count);
    return;
  }
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { fn(context, begin, end); });
}

int num_threads() { return in_forked_child ? 1 : at::get_num_threads(); }

}  // namespace cuda_cnn::cpu
