// Elementary functions and random words, a vector at a time.

#pragma once

#include "vec.h"

namespace pykern {
namespace {

// The value in every lane. A difference with +0 is the value itself, -0 too, so that only the broadcast remains.
PYKERN_INLINE Vec splat(float value) { return value - Vec{}; }

// (e^f - 1) / f for |f| <= ln(2) / 2, fitted for the smallest relative error of e^f - 1, which is 1.3e-8.
PYKERN_INLINE Vec exp_slope(Vec f) {
  Vec q = splat(1.3882515e-3f);
  q = fma(q, f, splat(8.3665475e-3f));
  q = fma(q, f, splat(4.1667200e-2f));
  q = fma(q, f, splat(1.6666543e-1f));
  q = fma(q, f, splat(4.9999997e-1f));
  return fma(q, f, splat(1));
}

#if defined(__AVX512F__)
PYKERN_INLINE Vec round(Vec x) { return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
// x · 2^n for a whole n.
PYKERN_INLINE Vec scale_exponent(Vec x, Vec n) { return (Vec)_mm512_scalef_ps((__m512)x, (__m512)n); }
PYKERN_INLINE Vec reciprocal(Vec x) {
  const Vec estimate = (Vec)_mm512_rcp14_ps((__m512)x);
  return fma(estimate, fma(-x, estimate, splat(1)), estimate);
}
#else
constexpr float kRound = 0x1.8p23f;  // a float this large has no fraction left
PYKERN_INLINE Vec round(Vec x) { return (x + kRound) - kRound; }
PYKERN_INLINE Vec scale_exponent(Vec x, Vec n) { return x * (Vec)((((Bits)(n + kRound)) << 23) + 0x3f800000); }
PYKERN_INLINE Vec reciprocal(Vec x) { return 1.f / x; }
#endif

// x = n · ln 2 + f with a whole n and |f| <= ln(2) / 2; the multiple of ln 2 is subtracted in two parts, the first exactly.
PYKERN_INLINE Vec reduce(Vec x, Vec& n) {
  n = round(x * splat(1.44269504f));
  return fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
}

// e^x for x below 88; zero where the result would be subnormal, which is slow and here of no account.
PYKERN_INLINE Vec exp(Vec x) {
  Vec n;
  const Vec f = reduce(x, n);
  const Vec result = scale_exponent(fma(exp_slope(f), f, splat(1)), n);
  return x < splat(-87.3f) ? Vec{} : result;
}

// tanh x and its derivative, both to about two units in the last place of themselves. With u = e^(-2|x|) and w = u - 1,
// tanh|x| = -w / (2 + w), and the derivative, 4u / (2 + w)², has all digits where 1 - tanh² would have lost them.
PYKERN_INLINE Vec tanh(Vec x, Vec& derivative) {
  const Bits sign = (Bits)x & 0x80000000;
  const Vec exponent = (Vec)((Bits)x ^ sign) * splat(-2);
  Vec n;
  const Vec f = reduce(exponent < splat(-40) ? splat(-40) : exponent, n);
  const Vec power = scale_exponent(splat(1), n), slope = exp_slope(f) * f;
  const Vec w = fma(slope, power, power - splat(1)), inverse = reciprocal(w + splat(2));
  derivative = splat(4) * fma(slope, power, power) * inverse * inverse;
  return (Vec)((Bits)(-w * inverse) ^ sign);
}

// The 64-bit products of a's lanes and m, as two halves.
PYKERN_INLINE void wide_product(Bits a, uint32_t m, Bits& high, Bits& low) {
#if defined(__AVX512F__)
  const __m512i factor = _mm512_set1_epi32(m), v = (__m512i)a;
  const __m512i even = _mm512_mul_epu32(v, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(v, 32), factor);
  low = (Bits)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  high = (Bits)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i factor = _mm256_set1_epi32(m), v = (__m256i)a;
  const __m256i even = _mm256_mul_epu32(v, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(v, 32), factor);
  low = (Bits)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  high = (Bits)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * m;
    high[i] = static_cast<uint32_t>(product >> 32);
    low[i] = static_cast<uint32_t>(product);
  }
#endif
}

// Philox4x32-10 of Salmon et al., doi:10.1145/2063384.2063405: four random words for each lane's counter, in place.
PYKERN_INLINE void philox(Bits (&counter)[4], uint64_t key) {
  uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, low_key += 0x9e3779b9, high_key += 0xbb67ae85) {
    Bits high0, low0, high2, low2;
    wide_product(counter[0], 0xd2511f53, high0, low0);
    wide_product(counter[2], 0xcd9e8d57, high2, low2);
    counter[0] = high2 ^ counter[1] ^ low_key;
    counter[1] = low2;
    counter[2] = high0 ^ counter[3] ^ high_key;
    counter[3] = low0;
  }
}

// One step of a transpose: swaps the off-diagonal quarters of blocks of 2 · step lanes and rows.
template <int step>
PYKERN_INLINE void swap_quarters(Vec (&rows)[kLanes]) {
  Bits upper, lower;
  for (int i = 0; i < kLanes; ++i) {
    upper[i] = i & step ? kLanes + i - step : i;
    lower[i] = i & step ? kLanes + i : i + step;
  }
  for (int r = 0; r < kLanes; ++r) {
    if (r & step) continue;
    const Vec a = rows[r], b = rows[r + step];
    rows[r] = __builtin_shuffle(a, b, upper);
    rows[r + step] = __builtin_shuffle(a, b, lower);
  }
}

PYKERN_INLINE void transpose(Vec (&rows)[kLanes]) {
  swap_quarters<1>(rows);
  swap_quarters<2>(rows);
  if constexpr (kLanes > 4) swap_quarters<4>(rows);
  if constexpr (kLanes > 8) swap_quarters<8>(rows);
}

}  // namespace
}  // namespace pykern
