// What is known of every byte pair of shared memory: written or not, a copy in flight, and who touched it
// last, to report accesses that nothing orders. Clocks as in FastTrack (Flanagan and Freund 2009), with one
// shortcut: the block's barrier orders everything, so it starts a new epoch in which no thread knows of
// another. Only barriers order memory; shuffles, votes and mma do not.
#include <algorithm>

#include "block.h"

namespace cuda_cnn::emulation {

namespace {

constexpr uint32_t kGranule = 2;
constexpr int kNobody = -1;

const char* name(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic update";
}

// Known(fiber)[u] = the last moment of thread u, in this epoch, that comes before what the fiber does now.
// Only barriers of a warp let a fiber know of others: without one in this epoch it has no vector of its own.
class Known {
 public:
  explicit Known(const Fiber& fiber) : id_(fiber.id), clocks_(own(fiber) ? fiber.clocks.data() : nullptr) {}
  uint32_t operator[](int thread) const { return clocks_ != nullptr ? clocks_[thread] : thread == id_; }
  static bool own(const Fiber& fiber) { return fiber.clocks_epoch == block.epoch; }

 private:
  int id_;
  const uint32_t* clocks_;
};

std::vector<uint32_t>& own_clocks(Fiber& fiber) {
  if (!Known::own(fiber)) {
    fiber.clocks.assign(block.threads, 0);
    fiber.clocks[fiber.id] = 1;
    fiber.clocks_epoch = block.epoch;
  }
  return fiber.clocks;
}

bool is_before(uint32_t epoch, uint32_t clock, int thread, const Known& clocks) {
  return epoch < block.epoch || clock <= clocks[thread];
}

// A thread whose read of the cell nothing orders before now, or kNobody.
int unordered_reader(const Shadow& cell, const Known& clocks) {
  if (cell.read_epoch < block.epoch) return kNobody;
  for (const Read& read : cell.reads) {
    if (read.clock > clocks[read.thread]) return read.thread;
  }
  return kNobody;
}

void keep_last_of_each_thread(std::vector<Read>& reads) {
  std::vector<uint32_t> last(block.threads, 0);
  for (const Read& read : reads) last[read.thread] = read.clock;
  reads.clear();
  for (int thread = 0; thread < block.threads; ++thread) {
    if (last[thread] != 0) reads.push_back({thread, last[thread]});
  }
}

void remember_read(Shadow& cell, const Known& clocks) {
  const int self = current->id;
  if (cell.read_epoch < block.epoch) cell.reads.clear();
  cell.read_epoch = block.epoch;
  if (!cell.reads.empty() && cell.reads.back().thread == self) cell.reads.pop_back();
  cell.reads.push_back({self, clocks[self]});
  if (cell.reads.size() > 2u * block.threads) keep_last_of_each_thread(cell.reads);
}

void remember_write(Shadow& cell, const Known& clocks) {
  cell.writer = current->id;
  cell.write_epoch = block.epoch;
  cell.write_clock = clocks[current->id];
  cell.reads.clear();
  cell.written = true;
}

template <class Fn>
void for_each_cell(uint32_t offset, uint32_t bytes, Fn fn) {
  const uint32_t last = (offset + bytes - 1) / kGranule;
  for (uint32_t i = offset / kGranule; i <= last; ++i) {
    Shadow& cell = block.shadow[i];
    if (cell.write_epoch < block.first_epoch) {  // another block's
      cell.writer = kNobody;
      cell.written = cell.in_flight = false;
    }
    fn(cell, i * kGranule);
  }
}

}  // namespace

void shadow_start_block() {
  block.first_epoch = ++block.epoch;
  block.shadow.resize(kSharedLimit / kGranule);
}

void shadow_access(uint32_t offset, uint32_t bytes, Access access, const Site& site) {
  const Known clocks(*current);
  const int self = current->id;
  for_each_cell(offset, bytes, [&](Shadow& cell, uint32_t at) {
    if (cell.in_flight) {
      report(false, site, "shared %s of +%u, where a copy started by thread %d is still in flight",
             name(access), at, cell.writer);
    } else if (cell.writer != kNobody &&
               !is_before(cell.write_epoch, cell.write_clock, cell.writer, clocks)) {
      report(false, site, "race: shared %s of +%u by thread %d, not ordered after the write by thread %d",
             name(access), at, self, cell.writer);
    }
    if (access != Access::kWrite && !cell.written)
      report(false, site, "uninitialised shared %s of +%u", name(access), at);
    if (access == Access::kRead) return remember_read(cell, clocks);
    const int reader = unordered_reader(cell, clocks);
    if (reader != kNobody && reader != self) {
      report(false, site, "race: shared %s of +%u by thread %d, not ordered after the read by thread %d",
             name(access), at, self, reader);
    }
    remember_write(cell, clocks);
  });
}

void shadow_copy_started(uint32_t offset, uint32_t bytes, const Site& site) {
  shadow_access(offset, bytes, Access::kWrite, site);
  for_each_cell(offset, bytes, [](Shadow& cell, uint32_t) { cell.in_flight = true; });
}

// From its wait on the copied data is like something the waiting thread has just written.
void shadow_copy_landed(uint32_t offset, uint32_t bytes) {
  const Known clocks(*current);
  for_each_cell(offset, bytes, [&](Shadow& cell, uint32_t) {
    cell.in_flight = false;
    remember_write(cell, clocks);
  });
}

void shadow_warp_barrier(Warp& warp, uint32_t lanes) {
  static std::vector<uint32_t> joined;
  joined.assign(block.threads, 0);
  for (int pass = 0; pass < 2; ++pass) {
    for (uint32_t rest = lanes; rest != 0; rest &= rest - 1) {
      Fiber& fiber = block.fibers[warp.id * kWarpSize + __builtin_ctz(rest)];
      std::vector<uint32_t>& clocks = own_clocks(fiber);
      if (pass == 0) {
        for (int u = 0; u < block.threads; ++u) joined[u] = std::max(joined[u], clocks[u]);
      } else {
        clocks = joined;
        ++clocks[fiber.id];
      }
    }
  }
}

void shadow_block_barrier() { ++block.epoch; }

}  // namespace cuda_cnn::emulation
