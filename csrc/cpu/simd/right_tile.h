// Tiles of right matrices in fp32, from 4-bit weights or rows of floats, either way round.

#pragma once

#include "../linear.h"
#include "decode_4bit.h"
#include "float_rows.h"

namespace pykern {
namespace {

// Longer sums are made of sums of kDepth.
constexpr int64_t kDepth = 128;
// A tile of a transposed matrix takes this many columns, a register block of product.h with AVX512.
constexpr int64_t kNarrow = 64;

// A tile (depth, columns) of the right matrix from (first_depth, first_column) on; its rows are `stride` apart.
struct Tile {
  int64_t first_depth, depth, first_column, columns;
  float* to;
  int64_t stride;
};

// The rows of the weight are those of the right matrix.
void decode_rows(const Weight4bit& w, const Tile& tile) {
  for (int64_t d = 0; d < tile.depth; ++d) {
    const int64_t begin = (tile.first_depth + d) * w.columns + tile.first_column;
    decode(w, begin, begin + tile.columns, tile.to + d * tile.stride);
  }
}

// The rows of the weight are the columns of the right matrix: by fours, so that stores are vectors.
void decode_columns(const Weight4bit& w, const Tile& tile) {
  constexpr int64_t kFour = 4;
  float rows[kFour][kDepth];
  for (int64_t c = 0; c < tile.columns; c += kFour) {
    for (int64_t i = 0; i < kFour; ++i) {
      const int64_t row = tile.first_column + least(c + i, tile.columns - 1);
      const int64_t begin = row * w.columns + tile.first_depth;
      decode(w, begin, begin + tile.depth, rows[i]);
    }
    for (int64_t d = 0; d < tile.depth; ++d)
      for (int64_t i = 0; i < kFour; ++i) tile.to[d * tile.stride + c + i] = rows[i][d];
  }
}

#if defined(__AVX512F__)

// Eight codes are a lane of 32 bits.
constexpr int64_t kLaneCodes = 8, kChunk = kLaneCodes * kLanes;

// Whether all codes of a lane share a scale, and rows begin at whole lanes.
bool has_lanes(const Weight4bit& w) {
  const bool one_a_row = w.scaling == Scaling::groups && w.blocksize >= w.columns;
  return (w.columns | (one_a_row ? 0 : w.blocksize)) % kLaneCodes == 0;
}

// Lane c of vector r to lane r of vector c.
PYKERN_INLINE void transpose(__m512i v[kLanes]) {
  __m512i t[kLanes];
  for (int i = 0; i < kLanes; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < kLanes; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now a quarter of v[4 i + j] is column 4 quarter + j of rows from 4 i on.
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(v[j], v[j + 4], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(v[j], v[j + 4], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(v[j + 8], v[j + 12], 0xdd);
    v[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    v[j + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    v[j + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
}

// The 16-bit float in the low half of each lane.
PYKERN_INLINE Vec widen_low(__m512i v, bf16) { return (Vec)_mm512_slli_epi32(v, 16); }
PYKERN_INLINE Vec widen_low(__m512i v, f16) { return (Vec)_mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }

// The values of kLanes rows of the weight, a row a lane: packed codes are transposed, eight elements at once, and
// looked up as in linear_4bit_rows.cpp.
template <Scaling scaling>
PYKERN_INLINE void look_up_columns(const Weight4bit& w, const Tile& tile) {
  const Vec values = code_values(w).part[0];
  // Where every row begins with a block, lanes change scales together.
  const bool together = scaling == Scaling::groups || w.columns % w.blocksize == 0;
  int64_t rows[kLanes];
  for (int r = 0; r < kLanes; ++r) rows[r] = tile.first_column + least(r, tile.columns - 1);
  Vec scale, zero;
  int64_t scaled_to = 0;
  for (int64_t d = 0; d < tile.depth; d += kChunk) {
    const int64_t k = tile.first_depth + d, lanes = least(tile.depth - d, kChunk) / kLaneCodes;
    __m512i codes[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const uint8_t* const from = w.codes + (rows[r] * w.columns + k) / 2;
      codes[r] = lanes == kLanes ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32((1u << lanes) - 1, from);
      __builtin_prefetch(from + kNarrow * w.columns / 2, 0, 3);  // the next tile
    }
    transpose(codes);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t at = k + lane * kLaneCodes;
      if (at >= scaled_to) {
        float scales[kLanes], zeros[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          const int64_t index = scaling == Scaling::groups ? rows[r] * w.groups + at / w.blocksize
                                                           : (rows[r] * w.columns + at) / w.blocksize;
          scales[r] = scale_at<scaling>(w, index);
          zeros[r] = zero_at<scaling>(w, index);
        }
        scale = load(scales), zero = load(zeros);
        scaled_to = together ? (at / w.blocksize + 1) * w.blocksize : at + kLaneCodes;
      }
      float* const to = tile.to + (d + lane * kLaneCodes) * tile.stride;
      __m512i bits = codes[lane];
      for (int64_t code = 0; code < kLaneCodes; ++code) {
        Vec value = (Vec)_mm512_permutexvar_ps(bits, (__m512)values);
        if constexpr (scaling == Scaling::groups) value -= zero;
        store(to + (code ^ 1) * tile.stride, value * scale);  // element 0 of a byte is its high half
        bits = _mm512_srli_epi32(bits, 4);
      }
    }
  }
}

void look_up_columns(const Weight4bit& w, const Tile& tile) {
  for (int64_t c = 0; c < tile.columns; c += kLanes) {
    Tile part = tile;
    part.first_column += c;
    part.columns -= c;
    part.to += c;
    if (w.scaling == Scaling::blocks) look_up_columns<Scaling::blocks>(w, part);
    else if (w.scaling == Scaling::nested) look_up_columns<Scaling::nested>(w, part);
    else look_up_columns<Scaling::groups>(w, part);
  }
}

#endif

// The rows of the floats are the columns of the right matrix.
template <class T>
void load_columns(const FloatRows& m, const Tile& tile) {
  const T* const data = static_cast<const T*>(m.rows.data) + tile.first_depth;
  for (int64_t c = 0; c < tile.columns; c += kLanes) {
    const T* rows[kLanes];
    for (int r = 0; r < kLanes; ++r)
      rows[r] = data + row_offset(m.rows, tile.first_column + least(c + r, tile.columns - 1));
    float* const to = tile.to + c;
    int64_t d = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 2) {
      for (; d + 2 * kLanes <= tile.depth; d += 2 * kLanes) {
        __m512i pairs[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          pairs[r] = _mm512_loadu_si512(rows[r] + d);
          __builtin_prefetch(rows[r] + d + kNarrow * m.rows.stride[0], 0, 2);  // the next tile
        }
        transpose(pairs);
        for (int i = 0; i < kLanes; ++i) {
          store(to + (d + 2 * i) * tile.stride, widen_low(pairs[i], T{}));
          store(to + (d + 2 * i + 1) * tile.stride, widen_low(_mm512_srli_epi32(pairs[i], 16), T{}));
        }
      }
    }
#endif
    for (; d < tile.depth; d += kLanes) {
      const int count = static_cast<int>(least(tile.depth - d, kLanes));
      Vec block[kLanes];
      for (int r = 0; r < kLanes; ++r) block[r] = load(rows[r] + d, count);
      transpose(block);
      for (int i = 0; i < count; ++i) store(to + (d + i) * tile.stride, block[i]);
    }
  }
}

void load_floats(const RightMatrix& m, const Tile& tile) {
  if (!m.transposed) {
    for (int64_t d = 0; d < tile.depth; ++d) {
      if (!m.floats.order) prefetch_row(m.floats, tile.first_depth + d + tile.depth, tile.first_column, tile.columns);
      load_row(m.floats, tile.first_depth + d, tile.first_column, tile.columns, tile.to + d * tile.stride);
    }
  } else if (m.floats.dtype == DType::f32) {
    load_columns<float>(m.floats, tile);
  } else if (m.floats.dtype == DType::f16) {
    load_columns<f16>(m.floats, tile);
  } else {
    load_columns<bf16>(m.floats, tile);
  }
}

void load_tile(const RightMatrix& m, const Tile& tile) {
  if (!m.packed) return load_floats(m, tile);
  if (!m.transposed) return decode_rows(*m.packed, tile);
#if defined(__AVX512F__)
  if (has_lanes(*m.packed)) return look_up_columns(*m.packed, tile);
#endif
  decode_columns(*m.packed, tile);
}

}  // namespace
}  // namespace pykern
