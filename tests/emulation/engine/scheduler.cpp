// Runs the blocks of a launch one after the other: a fiber a thread, which gives way only where it must wait.
#include <sys/mman.h>

#include <cstring>
#include <mutex>

#include "block.h"
#include "cuda_runtime.h"

dim3 gridDim, blockDim;

namespace cuda_cnn::emulation {

Block block;
thread_local Fiber* current __attribute__((tls_model("initial-exec")));

Dim3 thread_index() { return current->thread; }
Dim3 block_index() { return block.index; }
void* shared_pool() { return block.shared; }

uint32_t random_number() {
  uint64_t& x = block.random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return static_cast<uint32_t>(x >> 16);
}

// ---- who runs next ----

namespace {

constexpr size_t kStackBytes = (CUDA_CNN_ADDRESS_SANITIZER ? 256 : 64) * 1024;  // it widens frames

int lowest(uint32_t bits) { return __builtin_ctz(bits); }
int highest(uint32_t bits) { return 31 - __builtin_clz(bits); }
int any(uint32_t bits) {
  for (uint32_t skip = random_number() % __builtin_popcount(bits); skip > 0; --skip) bits &= bits - 1;
  return lowest(bits);
}

// Random priorities make one warp run far ahead of the others, which finds orders that picking at random does
// not (probabilistic concurrency testing); they are drawn anew now and then.
int warp_of_highest_priority() {
  if (random_number() % 512 == 0) {
    for (Warp& warp : block.warps) warp.priority = random_number();
  }
  int best = lowest(block.ready_warps);
  for (uint32_t rest = block.ready_warps; rest != 0; rest &= rest - 1) {
    if (block.warps[lowest(rest)].priority > block.warps[best].priority) best = lowest(rest);
  }
  return best;
}

// The next fiber to run, no longer marked as ready; null where none is.
Fiber* pick() {
  if (block.ready_warps == 0) return nullptr;
  int warp_id = 0, lane = 0;
  switch (options.schedule) {
    case Schedule::kForward:
      warp_id = lowest(block.ready_warps);
      lane = lowest(block.warps[warp_id].ready);
      break;
    case Schedule::kReverse:
      warp_id = highest(block.ready_warps);
      lane = highest(block.warps[warp_id].ready);
      break;
    case Schedule::kRandom:
      warp_id = any(block.ready_warps);
      lane = any(block.warps[warp_id].ready);
      break;
    case Schedule::kPriorities:
      warp_id = warp_of_highest_priority();
      lane = any(block.warps[warp_id].ready);
      break;
  }
  Warp& warp = block.warps[warp_id];
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0) block.ready_warps &= ~(1u << warp_id);
  return &block.fibers[warp_id * kWarpSize + lane];
}

void switch_to(Fiber& next) {
  Fiber& self = *current;
  if (&next == &self) return;
  current = &next;
  switch_context(self.context, next.context);
}

void report_deadlock() {
  std::map<std::string, int> waiting;
  for (const Fiber& fiber : block.fibers) {
    if (fiber.state == State::kBlocked) ++waiting[fiber.blocked_in + (" at " + describe(fiber.blocked_at))];
  }
  std::string text;
  for (const auto& [where, count] : waiting)
    text += " " + std::to_string(count) + " threads in " + where + ";";
  report(false, Site(), "deadlock:%s %d threads exited", text.c_str(), block.threads - block.live);
}

}  // namespace

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  fiber.warp->ready |= 1u << fiber.lane;
  block.ready_warps |= 1u << fiber.warp->id;
}

void abort_block() {
  block.aborted = true;
  switch_context(current->context, block.main_context);
  __builtin_unreachable();
}

void block_current(const char* what, const Site& site) {
  current->state = State::kBlocked;
  current->blocked_in = what;
  current->blocked_at = site;
  Fiber* next = pick();
  if (next == nullptr) {
    report_deadlock();
    abort_block();
  }
  switch_to(*next);
}

// The last thread to arrive somewhere need not be the first to go on.
void maybe_yield() {
  if (options.schedule < Schedule::kRandom || random_number() % 4 != 0) return;
  make_ready(*current);
  switch_to(*pick());
}

// ---- the block's barrier ----

namespace {

void release_barrier() {
  if (options.races) shadow_block_barrier();
  block.at_barrier = 0;
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::kBlocked) make_ready(fiber);
  }
}

}  // namespace

void block_barrier(const Site& site) {
  if (block.at_barrier == 0) {
    block.barrier_site = site;
  } else if (!(block.barrier_site == site)) {
    report(false, site, "divergent barrier: other threads of the block wait in the one at %s",
           describe(block.barrier_site).c_str());
  }
  if (block.live != block.threads) {
    report(false, site, "divergent barrier: %d of %d threads have exited", block.threads - block.live,
           block.threads);
  }
  if (++block.at_barrier == block.live) {
    release_barrier();
    maybe_yield();
  } else {
    block_current("__syncthreads", site);
  }
}

// ---- the life of a fiber ----

namespace {

void exit_current() {
  Fiber& self = *current;
  land_all(self);
  self.state = State::kExited;
  self.warp->live &= ~(1u << self.lane);
  --block.live;
  for (const Collective& collective : self.warp->collectives) {
    if (collective.open && (collective.lanes >> self.lane & 1u)) {
      report(false, collective.site, "lanes of the warp wait for lane %d, which has exited", self.lane);
    }
  }
  if (block.at_barrier > 0 && block.at_barrier == block.live) {
    report(false, block.barrier_site, "divergent barrier: it was met only because %d threads exited",
           block.threads - block.live);
    release_barrier();
  }
  Fiber* next = pick();
  if (next != nullptr) switch_to(*next);
  if (block.live > 0) report_deadlock();
  switch_context(self.context, block.main_context);
}

void run_fiber() {
  started();
  block.launch->run_thread(block.launch->arguments);
  exit_current();
}

void start_fiber(int id) {
  Fiber& fiber = block.fibers[id];
  const Dim3& size = block.launch->block;
  fiber.id = id;
  fiber.lane = id % kWarpSize;
  fiber.warp = &block.warps[id / kWarpSize];
  fiber.thread = {id % size.x, id / size.x % size.y, id / size.x / size.y};
  fiber.copies.clear();
  fiber.copy_group = 0;
  fiber.clocks_epoch = 0;
  fiber.warp->live |= 1u << fiber.lane;
  // Stacks at equal offsets would share a few cache sets.
  const size_t skew = id % 8 * 192;
  char* stack = block.stacks + id * kStackBytes;
  __asan_unpoison_memory_region(stack, kStackBytes);  // what the last one left
  prepare(fiber.context, stack, kStackBytes - skew, run_fiber);
  make_ready(fiber);
}

void run_block(const Dim3& index) {
  block.index = index;
  block.live = block.threads;
  block.at_barrier = 0;
  block.ready_warps = 0;
  block.random_state =
      0x9e3779b97f4a7c15u * (options.seed + 1) ^ (index.x + 1 + 104729u * (index.y + 7919u * index.z));
  __asan_unpoison_memory_region(block.shared, kSharedLimit);
  std::memset(block.shared, kPoison, block.launch->shared_bytes);
  __asan_poison_memory_region(block.shared + block.launch->shared_bytes,
                              kSharedLimit - block.launch->shared_bytes);
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.id = static_cast<int>(i);
    warp.live = warp.ready = 0;
    warp.priority = random_number();
    for (Collective& collective : warp.collectives) collective.open = false;
  }
  if (options.races) shadow_start_block();
  for (int id = 0; id < block.threads; ++id) start_fiber(id);
  current = pick();
  prepare_main(block.main_context);
  switch_context(block.main_context, current->context);
  current = nullptr;
  if (options.counters) count_finish_block();
}

char* map_memory(size_t bytes) {
  void* memory =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
}

bool prepare_block(const Launch& launch) {
  const uint64_t threads = uint64_t{launch.block.x} * launch.block.y * launch.block.z;
  if (threads == 0 || threads > 1024 || launch.shared_bytes > kSharedLimit || launch.grid.y > 65535 ||
      launch.grid.z > 65535) {
    report(false, Site(),
           "invalid launch: %llu threads a block, %zu bytes of shared memory, grid %u x %u x %u",
           static_cast<unsigned long long>(threads), launch.shared_bytes, launch.grid.x, launch.grid.y,
           launch.grid.z);
    return false;
  }
  gridDim = {launch.grid.x, launch.grid.y, launch.grid.z};
  blockDim = {launch.block.x, launch.block.y, launch.block.z};
  block.launch = &launch;
  block.threads = static_cast<int>(threads);
  block.aborted = false;
  block.fibers.resize(threads);
  block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  if (block.shared == nullptr) block.shared = map_memory(kSharedLimit);
  if (block.stacks_bytes < threads * kStackBytes) {
    if (block.stacks != nullptr) munmap(block.stacks, block.stacks_bytes);
    block.stacks_bytes = threads * kStackBytes;
    block.stacks = map_memory(block.stacks_bytes);
  }
  return true;
}

}  // namespace

bool run(const Launch& launch) {
  static std::mutex one_launch_at_a_time;
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  clear_report();
  if (!prepare_block(launch)) return false;
  if (options.dry_run) return true;
  if (options.races) global_shadow_start_launch();
  const Dim3& grid = launch.grid;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && !block.aborted; ++i) {
    const uint64_t b = options.schedule == Schedule::kForward   ? i
                       : options.schedule == Schedule::kReverse ? blocks - 1 - i
                                                                : (i + options.seed) % blocks;
    block.number = static_cast<uint32_t>(b + 1);
    run_block({static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
               static_cast<unsigned>(b / grid.x / grid.y)});
  }
  return report_count() == 0;
}

}  // namespace cuda_cnn::emulation
