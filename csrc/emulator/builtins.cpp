// What device code knows of itself, and its accesses that are not the compiler's.

#include <cstring>

#include "language.h"
#include "scheduler.h"

#undef threadIdx
#undef blockIdx

namespace pykern::emulator {

uint3 thread_index() { return running->index; }
uint3 block_index() { return running->block->index; }
dim3 block_size() { return running->block->launch->block; }
dim3 grid_size() { return running->block->launch->grid; }
void* dynamic_shared_memory() { return running->block->shared; }

// Grows with every look, and is the same in every run.
long long clock_ticks() {
  static long long ticks = 0;
  return ticks += 16;
}

void thread_fence() { on_fence(*running); }
void failed(const char* what, Place place) { fault(what, place); }

Bits load(const void* from, size_t bytes) {
  access(from, bytes, Access::read, __builtin_return_address(0));
  Bits bits = {0, 0};
  std::memcpy(&bits, from, bytes);
  return bits;
}

void store(void* to, Bits value, size_t bytes) {
  access(to, bytes, Access::write, __builtin_return_address(0));
  std::memcpy(to, &value, bytes);
}

uint64_t atomic_load(const void* address, size_t bytes) {
  access(address, bytes, Access::atomic, __builtin_return_address(0));
  uint64_t bits = 0;
  std::memcpy(&bits, address, bytes);
  return bits;
}

void atomic_store(void* address, uint64_t old, uint64_t value, size_t bytes) {
  constexpr int kPatience = 4;  // atomics in a row that change nothing, until the thread is taken to poll
  std::memcpy(address, &value, bytes);
  EmulatedThread& me = self();
  if (old != value) {
    me.idle_atomics = 0;
    note_progress();
  } else if (++me.idle_atomics >= kPatience) {
    give_way(__builtin_return_address(0));
  }
}

}  // namespace pykern::emulator
