// Decoding 4-bit weights in registers. A scale serves a whole block, and 16 codes have 16 values: those are multiplied
// and rounded once a block, and what is left to do for an element is to look its code up.

#pragma once

#include "../../include/pykern/weight4bit.h"
#include "vec.h"

namespace pykern {
namespace {

constexpr int kCodes = 16;

// A value for every code.
struct Values {
  Vec part[kCodes / kLanes];
};

// What the codes stand for before zero point and scale.
PYKERN_INLINE Values code_values(const Weight4bit& w) {
  Values values;
  for (int p = 0; p < kCodes / kLanes; ++p) {
    if (w.code) values.part[p] = load(w.code + p * kLanes);
    else for (int i = 0; i < kLanes; ++i) values.part[p][i] = static_cast<float>(p * kLanes + i);
  }
  return values;
}

// The scale of a block, or of a group: counted along rows, w.groups a row.
template <Scaling scaling>
PYKERN_INLINE float scale_at(const Weight4bit& w, int64_t index) {
  if constexpr (scaling == Scaling::blocks) {
    return static_cast<const float*>(w.scales)[index];
  } else if constexpr (scaling == Scaling::nested) {
    const float value = w.nested_code[static_cast<const uint8_t*>(w.scales)[index]];
    const float product = value * w.nested_scales[index / kNestedBlock];  // rounded before the sum
    return product + *w.nested_offset;
  } else {
    if (w.scale_type == DType::f16) return load(static_cast<const f16*>(w.scales) + index, 1)[0];
    if (w.scale_type == DType::bf16) return load(static_cast<const bf16*>(w.scales) + index, 1)[0];
    return static_cast<const float*>(w.scales)[index];
  }
}

template <Scaling scaling>
PYKERN_INLINE float zero_at(const Weight4bit& w, int64_t index) {
  if constexpr (scaling != Scaling::groups) return 0;
  else return w.zero_points ? w.zero_points[index] : kInt4Zero;
}

// The values of a block's codes. Differences of codes are exact, so the product alone rounds.
template <Scaling scaling>
PYKERN_INLINE Values block_values(const Weight4bit& w, Values values, int64_t index) {
  const float scale = scale_at<scaling>(w, index), zero = zero_at<scaling>(w, index);
  for (Vec& part : values.part) {
    if constexpr (scaling == Scaling::groups) part -= zero;
    part *= scale;
  }
  return values;
}

// Values rounded to T, ready to be looked up: `lookup` takes packed codes, kStep at a time, whose order it keeps.
// `put` does so in memory; an address past the caches is a multiple of 64 bytes.
#if defined(__AVX512F__)

// Of an index, lookups heed the bits that count the table's entries alone: here two equal halves of 16.
template <class T>
struct Table {
  static constexpr int kStep = 32;

  explicit PYKERN_INLINE Table(const Values& v)
      : entries(_mm512_broadcast_i64x4((__m256i)narrow(v.part[0], T{}))) {}

  PYKERN_INLINE __m512i lookup(__m128i bytes) const {
    const __m512i byte = _mm512_cvtepu8_epi32(bytes);
    const __m512i codes = _mm512_or_si512(_mm512_slli_epi32(byte, 16), _mm512_srli_epi32(byte, 4));
    return _mm512_permutexvar_epi16(codes, entries);
  }

  PYKERN_INLINE void put(const uint8_t* codes, T* out, bool past_caches) const {
    const __m512i values = lookup(_mm_loadu_si128((const __m128i*)codes));
    if (past_caches) stream_bits(out, values);
    else _mm512_storeu_si512(out, values);
  }

  PYKERN_INLINE T at(int code) const {
    T all[2 * kCodes];
    memcpy(all, &entries, sizeof all);
    return all[code];
  }

  __m512i entries;
};

template <>
struct Table<float> {
  static constexpr int kStep = 16;

  explicit PYKERN_INLINE Table(const Values& v) : entries(v.part[0]) {}

  PYKERN_INLINE Vec lookup(__m128i bytes) const {
    const __m512i byte = _mm512_cvtepu8_epi64(bytes);
    const __m512i codes = _mm512_or_si512(_mm512_slli_epi64(byte, 32), _mm512_srli_epi64(byte, 4));
    return (Vec)_mm512_permutexvar_ps(codes, (__m512)entries);
  }

  PYKERN_INLINE void put(const uint8_t* codes, float* out, bool past_caches) const {
    const Vec values = lookup(_mm_loadl_epi64((const __m128i*)codes));
    if (past_caches) stream(out, values);
    else store(out, values);
  }

  PYKERN_INLINE float at(int code) const { return entries[code]; }

  Vec entries;
};

// The first `count` elements, fewer than kStep.
template <class T>
PYKERN_INLINE void put_first(const Table<T>& table, const uint8_t* codes, T* out, int count) {
  const auto values = table.lookup(_mm_maskz_loadu_epi8((1u << (count + 1) / 2) - 1, codes));
  if constexpr (sizeof(T) == 4) store(out, values, count);
  else _mm512_mask_storeu_epi16(out, (1u << count) - 1, values);
}

#else

#if defined(__AVX2__)

// The low bytes of the values and the high ones, each twice: lookups of bytes do not cross halves of a register.
template <class T>
struct Table {
  static constexpr int kStep = 32;

  struct Wide {
    __m256i part[2];
  };

  explicit PYKERN_INLINE Table(const Values& v) {
    const __m128i first = (__m128i)narrow(v.part[0], T{}), second = (__m128i)narrow(v.part[1], T{});
    const __m128i byte = _mm_set1_epi16(0xff);
    const __m128i low_bytes = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    const __m128i high_bytes = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
    low = _mm256_broadcastsi128_si256(low_bytes);
    high = _mm256_broadcastsi128_si256(high_bytes);
  }

  PYKERN_INLINE Wide lookup(__m128i bytes) const {
    const __m256i byte = _mm256_cvtepu8_epi16(bytes);
    const __m256i both = _mm256_or_si256(_mm256_slli_epi16(byte, 8), _mm256_srli_epi16(byte, 4));
    const __m256i codes = _mm256_and_si256(both, _mm256_set1_epi8(15));
    const __m256i l = _mm256_shuffle_epi8(low, codes), h = _mm256_shuffle_epi8(high, codes);
    const __m256i outer = _mm256_unpacklo_epi8(l, h), inner = _mm256_unpackhi_epi8(l, h);
    return {{_mm256_permute2x128_si256(outer, inner, 0x20), _mm256_permute2x128_si256(outer, inner, 0x31)}};
  }

  PYKERN_INLINE void put(const uint8_t* codes, T* out, bool past_caches) const {
    const Wide values = lookup(_mm_loadu_si128((const __m128i*)codes));
    for (int p = 0; p < 2; ++p) {
      if (past_caches) stream_bits(out + 16 * p, values.part[p]);
      else _mm256_storeu_si256((__m256i*)(out + 16 * p), values.part[p]);
    }
  }

  PYKERN_INLINE T at(int code) const {
    uint8_t l[32], h[32];
    memcpy(l, &low, sizeof l);
    memcpy(h, &high, sizeof h);
    return {static_cast<uint16_t>(h[code] << 8 | l[code])};
  }

  __m256i low, high;
};

template <>
struct Table<float> {
  static constexpr int kStep = 8;

  explicit PYKERN_INLINE Table(const Values& v) : entries(v) {}

  PYKERN_INLINE Vec lookup(__m128i bytes) const {
    const __m256i byte = _mm256_cvtepu8_epi64(bytes);
    const __m256i codes = _mm256_or_si256(_mm256_slli_epi64(byte, 32), _mm256_srli_epi64(byte, 4));
    const __m256 first = _mm256_permutevar8x32_ps((__m256)entries.part[0], codes);
    const __m256 second = _mm256_permutevar8x32_ps((__m256)entries.part[1], codes);
    return (Vec)_mm256_blendv_ps(first, second, (__m256)_mm256_slli_epi32(codes, 28));
  }

  PYKERN_INLINE void put(const uint8_t* codes, float* out, bool past_caches) const {
    int bytes;
    memcpy(&bytes, codes, sizeof bytes);
    const Vec values = lookup(_mm_cvtsi32_si128(bytes));
    if (past_caches) stream(out, values);
    else store(out, values);
  }

  PYKERN_INLINE float at(int code) const {
    float all[kCodes];
    memcpy(all, &entries, sizeof all);
    return all[code];
  }

  Values entries;
};

#else

// In memory: SSE2 has no lookup.
template <class T>
struct Table {
  static constexpr int kStep = 8;

  explicit PYKERN_INLINE Table(const Values& v) {
    for (int p = 0; p < kCodes / kLanes; ++p) store(entries + p * kLanes, v.part[p]);
  }

  PYKERN_INLINE void put(const uint8_t* codes, T* out, bool) const {
    for (int i = 0; i < kStep / 2; ++i) {
      out[2 * i] = entries[codes[i] >> 4];
      out[2 * i + 1] = entries[codes[i] & 15];
    }
  }

  PYKERN_INLINE T at(int code) const { return entries[code]; }

  T entries[kCodes];
};

#endif

// The first `count` elements, fewer than kStep.
template <class T>
PYKERN_INLINE void put_first(const Table<T>& table, const uint8_t* codes, T* out, int count) {
  for (int i = 0; i < count; ++i) out[i] = table.at(i & 1 ? codes[i / 2] & 15 : codes[i / 2] >> 4);
}

#endif

// How far ahead codes are asked for, in bytes: streaming fp32 values gains 10 % by it, bf16 nothing.
constexpr int kAhead = 1024;

// Elements [begin, begin + count) of the flattened weight, which share a scale.
template <class T>
PYKERN_INLINE void decode_with(
    const Table<T>& table, const uint8_t* codes, int64_t begin, int64_t count, T* out, bool past_caches) {
  if (begin & 1 && count > 0) {
    *out++ = table.at(codes[begin / 2] & 15);
    ++begin, --count;
  }
  codes += begin / 2;
  constexpr int kStep = Table<T>::kStep;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    __builtin_prefetch(codes + i / 2 + kAhead);
    table.put(codes + i / 2, out + i, past_caches);
  }
  if (i < count) put_first(table, codes + i / 2, out + i, static_cast<int>(count - i));
}

PYKERN_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Elements [begin, end) of the flattened weight. Past the caches only where `out` is a multiple of 64 bytes and every
// scale serves a multiple of 32 elements.
template <class T, Scaling scaling>
PYKERN_INLINE void decode_scaled(const Weight4bit w, int64_t begin, int64_t end, T* out, bool past_caches) {
  const Values values = code_values(w);
  // Groups start anew with every row; to blocks the weight is one row.
  const int64_t columns = scaling == Scaling::groups ? w.columns : w.count;
  const int64_t row = columns > 0 ? begin / columns : 0;
  int64_t row_end = (row + 1) * columns;
  const int64_t block = (begin - row * columns) / w.blocksize;
  int64_t index = row * w.groups + block, block_end = row * columns + (block + 1) * w.blocksize;
  while (begin < end) {
    const int64_t stop = least(block_end, least(row_end, end));
    const Table<T> table(block_values<scaling>(w, values, index++));
    decode_with(table, w.codes, begin, stop - begin, out, past_caches);
    out += stop - begin;
    begin = stop;
    block_end += w.blocksize;
    if (scaling == Scaling::groups && begin == row_end) {
      block_end = row_end + w.blocksize;
      row_end += columns;
    }
  }
}

template <class T>
__attribute__((noinline)) void decode(
    const Weight4bit& w, int64_t begin, int64_t end, T* out, bool past_caches = false) {
  if (w.scaling == Scaling::blocks) decode_scaled<T, Scaling::blocks>(w, begin, end, out, past_caches);
  else if (w.scaling == Scaling::nested) decode_scaled<T, Scaling::nested>(w, begin, end, out, past_caches);
  else decode_scaled<T, Scaling::groups>(w, begin, end, out, past_caches);
  if (past_caches) stream_end();
}

}  // namespace
}  // namespace pykern
