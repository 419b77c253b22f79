// Atomics, and loads and stores with a say in caching, each one access of its full width.

#pragma once

#include <algorithm>

#include "warp.h"

namespace pykern::emulator {

struct Bits {
  uint64_t low, high;
};

// For the running thread; the caller is where the access is.
Bits load(const void* from, size_t bytes);
void store(void* to, Bits value, size_t bytes);
// An atomic operation in two parts, between which no other thread runs.
uint64_t atomic_load(const void* address, size_t bytes);
void atomic_store(void* address, uint64_t old, uint64_t value, size_t bytes);

template <class T>
__device__ T load_as(const T* from) {
  static_assert(sizeof(T) <= 16, "one access loads at most 16 bytes");
  const Bits bits = load(from, sizeof(T));
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}

template <class T>
__device__ void store_as(T* to, const T& value) {
  static_assert(sizeof(T) <= 16, "one access stores at most 16 bytes");
  Bits bits = {0, 0};
  std::memcpy(&bits, &value, sizeof value);
  store(to, bits, sizeof(T));
}

template <class T, class F>
__device__ T atomic(T* address, F f) {
  const uint64_t old = atomic_load(address, sizeof(T));
  const T value = from_bits<T>(old);
  atomic_store(address, old, to_bits(static_cast<T>(f(value))), sizeof(T));
  return value;
}

// Rounded once: a sum of two halves or bfloat16s rounded to float and then to its type is the sum rounded.
template <class T>
__device__ T sum(T a, T b) {
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(__half2float(a) + __half2float(b));
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(__bfloat162float(a) + __bfloat162float(b));
  else if constexpr (std::is_same_v<T, __half2> || std::is_same_v<T, __nv_bfloat162>)
    return T(sum(a.x, b.x), sum(a.y, b.y));
  else if constexpr (std::is_same_v<T, int>)
    return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
  else return a + b;
}

}  // namespace pykern::emulator

#define PYKERN_CACHED(name)                   \
  template <class T>                          \
  __device__ T name(const T* from) {          \
    return pykern::emulator::load_as(from);   \
  }
PYKERN_CACHED(__ldg)
PYKERN_CACHED(__ldca)
PYKERN_CACHED(__ldcg)
PYKERN_CACHED(__ldcs)
PYKERN_CACHED(__ldlu)
PYKERN_CACHED(__ldcv)
#undef PYKERN_CACHED

#define PYKERN_CACHED(name)                                      \
  template <class T>                                             \
  __device__ void name(T* to, std::type_identity_t<T> value) {   \
    pykern::emulator::store_as(to, value);                       \
  }
PYKERN_CACHED(__stwb)
PYKERN_CACHED(__stcg)
PYKERN_CACHED(__stcs)
PYKERN_CACHED(__stwt)
#undef PYKERN_CACHED

// An atomic with one operand, in the scopes of the device, the block and the system; `old` and `value` are what memory
// holds and the operand. The types are those that CUDA has it for.
#define PYKERN_ATOMIC(name, expression, ...)                                                                     \
  PYKERN_ATOMIC_SCOPE(name, expression, __VA_ARGS__)                                                             \
  PYKERN_ATOMIC_SCOPE(name##_block, expression, __VA_ARGS__)                                                     \
  PYKERN_ATOMIC_SCOPE(name##_system, expression, __VA_ARGS__)
#define PYKERN_ATOMIC_SCOPE(name, expression, ...)                                                               \
  template <pykern::emulator::OneOf<__VA_ARGS__> T>                                                              \
  __device__ T name(T* address, std::type_identity_t<T> value) {                                                 \
    return pykern::emulator::atomic(address, [&](T old) { return expression; });                                 \
  }
PYKERN_ATOMIC(
    atomicAdd, pykern::emulator::sum(old, value), int, unsigned, unsigned long long, float, double, __half, __half2,
    __nv_bfloat16, __nv_bfloat162)
PYKERN_ATOMIC(atomicSub, static_cast<T>(static_cast<unsigned>(old) - static_cast<unsigned>(value)), int, unsigned)
PYKERN_ATOMIC(atomicExch, (static_cast<void>(old), value), int, unsigned, unsigned long long, float)
PYKERN_ATOMIC(atomicMin, std::min(old, value), int, unsigned, long long, unsigned long long)
PYKERN_ATOMIC(atomicMax, std::max(old, value), int, unsigned, long long, unsigned long long)
PYKERN_ATOMIC(atomicAnd, (old & value), int, unsigned, unsigned long long)
PYKERN_ATOMIC(atomicOr, (old | value), int, unsigned, unsigned long long)
PYKERN_ATOMIC(atomicXor, (old ^ value), int, unsigned, unsigned long long)
PYKERN_ATOMIC(atomicInc, (old >= value ? 0 : old + 1), unsigned)
PYKERN_ATOMIC(atomicDec, (old == 0 || old > value ? value : old - 1), unsigned)
#undef PYKERN_ATOMIC_SCOPE
#undef PYKERN_ATOMIC

#define PYKERN_CAS(name)                                                                                         \
  template <pykern::emulator::OneOf<int, unsigned, unsigned long long, unsigned short> T>                        \
  __device__ T name(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {               \
    return pykern::emulator::atomic(address, [&](T old) { return old == expected ? value : old; });              \
  }
PYKERN_CAS(atomicCAS)
PYKERN_CAS(atomicCAS_block)
PYKERN_CAS(atomicCAS_system)
#undef PYKERN_CAS
