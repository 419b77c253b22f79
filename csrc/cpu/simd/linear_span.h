// Sums of a span of a product, by tiles: a tile of the right matrix is decoded to fp32 where the caches hold it, and
// meets all rows of the span.
//
// fp32 for every dtype: what is multiplied is a 4-bit weight itself, not rounded to 16 bits, and without AMX fp32 FMAs
// are no slower than AVX512's products of bf16 (86 to 42 billion multiplications a second on one core).

#pragma once

#include "product.h"
#include "right_tile.h"

namespace pykern {
namespace {

// The part of `left` that a tile meets, and the sums of a span, stay in the second-level cache, of which a megabyte is
// common.
constexpr int64_t kRows = 256, kColumns = 512;
constexpr int64_t kSums = kRows * kColumns;
// What low-rank products have in between is rounded to fp32 before the sum that counts, so that it is summed in three
// steps, of kShortDepth, kDepth and all; so few columns take little time.
constexpr int64_t kShortDepth = 16;

// How a product sums: by kDepth, by kShortDepth, or in fp64.
enum class Steps { large, small, exact };

// One thread's memory.
struct SpanScratch {
  explicit SpanScratch(float* memory)
      : left(memory), right(left + kRows * kDepth), sums(right + kDepth * kColumns), low(sums + kSums),
        part(low + kSums) {}

  static constexpr int64_t kFloats = kRows * kDepth + kDepth * kColumns + 3 * kSums;

  float* left;
  float* right;
  float* sums;  // rows are kColumns apart
  float* low;   // as sums
  float* part;  // as sums
};

void zero_sums(int64_t rows, int64_t columns, float* sums) {
  for (int64_t r = 0; r < rows; ++r)
    each(columns, [&](int64_t i, int) PYKERN_LAMBDA { store(sums + r * kColumns + i, Vec{}); });
}

void add_sums(int64_t rows, int64_t columns, const float* from, float* sums) {
  for (int64_t r = 0; r < rows; ++r)
    each(columns, [&](int64_t i, int) PYKERN_LAMBDA {
      store(sums + r * kColumns + i, load(sums + r * kColumns + i) + load(from + r * kColumns + i));
    });
}

// sums += left · right, of a chunk of the depth.
void add_exactly(const Product& p, bool left_transposed, int64_t rows, int64_t vectors) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* const left = p.left + r * (left_transposed ? 1 : p.left_stride);
    const int64_t step = left_transposed ? p.left_stride : 1;
    for (int64_t v = 0; v < vectors * kLanes; v += kLanes) {
      float* const to = p.result + r * p.result_stride + v;
      Double total = __builtin_convertvector(load(to), Double);
      for (int64_t d = 0; d < p.depth; ++d)
        total += __builtin_convertvector(load(p.right + d * p.right_stride + v), Double) * double{left[d * step]};
      store(to, __builtin_convertvector(total, Vec));
    }
  }
}

// sums = start + left · right for a span of both; rows of left are counted from left's own first.
void accumulate(
    const FloatRows& left, bool left_transposed, const RightMatrix& right, int64_t depth, Span rows, Span columns,
    const SpanScratch& scratch, float* sums, Start start, Steps steps) {
  const int64_t count = rows.end - rows.first;
  // Rows are read, and 4-bit ones decoded, faster in long pieces.
  const int64_t most = right.transposed ? kNarrow : kColumns;
  const int64_t width = columns.end - columns.first;
  const int64_t step = steps == Steps::small ? kShortDepth : kDepth;
  if ((depth == 0 || steps != Steps::large) && start == Start::zero) zero_sums(count, width, sums);
  float* const result = steps == Steps::small ? scratch.part : sums;
  const int64_t left_step = left_transposed ? kRows : 1;
  for (int64_t d = 0; d < depth; d += kDepth) {
    const int64_t deep = least(depth - d, kDepth);
    if (left_transposed) {
      for (int64_t i = 0; i < deep; ++i) load_row(left, d + i, rows.first, count, scratch.left + i * kRows);
    } else {
      for (int64_t r = 0; r < count; ++r) load_row(left, rows.first + r, d, deep, scratch.left + r * kDepth);
    }
    for (int64_t column = columns.first; column < columns.end; column += most) {
      const Tile tile = {d, deep, column, least(columns.end - column, most), scratch.right, most};
      load_tile(right, tile);
      Product product = {};
      product.left_stride = left_transposed ? kRows : kDepth;
      product.right_stride = most;
      product.result = result + (column - columns.first), product.result_stride = kColumns;
      const int64_t vectors = (tile.columns + kLanes - 1) / kLanes;
      if (steps == Steps::exact) {
        product.left = scratch.left, product.right = scratch.right, product.depth = deep;
        add_exactly(product, left_transposed, count, vectors);
        continue;
      }
      for (int64_t at = 0; at < deep; at += step) {
        product.left = scratch.left + at * left_step;
        product.right = scratch.right + at * most;
        product.depth = least(deep - at, step);
        const Start first = steps == Steps::small ? Start::zero : d == 0 ? start : Start::add;
        product.start = at == 0 ? first : Start::add;
        if (left_transposed) multiply_chunk<Along::rows>(product, count, vectors);
        else multiply_chunk<Along::depth>(product, count, vectors);
      }
    }
    if (steps == Steps::small) add_sums(count, width, scratch.part, sums);
  }
}

// Adds the low-rank products of a span.
void accumulate_low(
    const LinearCall& c, Span rows, Span columns, const SpanScratch& scratch, float* sums,
    Steps steps) {
  for (int64_t i = 0; i < c.lows; ++i) {
    const LowRank& low = c.low[i];
    const Span own = {
        low.rows.first > rows.first ? low.rows.first : rows.first, least(low.rows.end, rows.end)};
    if (own.first >= own.end) continue;
    accumulate(
        low.left, false, low.right, low.depth, own, columns, scratch, sums + (own.first - rows.first) * kColumns,
        Start::add, steps);
  }
}

}  // namespace
}  // namespace pykern
