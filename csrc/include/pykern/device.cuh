// The language of device code, under nvcc and under the emulator's g++. Every device header includes this first.
//
// What both sides cannot spell alike stands here:
//   PYKERN_SHARED(name, type)    a variable in static shared memory: PYKERN_SHARED(sums, float[32]);
//   dynamic_shared<T>()          the block's dynamic shared memory, 128-byte aligned
// Everything else is CUDA as it is: threadIdx, __syncthreads, __shfl_xor_sync, atomicAdd, …

#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#define PYKERN_SHARED(name, ...) __shared__ ::std::type_identity_t<__VA_ARGS__> name

namespace pykern {

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char pykern_dynamic_shared[];
  return reinterpret_cast<T*>(pykern_dynamic_shared);
}

}  // namespace pykern

#else

#include "../../emulator/language.h"

#endif

namespace pykern {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

}  // namespace pykern
