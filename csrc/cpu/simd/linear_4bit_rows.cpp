// A few rows of input by a transposed 4-bit weight: each element of the weight is decoded once, in registers, and meets
// every row.
//
// With AVX512 a lane of 32 bits takes eight codes, a vector a chunk of 128. A lookup heeds the low four bits of a lane;
// shifts bring the next code there, so that lanes are eight elements apart: rows of input are put in that order
// beforehand. Codes of a lane share a scale. Products of inputs and values of codes are summed unscaled over a chunk,
// whose sums are scaled: a multiplication and a load for 128 elements. That a scale is multiplied after the sum instead
// of before shows where it is infinite, or where input is and has a zero point subtracted: such sums are done again.
//
// Other instruction sets, and weights whose lanes would not share a scale, decode pieces of a row into cache.

#include "../linear_4bit.h"

#include "decode_4bit.h"

namespace pykern {
namespace {

constexpr int kLaneCodes = 8;  // of 32 bits
constexpr int kChunk = kLaneCodes * 16;
constexpr int64_t kPiece = 1024;

// How many elements of a row share a scale, whichever the row: a divisor of a chunk, and of the row. Zero where lanes
// do not.
int64_t elements_a_scale(const Weight4bit& w) {
  const bool one_a_row = w.scaling == Scaling::groups && w.blocksize >= w.columns;
  const int64_t sizes = (one_a_row ? 0 : w.blocksize) | w.columns | kChunk;
  const int64_t common = sizes & -sizes;
  return kLanes == 16 && common >= kLaneCodes ? common : 0;
}

// A row as it is, then, for lookups, chunk by chunk: its elements and the sum of each lane's.
constexpr int64_t kArrangedChunk = kChunk + 16;

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

int64_t prepared_size(const Weight4bit& w) {
  const int64_t chunks = elements_a_scale(w) ? (w.columns + kChunk - 1) / kChunk : 0;
  return padded(w.columns) + chunks * kArrangedChunk;
}

int64_t scales_size(const Weight4bit& w) {
  const int64_t elements = elements_a_scale(w);
  return elements ? padded(w.columns / elements) + 16 : 0;
}

template <class T>
bool prepare(const Weight4bit& w, const Rows& input, int64_t row, float* prepared) {
  const T* const from = static_cast<const T*>(input.data) + row_offset(input, row);
  const int64_t n = w.columns;
  Bits nan = {};
  each(n, [&](int64_t i, int count) PYKERN_LAMBDA {
    const Vec x = load(from + i, count);
    nan |= x == x ? Bits{} : ~Bits{};
    store(prepared + i, x, count);
  });
  bool has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) has_nan |= nan[lane] != 0;
  if (elements_a_scale(w)) {
    float* to = prepared + padded(n);
    for (int64_t k = 0; k < n; k += kChunk, to += kArrangedChunk) {
      for (int lane = 0; lane < 16; ++lane) {
        float sum = 0;
        for (int code = 0; code < kLaneCodes; ++code) {
          const int64_t i = k + lane * kLaneCodes + code;
          const float x = i < n ? prepared[i] : 0;
          to[(code ^ 1) * 16 + lane] = x;  // element 0 of a byte is its high half
          sum += x;
        }
        to[kChunk + lane] = sum;
      }
    }
  }
  return has_nan;
}

// A row of the weight by some rows of input, each value scaled by itself.
void decoded_products(const FewRows& few, int64_t row, Span inputs, float* piece, float* results) {
  const Weight4bit& w = few.weight;
  double totals[kFewRows] = {};
  for (int64_t k = 0; k < w.columns; k += kPiece) {
    const int64_t begin = row * w.columns + k, count = w.columns - k < kPiece ? w.columns - k : kPiece;
    decode(w, begin, begin + count, piece);
    for (int64_t m = inputs.first; m < inputs.end; ++m) {
      const float* const input = few.prepared + m * few.stride + k;
      totals[m] += sum_each(count, [&](int64_t i, int lanes, Vec& sum) PYKERN_LAMBDA {
        sum = fma(load(piece + i, lanes), load(input + i, lanes), sum);
      });
    }
  }
  for (int64_t m = inputs.first; m < inputs.end; ++m) results[m] = static_cast<float>(totals[m]);
}

#if defined(__AVX512F__)

// The scales from `index` on.
template <Scaling scaling>
PYKERN_INLINE Vec scales_at(const Weight4bit& w, int64_t index, int count) {
  if constexpr (scaling == Scaling::blocks) {
    return load(static_cast<const float*>(w.scales) + index, count);
  } else if constexpr (scaling == Scaling::nested) {
    const __m128i bytes = _mm_maskz_loadu_epi8((1u << count) - 1, static_cast<const uint8_t*>(w.scales) + index);
    const Vec value = (Vec)_mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), w.nested_code, sizeof(float));
    Bits lane;
    for (int i = 0; i < kLanes; ++i) lane[i] = i;
    const Bits place = lane + static_cast<uint32_t>(index % kNestedBlock);
    const Vec outer = place < Bits{} + kNestedBlock ? all(w.nested_scales[index / kNestedBlock])
                                                    : all(w.nested_scales[(index + count - 1) / kNestedBlock]);
    return first(value * outer + *w.nested_offset, count);
  } else {
    if (w.scale_type == DType::f16) return load(static_cast<const f16*>(w.scales) + index, count);
    if (w.scale_type == DType::bf16) return load(static_cast<const bf16*>(w.scales) + index, count);
    return load(static_cast<const float*>(w.scales) + index, count);
  }
}

PYKERN_INLINE Vec zeros_at(const Weight4bit& w, int64_t index, int count) {
  const __m128i bytes = _mm_maskz_loadu_epi8((1u << count) - 1, w.zero_points + index);
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)) - static_cast<float>(kInt4Zero);
}

// A number for every `elements` elements of a row, from one for every block, and zeros to the end of a chunk.
// `at(index, count)` gives those of blocks.
template <class At>
PYKERN_INLINE void spread(const Weight4bit& w, int64_t row, int64_t elements, float* to, At at) {
  const int64_t count = w.columns / elements;
  int64_t index = row * w.groups, within = 0;
  if (w.scaling != Scaling::groups) {
    index = row * w.columns / w.blocksize;
    within = row * w.columns % w.blocksize;
  }
  if (w.blocksize == elements) {
    each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA { store(to + i, at(index + i, lanes), lanes); });
  } else {
    float value = at(index, 1)[0];
    for (int64_t i = 0; i < count; ++i, within += elements) {
      if (within >= w.blocksize) {
        within -= w.blocksize;
        value = at(++index, 1)[0];
      }
      to[i] = value;
    }
  }
  store(to + count, Vec{});
}

// results[r * M + m] of R rows of the weight and M rows of input.
template <Scaling scaling, int R, int M>
PYKERN_INLINE void looked_up_products(const FewRows& few, int64_t row, float* scratch, float* results) {
  const Weight4bit& w = few.weight;
  const int64_t elements = elements_a_scale(w), size = scales_size(w);
  const bool has_zeros = scaling == Scaling::groups && w.zero_points;
  const uint8_t* codes[R];
  for (int r = 0; r < R; ++r) {
    codes[r] = w.codes + (row + r) * w.columns / 2;
    float* const scales = scratch + 2 * r * size;
    spread(w, row + r, elements, scales, [&](int64_t index, int count) PYKERN_LAMBDA {
      return scales_at<scaling>(w, index, count);
    });
    if (has_zeros)
      spread(w, row + r, elements, scales + size, [&](int64_t index, int count) PYKERN_LAMBDA {
        return zeros_at(w, index, count);
      });
  }
  Vec values = code_values(w).part[0];
  if constexpr (scaling == Scaling::groups) values -= static_cast<float>(kInt4Zero);
  __m512i place = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
  place = _mm512_srlv_epi32(place, _mm512_set1_epi32(__builtin_ctzll(elements)));
  const int64_t scales_a_chunk = kChunk / elements;

  Vec total[R][M] = {};
  const float* input[M];
  for (int m = 0; m < M; ++m) input[m] = few.prepared + m * few.stride + padded(w.columns);
  const float* scales = scratch;
  for (int64_t k = 0; k < w.columns; k += kChunk, scales += scales_a_chunk) {
    __m512i bits[R];
    for (int r = 0; r < R; ++r) {
      if (k + kChunk <= w.columns) bits[r] = _mm512_loadu_si512(codes[r] + k / 2);
      else bits[r] = _mm512_maskz_loadu_epi32((1u << (w.columns - k) / kLaneCodes) - 1, codes[r] + k / 2);
      __builtin_prefetch(codes[r] + (k + R * w.columns) / 2, 0, 2);
    }
    Vec sum[R][M] = {};
    for (int code = 0; code < kLaneCodes; ++code) {
      Vec value[R];
      for (int r = 0; r < R; ++r) {
        value[r] = (Vec)_mm512_permutexvar_ps(bits[r], (__m512)values);
        bits[r] = _mm512_srli_epi32(bits[r], 4);
      }
      for (int m = 0; m < M; ++m) {
        const Vec x = load(input[m] + code * kLanes);
        for (int r = 0; r < R; ++r) sum[r][m] = fma(value[r], x, sum[r][m]);
      }
    }
    for (int r = 0; r < R; ++r) {
      const auto of_lanes = [&](const float* from) PYKERN_LAMBDA {
        return (Vec)_mm512_permutexvar_ps(place, (__m512)load(from));
      };
      if (has_zeros) {
        const Vec zero = -of_lanes(scales + (2 * r + 1) * size);
        for (int m = 0; m < M; ++m) sum[r][m] = fma(zero, load(input[m] + kChunk), sum[r][m]);
      }
      const Vec scale = of_lanes(scales + 2 * r * size);
      for (int m = 0; m < M; ++m) total[r][m] = fma(sum[r][m], scale, total[r][m]);
    }
    for (int m = 0; m < M; ++m) input[m] += kArrangedChunk;
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) results[r * M + m] = sum(total[r][m]);
}

#endif

// How many rows of the weight share what is loaded of the input: as many as registers hold sums for.
template <int M>
constexpr int kTogether = M <= 2 ? 4 : 2;

// Of the first of these rows of the weight; gives how many.
template <Scaling scaling, int M>
int64_t products(const FewRows& few, Span rows, float* scratch, float* results) {
#if defined(__AVX512F__)
  if (elements_a_scale(few.weight)) {
    constexpr int R = kTogether<M>;
    const bool together = rows.first + R <= rows.end;
    if (together) looked_up_products<scaling, R, M>(few, rows.first, scratch, results);
    else looked_up_products<scaling, 1, M>(few, rows.first, scratch, results);
    const int64_t done = together ? R : 1;
    for (int64_t r = 0; r < done; ++r)
      for (int64_t m = 0; m < M; ++m)
        if (!__builtin_isfinite(results[r * M + m]) && !few.has_nan[m])
          decoded_products(few, rows.first + r, {m, m + 1}, scratch, results + r * M);
    return done;
  }
#endif
  decoded_products(few, rows.first, {0, M}, scratch, results);
  return 1;
}

using Products = int64_t (*)(const FewRows&, Span, float* scratch, float* results);

template <int M>
Products products_of(Scaling scaling) {
  if (scaling == Scaling::blocks) return products<Scaling::blocks, M>;
  if (scaling == Scaling::nested) return products<Scaling::nested, M>;
  return products<Scaling::groups, M>;
}

Products products_of(const FewRows& few) {
  const Scaling scaling = few.weight.scaling;
  switch (few.rows) {
    case 1: return products_of<1>(scaling);
    case 2: return products_of<2>(scaling);
    case 3: return products_of<3>(scaling);
    case 4: return products_of<4>(scaling);
    case 5: return products_of<5>(scaling);
    case 6: return products_of<6>(scaling);
    case 7: return products_of<7>(scaling);
    default: return products_of<kFewRows>(scaling);
  }
}

template <class T>
void run(const FewRows& few, Span columns, float* scratch) {
  const Products products = products_of(few);
  T* const y = static_cast<T*>(few.result);
  float results[4 * kFewRows];
  for (int64_t done; columns.first < columns.end; columns.first += done) {
    done = products(few, columns, scratch, results);
    for (int64_t i = 0; i < done * few.rows; ++i) {
      const int64_t column = columns.first + i / few.rows;
      store(y + i % few.rows * few.columns + column, all(results[i] + (few.bias ? few.bias[column] : 0)), 1);
    }
  }
}

int64_t scratch_size(const Weight4bit& w) {
  const int64_t scales = 2 * 4 * scales_size(w);
  return scales > kPiece ? scales : kPiece;
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::FewRowsKernels PYKERN_TABLE(linear_4bit_rows) = {
    pykern::prepared_size,
    pykern::scratch_size,
    {pykern::prepare<float>, pykern::prepare<pykern::f16>, pykern::prepare<pykern::bf16>},
    {pykern::run<float>, pykern::run<pykern::f16>, pykern::run<pykern::bf16>},
};
