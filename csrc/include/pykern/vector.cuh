// Elements as they move through memory, and the numbers they stand for. Kernels compute in fp32 and keep what they have
// loaded as it came: a 16-bit element takes half a register, and turning it into fp32 again is one instruction.

#pragma once

#include "device.cuh"

namespace pykern {

// fp32 from an element and back, one at a time or as the two halves of a word.
template <class T>
struct Element;

template <>
struct Element<float> {
  static __device__ float widen(float value) { return value; }
  static __device__ float narrow(float value) { return value; }
};

template <>
struct Element<__half> {
  static __device__ float widen(__half value) { return __half2float(value); }
  static __device__ __half narrow(float value) { return __float2half_rn(value); }
  static __device__ float2 widen_pair(unsigned word) { return __half22float2(*reinterpret_cast<__half2*>(&word)); }
  static __device__ unsigned narrow_pair(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
  }
};

template <>
struct Element<__nv_bfloat16> {
  static __device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
  static __device__ __nv_bfloat16 narrow(float value) { return __float2bfloat16_rn(value); }
  static __device__ float2 widen_pair(unsigned word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
  static __device__ unsigned narrow_pair(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<unsigned*>(&pair);
  }
};

// The value that T would hold.
template <class T>
__device__ float rounded(float value) {
  return Element<T>::widen(Element<T>::narrow(value));
}

// How many elements the widest access moves: 16 bytes of them.
template <class T>
constexpr int kFullWidth = 16 / static_cast<int>(sizeof(T));

// What one access moves: one element, or 16 bytes of them, aligned to 16 bytes. A plain struct of kWidth elements would
// be moved element by element.
template <class T, int kWidth>
struct Pack {
  static_assert(kWidth == 1 || kWidth == kFullWidth<T>);
  std::conditional_t<kWidth == 1, T, uint4> bits;
};

template <int kWidth, class T>
__device__ Pack<T, kWidth> load_pack(const T* from) {
  return {*reinterpret_cast<const decltype(Pack<T, kWidth>::bits)*>(from)};
}

template <int kWidth, class T>
__device__ void store_pack(T* to, Pack<T, kWidth> pack) {
  *reinterpret_cast<decltype(pack.bits)*>(to) = pack.bits;
}

template <class T, int kWidth>
__device__ void widen(const Pack<T, kWidth>& pack, float (&out)[kWidth]) {
  if constexpr (kWidth == 1) {
    out[0] = Element<T>::widen(pack.bits);
  } else {
    const unsigned words[4] = {pack.bits.x, pack.bits.y, pack.bits.z, pack.bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        out[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = Element<T>::widen_pair(words[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
      }
    }
  }
}

template <class T, int kWidth>
__device__ Pack<T, kWidth> narrow(const float (&values)[kWidth]) {
  if constexpr (kWidth == 1) {
    return {Element<T>::narrow(values[0])};
  } else {
    unsigned words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) words[i] = __float_as_uint(values[i]);
      else words[i] = Element<T>::narrow_pair(values[2 * i], values[2 * i + 1]);
    }
    return {make_uint4(words[0], words[1], words[2], words[3])};
  }
}

// kWidth elements of any type as fp32, and the other way round, in accesses as wide as kWidth and T allow.
template <class T, int kWidth>
__device__ void load_floats(const T* from, float (&out)[kWidth]) {
  constexpr int kStep = kWidth < kFullWidth<T> ? 1 : kFullWidth<T>;
#pragma unroll
  for (int i = 0; i < kWidth; i += kStep) {
    float part[kStep];
    widen(load_pack<kStep>(from + i), part);
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[i + j] = part[j];
  }
}

template <class T, int kWidth>
__device__ void store_floats(T* to, const float (&values)[kWidth]) {
  constexpr int kStep = kWidth < kFullWidth<T> ? 1 : kFullWidth<T>;
#pragma unroll
  for (int i = 0; i < kWidth; i += kStep) {
    float part[kStep];
#pragma unroll
    for (int j = 0; j < kStep; ++j) part[j] = values[i + j];
    store_pack<kStep>(to + i, narrow<T, kStep>(part));
  }
}

}  // namespace pykern
