// Vectors of floats as wide as the instruction set, and loads and stores that convert 16-bit types.
//
// A file that includes this is compiled once per instruction set and linked together with its siblings. Everything
// here has internal linkage, because the linker keeps one copy of a shared inline function, which could be the AVX512
// one on a machine that has none. For the same reason no such file includes a header of C++ functions.

#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef PYKERN_INLINE  // heads.h has it too
#define PYKERN_INLINE inline __attribute__((always_inline))
#endif
#define PYKERN_LAMBDA __attribute__((always_inline))

namespace pykern {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef double Double __attribute__((vector_size(8 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Bits16 __attribute__((vector_size(2 * kLanes)));

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

// Loads and stores of the first `count` lanes only; the other lanes read as zero. The count is kLanes, known to the
// compiler, except at the end of a row.
template <class Lanes, class T>
PYKERN_INLINE Lanes load_bits(const T* p, int count) {
  Lanes v = {};
#if defined(__AVX512F__)
  if (count != kLanes) {
    if constexpr (sizeof(T) == 4) return (Lanes)_mm512_maskz_loadu_epi32((1u << count) - 1, p);
    else return (Lanes)_mm256_maskz_loadu_epi16((1u << count) - 1, p);
  }
#endif
  memcpy(&v, p, count * sizeof(T));
  return v;
}

template <class Lanes, class T>
PYKERN_INLINE void store_bits(T* p, Lanes v, int count) {
#if defined(__AVX512F__)
  if (count != kLanes) {
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_epi32(p, (1u << count) - 1, (__m512i)v);
    else _mm256_mask_storeu_epi16(p, (1u << count) - 1, (__m256i)v);
    return;
  }
#endif
  memcpy(p, &v, count * sizeof(T));
}

#if defined(__x86_64__)
template <class Lanes>
PYKERN_INLINE void stream_bits(void* p, Lanes v) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) return _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#if defined(__AVX__)
  if constexpr (sizeof v == 32) return _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
  if constexpr (sizeof v == 16) return _mm_stream_si128((__m128i*)p, (__m128i)v);
  if constexpr (sizeof v == 8) return _mm_stream_si64((long long*)p, (long long)v);
}
#endif

// GCC 12 makes four instructions of a zero extension to 512 bits, where there is one.
#if defined(__AVX512F__)
PYKERN_INLINE Bits extend(Bits16 v) { return (Bits)_mm512_cvtepu16_epi32((__m256i)v); }
PYKERN_INLINE Bits16 truncate(Bits v) { return (Bits16)_mm512_cvtepi32_epi16((__m512i)v); }
#elif defined(__AVX2__)
PYKERN_INLINE Bits extend(Bits16 v) { return (Bits)_mm256_cvtepu16_epi32((__m128i)v); }
PYKERN_INLINE Bits16 truncate(Bits v) { return __builtin_convertvector(v, Bits16); }
#else
PYKERN_INLINE Bits extend(Bits16 v) { return __builtin_convertvector(v, Bits); }
PYKERN_INLINE Bits16 truncate(Bits v) { return __builtin_convertvector(v, Bits16); }
#endif

PYKERN_INLINE Vec widen(Bits16 v, bf16) { return (Vec)(extend(v) << 16); }

PYKERN_INLINE Bits16 narrow(Vec v, bf16) {
  const Bits bits = (Bits)v;
  const Bits rounded = bits + 0x7fff + (bits >> 16 & 1);  // to nearest, ties to even
  const Bits quiet = Bits{} + 0x7fc00000;                 // a NaN that was rounded could come out as a number
  return truncate((v == v ? rounded : quiet) >> 16);
}

#if defined(__AVX512F__)
PYKERN_INLINE Vec widen(Bits16 v, f16) { return (Vec)_mm512_cvtph_ps((__m256i)v); }
PYKERN_INLINE Bits16 narrow(Vec v, f16) { return (Bits16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
PYKERN_INLINE Vec widen(Bits16 v, f16) { return (Vec)_mm256_cvtph_ps((__m128i)v); }
PYKERN_INLINE Bits16 narrow(Vec v, f16) { return (Bits16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
PYKERN_INLINE Vec widen(Bits16 half, f16) {
  const Bits bits = extend(half);
  const Bits magnitude = (bits & 0x7fff) << 13;
  // The product moves the exponent from a bias of 15 to one of 127, and makes halves' subnormals normal.
  const Bits finite = (Bits)((Vec)magnitude * 0x1p112f);
  return (Vec)((magnitude < (0x7c00u << 13) ? finite : magnitude | 0x7f800000) | (bits & 0x8000) << 16);
}

PYKERN_INLINE Bits16 narrow(Vec v, f16) {
  const Bits sign = (Bits)v >> 16 & 0x8000;
  const Bits bits = (Bits)v & 0x7fffffff;
  const Bits normal = (bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13;
  // Adding 0.5 leaves a multiple of 2^-24, the smallest half, in the low bits, rounded by the addition.
  const Bits subnormal = (Bits)((Vec)bits + 0.5f) - 0x3f000000;
  const Bits special = bits > 0x7f800000 ? 0x7e00 | (bits >> 13 & 0x3ff) : Bits{} + 0x7c00;
  const Bits finite = bits < (113u << 23) ? subnormal : normal;
  return truncate((bits < 0x477ff000 ? finite : special) | sign);
}
#endif

PYKERN_INLINE Vec load(const float* p, int count = kLanes) { return load_bits<Vec>(p, count); }
PYKERN_INLINE void store(float* p, Vec v, int count = kLanes) { store_bits(p, v, count); }

template <class T>
PYKERN_INLINE Vec load(const T* p, int count = kLanes) {
  return widen(load_bits<Bits16>(p, count), T{});
}

template <class T>
PYKERN_INLINE void store(T* p, Vec v, int count = kLanes) {
  store_bits(p, narrow(v, T{}), count);
}

// A store past the caches to an address that is a multiple of the vector's size; finish with stream_end().
template <class T>
PYKERN_INLINE void stream(T* p, Vec v) {
#if defined(__x86_64__)
  if constexpr (sizeof(T) == 4) stream_bits(p, v);
  else stream_bits(p, narrow(v, T{}));
#else
  store(p, v);
#endif
}

PYKERN_INLINE void stream_end() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// The value that a store and a load would leave.
template <class T>
PYKERN_INLINE Vec rounded(Vec v) {
  if constexpr (sizeof(T) == 4) return v;
  else return widen(narrow(v, T{}), T{});
}

PYKERN_INLINE Vec all(float value) { return Vec{} + value; }

// a · b + c. The build fuses nothing by itself: what is rounded is to be seen here.
PYKERN_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The first `count` lanes of v, zero in the others.
PYKERN_INLINE Vec first(Vec v, int count) {
  if (count == kLanes) return v;
  Bits lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < Bits{} + count ? v : Vec{};
}

#if defined(__AVX512F__)
PYKERN_INLINE float sum(Vec v) { return _mm512_reduce_add_ps((__m512)v); }
PYKERN_INLINE double sum(Double v) {
  __m512d halves[2];
  memcpy(halves, &v, sizeof v);
  return _mm512_reduce_add_pd(halves[0] + halves[1]);
}
#else
template <class Lanes>
PYKERN_INLINE auto sum(Lanes v) {
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
}
#endif

// body(i, count) for every vector of a row of n elements.
template <class Body>
PYKERN_INLINE void each(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, kLanes);
  if (i < n) body(i, static_cast<int>(n - i));
}

// Sums over a row: body(i, count, sum) adds to a vector. Four chains of additions hide their latency. After eight of
// each they go on to fp64, so that the result is good to the last bit of fp32 whatever the row's length and mean.
template <class Body>
PYKERN_INLINE double sum_each(int64_t n, Body body) {
  constexpr int kChains = 4, kSteps = 8;
  Double total = {};
  int64_t i = 0;
  while (i < n) {
    Vec sums[kChains] = {};
    for (int step = 0; step < kSteps && i + kChains * kLanes <= n; ++step)
      for (int chain = 0; chain < kChains; ++chain, i += kLanes) body(i, kLanes, sums[chain]);
    if (i + kChains * kLanes > n) {
      for (int chain = 0; chain < kChains - 1; ++chain) {
        if (i + kLanes > n) break;
        body(i, kLanes, sums[chain]);
        i += kLanes;
      }
      if (i < n) body(i, static_cast<int>(n - i), sums[kChains - 1]);
      i = n;
    }
    total += __builtin_convertvector((sums[0] + sums[1]) + (sums[2] + sums[3]), Double);
  }
  return sum(total);
}

}  // namespace
}  // namespace pykern
