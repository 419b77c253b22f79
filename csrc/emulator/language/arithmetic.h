// CUDA's own arithmetic. What a GPU approximates (rsqrtf, __expf, __fdividef, …) is here more exact than there: rsqrtf
// is rounded once from double precision, the rest is the C library's. Kernels must not depend on those bits.

#pragma once

#include <math.h>
#include <stdlib.h>

#include <bit>
#include <cstdint>
#include <limits>

template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
__device__ constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) return x != x || y < x ? y : x;  // the number, if one is NaN
  else return y < x ? y : x;
}
template <class A, class B>
  requires(std::is_arithmetic_v<A> && std::is_arithmetic_v<B>)
__device__ constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  if constexpr (std::is_floating_point_v<T>) return x != x || x < y ? y : x;
  else return x < y ? y : x;
}

__device__ int __float_as_int(float x) { return std::bit_cast<int>(x); }
__device__ unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
__device__ float __int_as_float(int x) { return std::bit_cast<float>(x); }
__device__ float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
__device__ long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
__device__ double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

__device__ int __popc(unsigned x) { return std::popcount(x); }
__device__ int __popcll(unsigned long long x) { return std::popcount(x); }
__device__ int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
__device__ int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
__device__ int __ffs(int x) { return __builtin_ffs(x); }
__device__ int __ffsll(long long x) { return __builtin_ffsll(x); }
__device__ unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
__device__ unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7u))) & 0xffu;
    if (pick & 8u) byte = byte & 0x80u ? 0xffu : 0u;  // its sign, over the byte
    out |= byte << (8 * i);
  }
  return out;
}
__device__ unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31u) >> 32);
}
__device__ unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31u));
}
__device__ unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
__device__ unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
__device__ unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
__device__ int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
__device__ unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

__device__ float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
__device__ double rsqrt(double x) { return 1.0 / sqrt(x); }
__device__ float __frsqrt_rn(float x) { return rsqrtf(x); }
__device__ float __frcp_rn(float x) { return 1.0f / x; }
__device__ float __fsqrt_rn(float x) { return sqrtf(x); }
__device__ float __fdiv_rn(float a, float b) { return a / b; }
__device__ float __fadd_rn(float a, float b) { return a + b; }
__device__ float __fsub_rn(float a, float b) { return a - b; }
__device__ float __fmul_rn(float a, float b) { return a * b; }
__device__ float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
__device__ double __dadd_rn(double a, double b) { return a + b; }
__device__ double __dsub_rn(double a, double b) { return a - b; }
__device__ double __dmul_rn(double a, double b) { return a * b; }
__device__ double __ddiv_rn(double a, double b) { return a / b; }
__device__ double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
__device__ float __fdividef(float a, float b) { return a / b; }
__device__ float fdividef(float a, float b) { return a / b; }
__device__ float __saturatef(float x) { return x != x || x <= 0 ? 0.0f : x >= 1 ? 1.0f : x; }

__device__ float __expf(float x) { return expf(x); }
__device__ float __exp10f(float x) { return static_cast<float>(pow(10.0, static_cast<double>(x))); }
__device__ float __logf(float x) { return logf(x); }
__device__ float __log2f(float x) { return log2f(x); }
__device__ float __log10f(float x) { return log10f(x); }
__device__ float __powf(float x, float y) { return powf(x, y); }
__device__ float __sinf(float x) { return sinf(x); }
__device__ float __cosf(float x) { return cosf(x); }
__device__ float __tanf(float x) { return tanf(x); }
__device__ void __sincosf(float x, float* sine, float* cosine) {
  *sine = sinf(x);
  *cosine = cosf(x);
}

namespace pykern::emulator {

// As the hardware converts: to the nearest value that there is, NaN to zero.
template <class To, class From>
__device__ To saturating(From x) {
  using Limits = std::numeric_limits<To>;
  if (x != x) return 0;
  if (x <= static_cast<From>(Limits::min())) return Limits::min();
  if (x >= static_cast<From>(Limits::max())) return Limits::max();
  return static_cast<To>(x);
}

}  // namespace pykern::emulator

#define PYKERN_CONVERSIONS(from, name, to)                                                                 \
  __device__ to __##name##_rn(from x) { return pykern::emulator::saturating<to>(nearbyint(x)); }           \
  __device__ to __##name##_rz(from x) { return pykern::emulator::saturating<to>(trunc(x)); }               \
  __device__ to __##name##_rd(from x) { return pykern::emulator::saturating<to>(floor(x)); }               \
  __device__ to __##name##_ru(from x) { return pykern::emulator::saturating<to>(ceil(x)); }
PYKERN_CONVERSIONS(float, float2int, int)
PYKERN_CONVERSIONS(float, float2uint, unsigned)
PYKERN_CONVERSIONS(float, float2ll, long long)
PYKERN_CONVERSIONS(float, float2ull, unsigned long long)
PYKERN_CONVERSIONS(double, double2int, int)
PYKERN_CONVERSIONS(double, double2ll, long long)
#undef PYKERN_CONVERSIONS
__device__ float __int2float_rn(int x) { return static_cast<float>(x); }
__device__ float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
__device__ float __ll2float_rn(long long x) { return static_cast<float>(x); }
__device__ float __double2float_rn(double x) { return static_cast<float>(x); }
__device__ double __int2double_rn(int x) { return x; }
