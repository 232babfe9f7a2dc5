// The state of the block that runs, and what the engine's parts ask of each other.
#pragma once

#include <cstdarg>
#include <deque>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "fiber.h"

namespace cuda_cnn::emulation {

// ---- options: set by name through the C interface of control.cpp ----

enum class Schedule { kForward, kReverse, kRandom, kPriorities };
enum class Landing { kLate, kEarly, kRandom };  // of asynchronous copies, between their start and their wait

struct Options {
  Schedule schedule = Schedule::kForward;
  Landing landing = Landing::kLate;
  unsigned seed = 1;
  bool races = false;         // in shared memory races, uninitialised reads, reads in flight; between blocks
  bool bounds = false;        // global accesses must fall into a registered range
  bool counters = false;      // bank conflicts and sectors
  unsigned launch_error = 0;  // that every launch shall give, or 0
  unsigned attributes_error = 0;  // that every question for a kernel's attributes shall give, or 0
  unsigned gpu = 0;               // the current device's number
  bool dry_run = false;           // launches are looked at, not run
};
extern Options options;

// ---- one thread ----

constexpr unsigned kWarpSize = 32;
constexpr uint32_t kPoison = 0xff;  // a NaN in every float type

struct Copy {
  char* destination;
  const char* source;
  uint32_t bytes, source_bytes, group;
  bool landed;
};

enum class State : uint8_t { kReady, kBlocked, kExited };

struct Fiber {
  FiberContext context;
  Dim3 thread;
  int id, lane;
  Warp* warp;
  State state;
  const char* blocked_in;  // what it waits in, and where
  Site blocked_at;
  std::vector<Copy> copies;  // not yet waited for, oldest first
  uint32_t copy_group;
  std::vector<uint32_t> clocks;  // of every thread, as far as this one knows: see shadow.cpp
  uint32_t clocks_epoch;
};

// ---- one warp ----

struct Collective {
  bool open = false;
  WarpOp op;
  uint32_t lanes, arrived;
  void* data[kWarpSize];
  WarpFunction fn;
  Site site;
};

// One warp's accesses at one site: the n-th access of each lane belongs to the n-th request.
struct Request {
  uint32_t lanes = 0, bytes = 0;
  uint64_t address[kWarpSize];
};
enum class Traffic : uint8_t {
  kSharedLoad,
  kSharedStore,
  kLoadMatrix,
  kCopyStore,
  kGlobalLoad,
  kGlobalStore,
  kCopyLoad
};
struct SiteRequests {
  Site site;
  Traffic traffic;
  uint32_t seen[kWarpSize] = {};
  uint32_t first = 0;
  std::deque<Request> open;
};

struct Warp {
  int id;
  uint32_t live, ready;  // lanes
  uint32_t priority;
  Collective collectives[8];
  std::unordered_map<uint64_t, SiteRequests> requests;
};

// ---- one byte pair of shared memory, for shadow.cpp ----

struct Read {
  int thread;
  uint32_t clock;
};
struct Shadow {
  uint32_t write_epoch = 0, write_clock = 0, read_epoch = 0;
  int writer = -1;
  bool written = false, in_flight = false;
  std::vector<Read> reads;  // in read_epoch, since the last write
};

// ---- the block ----

struct Block {
  Dim3 index;
  uint32_t number = 0;  // in the grid, from 1
  int threads = 0, live = 0;
  const Launch* launch = nullptr;
  char* shared = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  uint32_t ready_warps = 0;
  int at_barrier = 0;
  Site barrier_site;
  bool aborted = false;
  uint64_t random_state = 1;
  uint32_t epoch = 0;        // grows at every barrier of the block, and from block to block
  uint32_t first_epoch = 0;  // of this block
  std::vector<Shadow> shadow;
  FiberContext main_context;
  char* stacks = nullptr;
  size_t stacks_bytes = 0;
};
extern Block block;
extern thread_local Fiber* current __attribute__((tls_model("initial-exec")));

constexpr uint32_t kSharedBase = 1024;  // 32-bit address of the pool's first byte
constexpr size_t kSharedLimit = 227 * 1024;

// ---- scheduler.cpp ----
uint32_t random_number();
void make_ready(Fiber& fiber);
void block_current(const char* what, const Site& site);
void maybe_yield();
[[noreturn]] void abort_block();

// ---- control.cpp ----
// Adds to the report; fatal: the block is given up, and the call does not return.
void report(bool fatal, const Site& site, const char* format, ...) __attribute__((format(printf, 3, 4)));
std::string describe(const Site& site);
size_t report_count();
void clear_report();
bool in_registered_range(const void* pointer, size_t bytes);

// ---- shadow.cpp ----
void shadow_start_block();
void shadow_access(uint32_t offset, uint32_t bytes, Access access, const Site& site);
void shadow_copy_started(uint32_t offset, uint32_t bytes, const Site& site);
void shadow_copy_landed(uint32_t offset, uint32_t bytes);
void shadow_warp_barrier(Warp& warp, uint32_t lanes);
void shadow_block_barrier();

// ---- global_shadow.cpp ----
void global_shadow_start_launch();
void global_shadow_access(const void* pointer, uint32_t bytes, Access access, const Site& site);

// ---- counters.cpp ----
void count_access(Traffic traffic, const void* pointer, uint32_t bytes, const Site& site);
void count_request(Traffic traffic, const Request& request, const Site& site);
void count_finish_block();

// ---- copies.cpp ----
void land_all(Fiber& fiber);

}  // namespace cuda_cnn::emulation
