// Shuffles, votes and reductions of a warp.

#pragma once

#include <bit>
#include <cstring>

namespace pykern::emulator {

template <class T, class... Types>
concept OneOf = (std::is_same_v<T, Types> || ...);

template <class T>
concept Word = OneOf<T, int, unsigned, long, unsigned long, long long, unsigned long long, float, double>;

template <class T>
concept Shuffles = Word<T> || OneOf<T, __half, __half2, __nv_bfloat16, __nv_bfloat162>;

template <class T>
__device__ uint64_t to_bits(const T& value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
__device__ T from_bits(uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof value);
  return value;
}

template <class T>
__device__ T shuffle_value(Shuffle kind, unsigned mask, T value, unsigned source, int width, Place place) {
  return from_bits<T>(shuffle(kind, mask, to_bits(value), source, static_cast<unsigned>(width), place));
}

}  // namespace pykern::emulator

template <pykern::emulator::Shuffles T>
__device__ T __shfl_sync(unsigned mask, T value, int source, int width = warpSize, PYKERN_HERE) {
  return pykern::emulator::shuffle_value(pykern::emulator::Shuffle::index, mask, value, source, width, place);
}
template <pykern::emulator::Shuffles T>
__device__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, PYKERN_HERE) {
  return pykern::emulator::shuffle_value(pykern::emulator::Shuffle::up, mask, value, delta, width, place);
}
template <pykern::emulator::Shuffles T>
__device__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, PYKERN_HERE) {
  return pykern::emulator::shuffle_value(pykern::emulator::Shuffle::down, mask, value, delta, width, place);
}
template <pykern::emulator::Shuffles T>
__device__ T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, PYKERN_HERE) {
  return pykern::emulator::shuffle_value(pykern::emulator::Shuffle::bits, mask, value, lane_mask, width, place);
}

__device__ void __syncwarp(unsigned mask = 0xffffffffu, PYKERN_HERE) { pykern::emulator::sync_warp(mask, place); }

__device__ int __all_sync(unsigned mask, int predicate, PYKERN_HERE) {
  return static_cast<int>(pykern::emulator::vote(pykern::emulator::Vote::all, mask, predicate != 0, place));
}
__device__ int __any_sync(unsigned mask, int predicate, PYKERN_HERE) {
  return static_cast<int>(pykern::emulator::vote(pykern::emulator::Vote::any, mask, predicate != 0, place));
}
__device__ unsigned __ballot_sync(unsigned mask, int predicate, PYKERN_HERE) {
  return pykern::emulator::vote(pykern::emulator::Vote::ballot, mask, predicate != 0, place);
}
template <pykern::emulator::Word T>
__device__ unsigned __match_any_sync(unsigned mask, T value, PYKERN_HERE) {
  return pykern::emulator::match(pykern::emulator::Match::any, mask, pykern::emulator::to_bits(value), place);
}
template <pykern::emulator::Word T>
__device__ unsigned __match_all_sync(unsigned mask, T value, int* predicate, PYKERN_HERE) {
  const unsigned lanes =
      pykern::emulator::match(pykern::emulator::Match::all, mask, pykern::emulator::to_bits(value), place);
  *predicate = lanes != 0;
  return lanes;
}
[[gnu::error("which lanes run together is chance: pass on the mask of those that the algorithm means")]]
unsigned __activemask();

#define PYKERN_REDUCE(name, type, kind)                                                                              \
  __device__ type __reduce_##name##_sync(unsigned mask, type value, PYKERN_HERE) {                                   \
    return static_cast<type>(pykern::emulator::reduce(                                                               \
        pykern::emulator::Reduce::kind, mask, static_cast<unsigned>(value), place));                                 \
  }
PYKERN_REDUCE(add, unsigned, add)
PYKERN_REDUCE(min, unsigned, min)
PYKERN_REDUCE(max, unsigned, max)
PYKERN_REDUCE(add, int, add)
PYKERN_REDUCE(min, int, min_signed)
PYKERN_REDUCE(max, int, max_signed)
PYKERN_REDUCE(and, unsigned, bit_and)
PYKERN_REDUCE(or, unsigned, bit_or)
PYKERN_REDUCE(xor, unsigned, bit_xor)
#undef PYKERN_REDUCE
