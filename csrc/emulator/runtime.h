// The emulator's inside: what its parts know of each other. Device code sees language.h, launchers cuda/launch.h.
//
// A CUDA thread is a fiber; all fibers of a launch run on the one thread that launched. A fiber gives way only where it
// has to wait, so between two meetings with others (barrier, shuffle, …) it runs alone.

#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace pykern::emulator {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // what a block of sm_90 may ask for
constexpr size_t kMaxStaticSharedBytes = 48 * 1024;

struct BlockMemory;   // memory.cpp's books of a block
struct ThreadMemory;  // and of a thread

struct Launch {
  std::string kernel;  // demangled
  dim3 grid, block;
  size_t dynamic_shared_bytes;
};

struct Block {
  const Launch* launch;
  uint3 index;
  unsigned linear;   // x fastest
  unsigned threads;
  char* shared;      // kMaxSharedBytes of it, 128-byte aligned, the dynamic part first
  std::shared_ptr<BlockMemory> memory;
};

struct Thread {
  Block* block;
  uint3 index;
  unsigned linear;  // x fastest
  const char* stack_begin;
  const char* stack_end;
  std::shared_ptr<ThreadMemory> memory;

  unsigned lane() const { return linear % kWarpSize; }
  unsigned warp() const { return linear / kWarpSize; }
};

struct Place {
  const char* file;
  unsigned line;
};

// The thread whose fiber runs; null outside kernels, and for host threads other than the one that launched.
extern __thread Thread* running __attribute__((tls_model("initial-exec")));

// scheduler.cpp

// Ends the launch: the fiber never goes on, and launch() throws std::runtime_error that names what, where in the
// source, thread, warp, block and kernel.
[[noreturn]] void fault(const std::string& what, const void* pc);
[[noreturn]] void fault(const std::string& what, Place place);

// Waits until every lane of mask is here with the same `what`; the last one calls combine(lanes, mask), where lanes[i]
// is what lane i gave as `mine` (null outside mask). The base of shuffles, votes, ldmatrix and mma.
void warp_meet(
    unsigned mask, void* mine, void (*combine)(void* const* lanes, unsigned mask), const char* what, Place place);

// Lets other threads of resident blocks run: for a thread that polls memory, at pc.
void give_way(const void* pc = nullptr);

// memory.cpp, races.cpp, counters.cpp

enum class Access : uint8_t { read, write, atomic };

// Every access of device code to memory that is not its own stack comes here before it happens: from the compiler's
// hooks, and from wrappers that stand for an instruction of their own. Checks bounds, alignment, initialisation, right
// to write, and races; counts bytes, sectors and bank conflicts.
void access(const void* address, size_t bytes, Access kind, const void* pc);

// cp.async: the copy lands when its thread waits for its group, and a read of `to` before that is a fault. What is past
// `filled` of the `bytes` is zeros.
void async_copy(void* to, const void* from, size_t bytes, size_t filled, const void* pc);
void async_commit();
void async_wait(unsigned groups_left);

// The variable that `tag` stands for in the running thread's block, the same for all its threads; uninitialised.
void* static_shared(const void* tag, const char* name, size_t bytes, size_t alignment);

void count_tensor_flops(double flops);
void count_barrier();

// What the scheduler tells the books. A meeting that orders memory (barriers, __syncwarp): all that any participant did
// before happened before what any of them does after it.
void on_launch(const Launch& launch);
void on_launch_end(const Launch& launch, bool failed);
void on_block(Block& block);
void on_block_end(Block& block);
void on_thread(Thread& thread);
// Those that told on_arrival they arrive at this barrier, and do not wait, learn nothing.
void on_meeting(Block& block, std::span<Thread* const> participants, int barrier = -1);
void on_arrival(Thread& thread, int barrier);
// Every lane of the warp that still lives waits, or has waited, at the same place: accesses so far can be matched up.
void on_converged(Block& block, unsigned warp);
void on_fence(Thread& thread);  // __threadfence

// Source line of a program counter, "norm.cuh:57" (slow: asks addr2line).
std::string locate(const void* pc);

// Global memory that kernels may touch: the tensors that the launcher named, while its session lasts. `granule` is the
// element's size. What is not initialised must be written before it is read.
void session_begin();
void session_end();
void add_region(
    const void* begin, size_t bytes, size_t granule, bool writable, bool initialised, const char* name);

}  // namespace pykern::emulator
