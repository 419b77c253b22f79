// The CUDA language for g++, so that device code runs on the emulator. Included through pykern/device.cuh.
//
// Device functions must be inlined whole, since g++ hides from the memory hooks what a call returns and is then stored:
// so __device__ says `inline`, and beside it __forceinline__ and __noinline__ say nothing (g++ refuses a second
// `inline`: write __device__ __forceinline__, never __device__ inline). Tables are `__constant__ constexpr`.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <type_traits>

#include "collectives.h"

#undef __device__
#undef __global__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __constant__
#undef __shared__
#undef __align__
#define __device__ inline __attribute__((always_inline))
#define __global__
#define __host__
#define __forceinline__
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ inline
#define __shared__ static_assert(false, "device code that the emulator runs declares PYKERN_SHARED(name, type)");
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_assume(condition) static_cast<void>(0)

// Where a function with a parameter `PYKERN_HERE` was called.
#define PYKERN_HERE ::pykern::emulator::Place place = {__builtin_FILE(), __builtin_LINE()}

namespace pykern::emulator {

// What a thread knows of itself never changes while it runs.
[[gnu::const]] uint3 thread_index();
[[gnu::const]] uint3 block_index();
[[gnu::const]] dim3 block_size();
[[gnu::const]] dim3 grid_size();
[[gnu::const]] void* dynamic_shared_memory();
long long clock_ticks();
void thread_fence();
[[noreturn]] void failed(const char* what, Place place);

}  // namespace pykern::emulator

#define threadIdx (::pykern::emulator::thread_index())
#define blockIdx (::pykern::emulator::block_index())
#define blockDim (::pykern::emulator::block_size())
#define gridDim (::pykern::emulator::grid_size())
constexpr int warpSize = 32;

// The tag's address is the variable's identity: one for each place, and for each instantiation of a template.
#define PYKERN_SHARED(name, ...)                                                        \
  static const char pykern_tag_of_##name = 0;                                           \
  auto& name = *static_cast<::std::type_identity_t<__VA_ARGS__>*>(                      \
      ::pykern::emulator::static_shared(                                                \
          &pykern_tag_of_##name, #name, sizeof(::std::type_identity_t<__VA_ARGS__>),    \
          alignof(::std::type_identity_t<__VA_ARGS__>)))

namespace pykern {

template <class T>
__device__ T* dynamic_shared() {
  return static_cast<T*>(emulator::dynamic_shared_memory());
}

}  // namespace pykern

__device__ void __syncthreads(PYKERN_HERE) {
  pykern::emulator::sync_block(pykern::emulator::BlockVote::none, false, place);
}
__device__ int __syncthreads_count(int predicate, PYKERN_HERE) {
  return pykern::emulator::sync_block(pykern::emulator::BlockVote::count, predicate != 0, place);
}
__device__ int __syncthreads_and(int predicate, PYKERN_HERE) {
  return pykern::emulator::sync_block(pykern::emulator::BlockVote::all, predicate != 0, place);
}
__device__ int __syncthreads_or(int predicate, PYKERN_HERE) {
  return pykern::emulator::sync_block(pykern::emulator::BlockVote::any, predicate != 0, place);
}

__device__ void __threadfence() { pykern::emulator::thread_fence(); }
__device__ void __threadfence_block() { pykern::emulator::thread_fence(); }
__device__ void __threadfence_system() { pykern::emulator::thread_fence(); }
// A place where a thread may poll: others run meanwhile.
__device__ void __nanosleep(unsigned) { pykern::emulator::give_way(__builtin_return_address(0)); }
__device__ long long clock64() { return pykern::emulator::clock_ticks(); }
__device__ void __trap(PYKERN_HERE) { pykern::emulator::failed("__trap()", place); }

#include <cassert>
#undef assert
#define assert(condition) \
  ((condition) ? static_cast<void>(0) \
               : ::pykern::emulator::failed("assert(" #condition ") failed", {__FILE__, __LINE__}))

#include "language/arithmetic.h"
#include "language/memory.h"
#include "language/warp.h"
