// The emulator as kernels see it: what include/cuda_runtime.h and include/emulated_ptx.h are written in.
// A block runs as one fiber a CUDA thread on one CPU thread; a fiber gives way only inside these functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <experimental/source_location>

namespace cuda_cnn::emulation {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

// Where in a kernel something happened: a line where the call carries one, else the address of an
// instruction.
struct Site {
  const char* file = nullptr;
  int line = 0;
  const void* pc = nullptr;

  Site() = default;
  explicit Site(const void* instruction) : pc(instruction) {}
  Site(const std::experimental::source_location& location);
  bool operator==(const Site& other) const {
    return file == other.file && line == other.line && pc == other.pc;
  }
};

// Last parameter of every function that a kernel calls.
#define CUDA_CNN_SITE \
  const std::experimental::source_location& site = std::experimental::source_location::current()

// ---- identity; constant within a fiber, so the compiler may keep it ----
Dim3 thread_index() __attribute__((const));
Dim3 block_index() __attribute__((const));
void* shared_pool() __attribute__((const));

// ---- shared memory by its 32-bit address ----
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address, uint32_t bytes, const Site& site);  // checks the bounds

// ---- plain accesses, in either address space ----
enum class Access { kRead, kWrite, kAtomic };
void memory_access(const void* pointer, uint32_t bytes, Access access, const Site& site);

// ---- asynchronous copies ----
void copy_async(uint32_t destination, const void* source, uint32_t bytes, uint32_t source_bytes,
                const Site& site);
void copy_commit();
void copy_wait(uint32_t pending_groups);

// ---- the block's barrier ----
void block_barrier(const Site& site);

// ---- collectives of a warp: each lane brings its own `data`; the last lane to come runs fn for all of them
// ----
enum class WarpOp : uint8_t { kBarrier, kShuffle, kBallot, kLoadMatrix, kMma };
struct Warp;
using WarpFunction = void (*)(Warp& warp, uint32_t lanes, void* const* data, const Site& site);
void warp_collective(WarpOp op, uint32_t lanes, void* data, WarpFunction fn, const Site& site);

void warp_barrier(uint32_t lanes, const Site& site);

enum class ShuffleKind : uint8_t { kIndex, kUp, kDown, kXor };
struct ShuffleData {
  uint64_t value, result;
  ShuffleKind kind;
  int argument, width;
};
void shuffle(Warp& warp, uint32_t lanes, void* const* data, const Site& site);

struct BallotData {
  bool predicate;
  uint32_t result;
};
void ballot(Warp& warp, uint32_t lanes, void* const* data, const Site& site);

struct LoadMatrixData {
  uint32_t row_address;
  int matrices;
  bool transpose;
  uint32_t* fragment;
};
void load_matrix(Warp& warp, uint32_t lanes, void* const* data, const Site& site);

enum class MmaType : uint8_t { kBFloat16, kFloat16, kTf32 };
struct MmaData {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  MmaType type;
};
void mma(Warp& warp, uint32_t lanes, void* const* data, const Site& site);

// ---- launches ----
struct Launch {
  Dim3 grid, block;
  size_t shared_bytes;
  void (*run_thread)(const void* arguments);  // calls the kernel
  const void* arguments;
  size_t argument_bytes;
};
bool run(const Launch& launch);  // false: an error was reported
int launch_error();              // see Options
int attributes_error();
int current_gpu();
const char* last_report();

}  // namespace cuda_cnn::emulation
