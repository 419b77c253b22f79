// What of low-rank adapters is more than products: sums over rows and columns of products that are never in memory.

#include "../lora.h"

#include "linear_span.h"

namespace pykern {
namespace {

// Both in fp64: as good as an exact sum, whatever the number of rows or columns.
void column_dots(const LinearCall& c, const FloatRows& dy, Span columns, float* memory) {
  const SpanScratch scratch(memory);
  const int64_t width = columns.end - columns.first;
  Double totals[kColumns / kLanes] = {};
  for (int64_t first = 0; first < c.rows; first += kRows) {
    const Span rows = {first, least(c.rows, first + kRows)};
    accumulate(c.left, false, c.right, c.depth, rows, columns, scratch, scratch.sums, Start::zero, Steps::small);
    accumulate_low(c, rows, columns, scratch, scratch.sums, Steps::small);
    for (int64_t row = rows.first; row < rows.end; ++row) {
      const float* const sums = scratch.sums + (row - rows.first) * kColumns;
      load_row(dy, row, columns.first, width, scratch.low);
      each(width, [&](int64_t i, int lanes) PYKERN_LAMBDA {
        totals[i / kLanes] += __builtin_convertvector(load(sums + i, lanes), Double) *
                              __builtin_convertvector(load(scratch.low + i, lanes), Double);
      });
    }
  }
  each(width, [&](int64_t i, int lanes) PYKERN_LAMBDA {
    store(static_cast<float*>(c.result) + columns.first + i, __builtin_convertvector(totals[i / kLanes], Vec), lanes);
  });
}

void norms(const LinearCall& c, const FloatRows& weight, Span rows, float* memory) {
  const SpanScratch scratch(memory);
  double totals[kRows] = {};
  for (int64_t first = 0; first < c.columns; first += kColumns) {
    const Span columns = {first, least(c.columns, first + kColumns)};
    const int64_t width = columns.end - first;
    accumulate(c.left, false, c.right, c.depth, rows, columns, scratch, scratch.sums, Start::zero, Steps::large);
    for (int64_t row = rows.first; row < rows.end; ++row) {
      const float* const sums = scratch.sums + (row - rows.first) * kColumns;
      load_row(weight, row, first, width, scratch.low);
      Double total = {};
      each(width, [&](int64_t i, int lanes) PYKERN_LAMBDA {
        const Double value = __builtin_convertvector(load(sums + i, lanes) + load(scratch.low + i, lanes), Double);
        total += value * value;
      });
      totals[row - rows.first] += sum(total);
    }
  }
  for (int64_t row = rows.first; row < rows.end; ++row)
    static_cast<float*>(c.result)[row] = static_cast<float>(__builtin_sqrt(totals[row - rows.first]));
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::LoraKernels PYKERN_TABLE(lora) = {pykern::column_dots, pykern::norms};
