// cp.async: copies from global to shared memory that pass no register and run beside other work (sm_80 and later; PTX
// ISA, "Non-bulk copy").
//
//   cp_async<16>(to, from);      // once a thread and 16 bytes
//   cp_async_commit();           // what this thread began since its last commit is now a group
//   cp_async_wait<1>();          // all of this thread's groups but the latest 1 have landed
//   __syncthreads();             // and so have those of the other threads
//
// What has not landed must not be read, nor its source changed. A wait speaks for the calling thread's copies only.
//
// Hopper's bulk copies (TMA) complete otherwise: whoever waits, waits on an mbarrier in shared memory that counts the
// bytes which land. Their wrappers belong into tma.cuh and the barrier's into mbarrier.cuh, with the emulator's
// async_copy as the base: a copy names its barrier in place of a thread's group, and lands when a wait on that phase of
// the barrier returns. cp.async can report to one too, by cp.async.mbarrier.arrive.noinc: a function beside
// cp_async_commit that hands the thread's open copies to a barrier.

#pragma once

#include "instruction.cuh"

namespace pykern {

// Begins a copy of kBytes = 4, 8 or 16, both addresses aligned to as much. With `filled` below kBytes only so many of
// them are read, none with 0, and the rest of `to` becomes zeros: for a tile's edge. Copies of 16 bytes go past L1.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* to, const void* from, int filled = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "r"(filled)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(__cvta_generic_to_global(from)), "n"(kBytes), "r"(filled)
                 : "memory");
#else
  emulator::cp_async(to, from, kBytes, filled);
#endif
}

// 16 bytes that are read once: they go first when the second-level cache needs room.
__device__ __forceinline__ void cp_async_once(void* to, const void* from, int filled = 16) {
#ifdef __CUDACC__
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(filled), "l"(policy)
               : "memory");
#else
  emulator::cp_async(to, from, 16, filled);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulator::async_commit();
#endif
}

template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  static_assert(kGroupsLeft >= 0);
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  emulator::async_wait(kGroupsLeft);
#endif
}

// All of this thread's copies, committed or not.
__device__ __forceinline__ void cp_async_wait_all() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emulator::async_commit();
  emulator::async_wait(0);
#endif
}

}  // namespace pykern
