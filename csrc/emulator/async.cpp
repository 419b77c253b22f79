// cp.async: what is on its way may be neither read nor written until the thread that copies has waited.

#include <cstring>

#include "memory.h"

namespace pykern::emulator {
namespace {

// f(word, mask) for the words of a bitmap of shared memory; a copy is aligned, so it is within one.
uint64_t mask_of(size_t offset, size_t bytes) { return (~uint64_t{0} >> (64 - bytes)) << offset % 64; }

Now now_of(const void* address, size_t bytes, Access kind, const void* pc) {
  return {running, running->memory.get(), reinterpret_cast<uintptr_t>(address), bytes, kind, false, pc};
}

void land(const Copy& copy) {
  if (std::memcmp(copy.data, copy.from, copy.filled))
    fault("race: the source of the cp.async copy that began at " + locate(copy.pc) + ", " +
        describe(*running->block, reinterpret_cast<uintptr_t>(copy.from)) +
        ", was written before the copy was waited for", copy.pc);
  BlockMemory& memory = *running->block->memory;
  const size_t offset = copy.to - running->block->shared;
  memory.pending[offset / 64] &= ~mask_of(offset, copy.bytes);
  --memory.pending_copies;
  touch_shared(now_of(copy.to, copy.bytes, Access::write, copy.pc));
  std::memcpy(copy.to, copy.data, copy.bytes);
}

}  // namespace

void fault_pending(const Now& now) {
  const Block& block = *now.thread->block;
  for (const Thread* thread : block.memory->threads) {
    for (const Copy& copy : thread->memory->copies) {
      const auto to = reinterpret_cast<uintptr_t>(copy.to);
      if (to >= now.address + now.bytes || now.address >= to + copy.bytes) continue;
      fault("cp.async: " + std::string(now.kind == Access::read ? "reads " : "writes ") + describe(block, to) +
          " before the copy that thread " + std::to_string(thread->linear) + " began at " + locate(copy.pc) +
          " is waited for", now.pc);
    }
  }
  fault("cp.async: touches a copy before it is waited for", now.pc);
}

void async_copy(void* to, const void* from, size_t bytes, size_t filled, const void* pc) {
  if ((bytes != 4 && bytes != 8 && bytes != 16) || filled > bytes)
    fault("cp.async: copies 4, 8 or 16 bytes, not " + std::to_string(filled) + " of " + std::to_string(bytes), pc);
  const Now write = now_of(to, bytes, Access::write, pc), read = now_of(from, filled, Access::read, pc);
  if (!is_shared(*running->block, write.address)) fault("cp.async: copies to what is not shared memory", pc);
  check_alignment(write, bytes);
  check_alignment(read, bytes);
  if (filled && !touch_global(read)) {
    access(from, filled, Access::read, pc);
    fault("cp.async: copies from what is not global memory", pc);
  }
  // It may land from now on, so it is a write of now as well as of the wait.
  touch_shared(write);
  if (counting) {
    if (filled) count_requests(read);
    count_requests(write);
  }
  BlockMemory& memory = *running->block->memory;
  const size_t offset = write.address - reinterpret_cast<uintptr_t>(running->block->shared);
  memory.pending[offset / 64] |= mask_of(offset, bytes);
  ++memory.pending_copies;
  Copy copy = {static_cast<char*>(to), static_cast<const char*>(from), bytes, filled, {}, pc};
  std::memcpy(copy.data, from, filled);
  running->memory->copies.push_back(copy);
}

void async_commit() {
  ThreadMemory& memory = *running->memory;
  memory.groups.push_back(memory.copies.size());
}

void async_wait(unsigned groups_left) {
  ThreadMemory& memory = *running->memory;
  if (memory.groups.size() <= groups_left) return;
  const size_t groups = memory.groups.size() - groups_left, copies = memory.groups[groups - 1];
  for (size_t i = 0; i < copies; ++i) land(memory.copies[i]);
  memory.copies.erase(memory.copies.begin(), memory.copies.begin() + copies);
  memory.groups.erase(memory.groups.begin(), memory.groups.begin() + groups);
  for (size_t& end : memory.groups) end -= copies;
}

}  // namespace pykern::emulator
