// Products with a 4-bit weight or its transpose by tiles: a tile of the weight is decoded to fp32 where the caches hold
// it, and meets all rows of a span. Sums are fp32 and rounded once.
//
// fp32 for every dtype: what is multiplied is the weight itself, not rounded to 16 bits, and without AMX fp32 FMAs are
// no slower than AVX512's products of bf16 (86 to 42 billion multiplications a second on one core).

#include "../linear_4bit.h"

#include "decode_4bit.h"
#include "product.h"

namespace pykern {
namespace {

// The part of `left` that a tile meets, and the sums of a span, stay in the second-level cache, of which a megabyte is
// common. Longer sums are made of sums of kDepth.
constexpr int64_t kRows = 256, kColumns = 512, kDepth = 128;
// A tile of the transposed weight takes this many columns, a register block of product.h with AVX512.
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

template <bool transposed>
PYKERN_INLINE void decode_tile(const Weight4bit& w, const Tile& tile) {
  if constexpr (!transposed) return decode_rows(w, tile);
#if defined(__AVX512F__)
  if (has_lanes(w)) return look_up_columns(w, tile);
#endif
  decode_columns(w, tile);
}

// Sums of a span, with what is needed of left and right for a depth of kDepth.
template <class T, bool transposed>
void multiply(const LinearCall& c, Span rows, Span columns, float* scratch) {
  constexpr int64_t kTile = transposed ? kNarrow : kColumns;
  const int64_t count = rows.end - rows.first;
  float* const left = scratch;
  float* const right = left + kRows * kDepth;
  float* const sums = right + kDepth * kColumns;
  for (int64_t d = 0; d < c.depth; d += kDepth) {
    const int64_t depth = least(c.depth - d, kDepth);
    for (int64_t r = 0; r < count; ++r) {
      const T* const from = static_cast<const T*>(c.left.data) + row_offset(c.left, rows.first + r) + d;
      float* const to = left + r * kDepth;
      each(depth, [&](int64_t i, int lanes) PYKERN_LAMBDA { store(to + i, load(from + i, lanes), lanes); });
    }
    for (int64_t column = columns.first; column < columns.end; column += kTile) {
      const Tile tile = {d, depth, column, least(columns.end - column, kTile), right, kTile};
      decode_tile<transposed>(c.weight, tile);
      Product product = {};
      product.left = left, product.left_stride = kDepth;
      product.right = right, product.right_stride = kTile;
      product.result = sums + (column - columns.first), product.result_stride = kColumns;
      product.depth = depth;
      product.start = d == 0 ? Start::zero : Start::add;
      multiply_chunk<Along::depth>(product, count, (tile.columns + kLanes - 1) / kLanes);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    T* const to = static_cast<T*>(c.result) + (rows.first + r) * c.columns + columns.first;
    each(columns.end - columns.first, [&](int64_t i, int lanes) PYKERN_LAMBDA {
      Vec sum = load(sums + r * kColumns + i, lanes);
      if (c.bias) sum += load(c.bias + columns.first + i, lanes);
      store(to + i, sum, lanes);
    });
  }
}

// In fp64: as good as an exact sum, whatever the number of rows.
template <class T>
void sum_rows(const Rows& from, int64_t rows, Span columns, float* out) {
  const T* const data = static_cast<const T*>(from.data) + columns.first;
  each(columns.end - columns.first, [&](int64_t i, int lanes) PYKERN_LAMBDA {
    Double total = {};
    for (int64_t r = 0; r < rows; ++r)
      total += __builtin_convertvector(load(data + row_offset(from, r) + i, lanes), Double);
    store(out + columns.first + i, __builtin_convertvector(total, Vec), lanes);
  });
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::LinearKernels PYKERN_TABLE(linear_4bit) = {
    pykern::kRows,
    pykern::kColumns,
    pykern::kNarrow,
    pykern::kRows * pykern::kDepth + pykern::kDepth * pykern::kColumns + pykern::kRows * pykern::kColumns,
    {pykern::multiply<float, true>, pykern::multiply<pykern::f16, true>, pykern::multiply<pykern::bf16, true>},
    {pykern::multiply<float, false>, pykern::multiply<pykern::f16, false>, pykern::multiply<pykern::bf16, false>},
    {pykern::sum_rows<float>, pykern::sum_rows<pykern::f16>, pykern::sum_rows<pykern::bf16>},
};
