#include "cpu/parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <exception>
#if !defined(_WIN32)
#include <pthread.h>
#endif

// The OpenMP runtime that torch brings along, found when the module loads. at::parallel_for is a template
// whose pragmas do nothing without -fopenmp, and -fopenmp would link a second runtime, with a pool of its
// own.
extern "C" {
__attribute__((weak)) void GOMP_parallel(void (*fn)(void*), void* data, unsigned threads, unsigned flags);
__attribute__((weak)) int omp_get_thread_num();
__attribute__((weak)) int omp_get_num_threads();
}

namespace cuda_cnn::cpu {
namespace {

bool in_forked_child = false;

#if !defined(_WIN32)
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });
#endif

struct Region {
  RangeFn fn;
  void* context;
  int64_t count, ranges;
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
};

void run_ranges(void* data) {
  Region& region = *static_cast<Region*>(data);
  const int64_t step = (region.count + region.ranges - 1) / region.ranges;
  try {
    for (int64_t i = omp_get_thread_num(); i < region.ranges; i += omp_get_num_threads()) {
      const int64_t begin = i * step, end = std::min(region.count, begin + step);
      if (begin < end) region.fn(region.context, begin, end);
    }
  } catch (...) {
    if (!region.failed.test_and_set()) region.error = std::current_exception();
  }
}

}  // namespace

void parallel_ranges(int64_t count, int64_t grain, void* context, RangeFn fn) {
  if (count <= 0) return;
  const int64_t ranges = std::min<int64_t>(num_threads(), (count + grain - 1) / std::max<int64_t>(grain, 1));
  if (ranges <= 1 || at::in_parallel_region()) {
    fn(context, 0, count);
    return;
  }
  Region region{fn, context, count, ranges};
  GOMP_parallel(run_ranges, &region, static_cast<unsigned>(ranges), 0);
  if (region.error) std::rethrow_exception(region.error);
}

int num_threads() { return in_forked_child || !GOMP_parallel ? 1 : at::get_num_threads(); }

}  // namespace cuda_cnn::cpu
