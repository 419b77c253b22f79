// Barriers of a part of a block: numbers 1 to 15 (0 is that of __syncthreads), for a multiple of 32 threads, counted
// however they come. named_barrier_sync waits for the rest; named_barrier_arrive does not.

#pragma once

#include "device.cuh"

namespace pykern {

#ifdef __CUDACC__

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#else

__device__ void named_barrier_sync(int id, int threads, PYKERN_HERE) {
  emulator::named_barrier(id, threads, true, place);
}
__device__ void named_barrier_arrive(int id, int threads, PYKERN_HERE) {
  emulator::named_barrier(id, threads, false, place);
}

#endif

}  // namespace pykern
