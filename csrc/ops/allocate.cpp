#include "ops/allocate.h"

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>

#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define CUDA_CNN_KEEPS_MEMORY 1
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <set>
#include <tuple>
#endif

namespace cuda_cnn::ops {

#if defined(CUDA_CNN_KEEPS_MEMORY)
namespace {

// malloc gives large blocks back to the system when they are freed, and the next ones are mapped anew, page
// by page, as the kernel touches them: a fault for every 4 KiB takes longer than many a kernel. So large
// results come from segments that stay, in pages of 2 MiB where the system has them.
constexpr size_t kLarge = size_t{64} << 10, kHugePage = size_t{2} << 20, kSegment = size_t{64} << 20;
// Between blocks, so that tensors whose sizes are powers of two do not begin at addresses that share the sets
// of a cache.
constexpr size_t kLine = 64, kBetween = 17 * kLine;

size_t round_up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

struct Block {
  char* begin;
  size_t size;
  Block *before, *after;  // the neighbours in its segment
  bool free;
};

// The smallest first, then the lowest.
struct BySize {
  bool operator()(const Block* a, const Block* b) const {
    return std::tie(a->size, a->begin) < std::tie(b->size, b->begin);
  }
};

// Best fit, with neighbours joined when both are free.
class ResultAllocator final : public c10::Allocator {
 public:
  ResultAllocator() {
    pthread_atfork([] { it().mutex_.lock(); }, [] { it().mutex_.unlock(); }, [] { it().mutex_.unlock(); });
  }

  // Never destroyed: results outlive it otherwise.
  static ResultAllocator& it() {
    static auto* allocator = new ResultAllocator;
    return *allocator;
  }

  c10::DataPtr allocate(size_t bytes) override {
    c10::Allocator* usual = c10::GetCPUAllocator();
    // Someone else's allocator has its reasons.
    if (bytes < kLarge || usual != c10::GetDefaultCPUAllocator()) return usual->allocate(bytes);
    Block* block = take(round_up(bytes, kLine) + kBetween);
    if (!block) return usual->allocate(bytes);  // its error is the known one
    c10::profiledCPUMemoryReporter().New(block->begin, bytes);
    return {block->begin, block, [](void* given) { it().give_back(static_cast<Block*>(given)); }, at::kCPU};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

  void empty_cache() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block* block : free_) {
      char* const begin = block->begin + (-reinterpret_cast<uintptr_t>(block->begin) % kHugePage);
      char* const end = block->begin + block->size;
      if (begin < end) madvise(begin, (end - begin) / kHugePage * kHugePage, MADV_DONTNEED);
    }
  }

 private:
  Block* take(size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Block wanted{nullptr, size, nullptr, nullptr, false};
    auto found = free_.lower_bound(&wanted);
    Block* block = found != free_.end() ? *found : map_segment(size);
    if (!block) return nullptr;
    free_.erase(block);
    block->free = false;
    if (block->size - size >= kLarge) {
      Block* rest = new Block{block->begin + size, block->size - size, block, block->after, true};
      if (rest->after) rest->after->before = rest;
      block->after = rest;
      block->size = size;
      free_.insert(rest);
    }
    return block;
  }

  void give_back(Block* block) {
    c10::profiledCPUMemoryReporter().Delete(block->begin);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (block->after && block->after->free) join(block, block->after);
    if (block->before && block->before->free) {
      block = block->before;
      join(block, block->after);
    }
    block->free = true;
    free_.insert(block);
  }

  // The second one becomes part of the first, and neither is listed as free.
  void join(Block* first, Block* second) {
    free_.erase(first);
    free_.erase(second);
    first->size += second->size;
    first->after = second->after;
    if (first->after) first->after->before = first;
    delete second;
  }

  // A free block for `size` at least.
  Block* map_segment(size_t size) {
    const size_t length = round_up(std::max(size, kSegment), kHugePage), mapped = length + kHugePage;
    void* const place = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED) return nullptr;
    char* const first = static_cast<char*>(place);
    char* const begin = first + (-reinterpret_cast<uintptr_t>(first) % kHugePage);
    if (begin > first) munmap(first, begin - first);
    munmap(begin + length, first + mapped - (begin + length));
    madvise(begin, length, MADV_HUGEPAGE);
    return *free_.insert(new Block{begin, length, nullptr, nullptr, true}).first;
  }

  std::mutex mutex_;
  std::set<Block*, BySize> free_;
};

}  // namespace

void empty_cache() { ResultAllocator::it().empty_cache(); }
#else
void empty_cache() {}
#endif

at::Tensor empty_result(at::IntArrayRef shape, const at::TensorOptions& options) {
#if defined(CUDA_CNN_KEEPS_MEMORY)
  if (options.device().is_cpu()) {
    return at::Tensor(
        at::detail::empty_generic(shape, &ResultAllocator::it(), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                  c10::typeMetaToScalarType(options.dtype()), options.memory_format_opt()));
  }
#endif
  return at::empty(shape, options);
}

}  // namespace cuda_cnn::ops
