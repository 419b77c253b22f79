// Products of matrices, with what an adapter adds while their sums are in cache. Sums are fp32 and rounded once.

#include "../linear.h"

#include "linear_span.h"

namespace pykern {
namespace {

// By what the whole call is, so that the result does not depend on its spans.
Steps steps_of(const LinearCall& c) {
  constexpr int64_t kExactRows = 4;  // so few that fp64 takes no time, and that their errors would not average out
  if (c.columns > kNarrow) return Steps::large;
  return c.rows <= kExactRows ? Steps::exact : Steps::small;
}

// What is added to a row of sums beside the bias, in place of the low-rank product.
void add_others(const LinearCall& c, int64_t to_row, Span columns, const float* sums, float* low) {
  const float* const other = c.other ? c.other + to_row * c.columns + columns.first : nullptr;
  each(columns.end - columns.first, [&](int64_t i, int lanes) PYKERN_LAMBDA {
    Vec added = load(low + i, lanes);
    if (c.low_factor) added *= load(c.low_factor + columns.first + i, lanes);
    if (c.other_factor)
      added = fma(load(c.other_factor + columns.first + i, lanes), load((other ? other : sums) + i, lanes), added);
    else if (other) added += load(other + i, lanes);
    store(low + i, added, lanes);
  });
  if (c.dropout) drop(*c.dropout, to_row, columns.first, columns.end - columns.first, low);
}

template <class T>
void finish_row(const LinearCall& c, int64_t to_row, Span columns, const float* sums, const float* added) {
  T* const to = static_cast<T*>(c.result) + to_row * c.columns + columns.first;
  each(columns.end - columns.first, [&](int64_t i, int lanes) PYKERN_LAMBDA {
    Vec sum = load(sums + i, lanes) * c.scale;
    if (added) sum += load(added + i, lanes);
    if (c.bias) sum += load(c.bias + columns.first + i, lanes);
    store(to + i, sum, lanes);
  });
}

void multiply(const LinearCall& c, Span rows, Span columns, float* memory) {
  const SpanScratch scratch(memory);
  const Steps steps = steps_of(c);
  accumulate(c.left, c.left_transposed, c.right, c.depth, rows, columns, scratch, scratch.sums, Start::zero, steps);
  // Where nothing but the low-rank product is added, it goes to the same sums.
  const bool apart = c.low_factor || c.other || c.other_factor || c.dropout;
  if (apart) zero_sums(rows.end - rows.first, columns.end - columns.first, scratch.low);
  accumulate_low(c, rows, columns, scratch, apart ? scratch.low : scratch.sums, steps);
  for (int64_t row = rows.first; row < rows.end; ++row) {
    const int64_t to_row = c.order ? c.order[row] : row;
    const float* const sums = scratch.sums + (row - rows.first) * kColumns;
    float* const low = apart ? scratch.low + (row - rows.first) * kColumns : nullptr;
    if (apart) add_others(c, to_row, columns, sums, low);
    if (c.dtype == DType::f32) finish_row<float>(c, to_row, columns, sums, low);
    else if (c.dtype == DType::f16) finish_row<f16>(c, to_row, columns, sums, low);
    else finish_row<bf16>(c, to_row, columns, sums, low);
  }
}

// In fp64: as good as an exact sum, whatever the number of rows.
void sum_rows(const FloatRows& from, int64_t rows, Span columns, float* out) {
  constexpr int64_t kPiece = 64;
  for (int64_t c = columns.first; c < columns.end; c += kPiece) {
    const int64_t count = least(columns.end - c, kPiece);
    float row[kPiece];
    Double totals[kPiece / kLanes] = {};
    for (int64_t r = 0; r < rows; ++r) {
      load_row(from, r, c, count, row);
      for (int64_t v = 0; v * kLanes < count; ++v)
        totals[v] += __builtin_convertvector(load(row + v * kLanes), Double);
    }
    each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA {
      store(out + c + i, __builtin_convertvector(totals[i / kLanes], Vec), lanes);
    });
  }
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::LinearKernels PYKERN_TABLE(linear) = {
    pykern::kRows, pykern::kColumns, pykern::kNarrow, pykern::SpanScratch::kFloats, pykern::multiply, pykern::sum_rows,
};
