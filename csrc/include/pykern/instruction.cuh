// What the wrappers of single instructions share: mma.cuh, matrix.cuh, copy_async.cuh. Under nvcc a wrapper is one PTX
// instruction, under the emulator's g++ a call of emulator/tensor.h.

#pragma once

#include "device.cuh"

#include <cstdint>

#ifdef __CUDACC__
#define PYKERN_CALLER
#define PYKERN_PASS_CALLER
#else
#include "../../emulator/tensor.h"
// The last parameter of a wrapper: the line that calls it, for the emulator's messages; and how it is handed on.
#define PYKERN_CALLER , PYKERN_HERE
#define PYKERN_PASS_CALLER , place
#endif

namespace pykern {

// This thread's number in its warp, in a block of any shape.
__device__ __forceinline__ int lane_id() {
#ifdef __CUDACC__
  uint32_t lane;
  asm("mov.u32 %0, %%laneid;" : "=r"(lane));
  return static_cast<int>(lane);
#else
  return emulator::lane_id();
#endif
}

// An address as the instructions on shared memory take it, and back.
#ifdef __CUDACC__
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ void* shared_pointer(SharedAddress address) { return __cvta_shared_to_generic(address); }
#else
using SharedAddress = uintptr_t;
__device__ __forceinline__ SharedAddress shared_address(const void* pointer) {
  return reinterpret_cast<SharedAddress>(pointer);
}
__device__ __forceinline__ void* shared_pointer(SharedAddress address) { return reinterpret_cast<void*>(address); }
#endif

}  // namespace pykern
