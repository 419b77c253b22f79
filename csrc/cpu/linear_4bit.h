// What csrc/cpu/linear_4bit.cpp asks of simd/linear_4bit.cpp and simd/linear_4bit_rows.cpp. Plain data: this header is
// compiled for every instruction set.

#pragma once

#include "../include/pykern/weight4bit.h"
#include "isa.h"

namespace pykern {

struct Span {
  int64_t first, end;
};

// result (rows, columns) = left (rows, depth) · right + bias, where right (depth, columns) is the weight or its
// transpose.
struct LinearCall {
  Weight4bit weight;
  Rows left;
  int64_t rows, columns, depth;
  const float* bias;  // (columns,); null: none
  void* result;       // contiguous
};

// One function per DType of left and result.
struct LinearKernels {
  using Multiply = void (*)(const LinearCall&, Span rows, Span columns, float* scratch);

  // The spans that scratch suffices for, and its floats; columns are cut at multiples of column_unit.
  int64_t most_rows, most_columns, column_unit, scratch;
  Multiply by_transposed[kDTypes];  // y = input · Wᵀ
  Multiply by_weight[kDTypes];      // dinput = dy · W
  // out[c] = the sum over all rows of column c.
  void (*sum_rows[kDTypes])(const Rows& from, int64_t rows, Span columns, float* out);
};

constexpr int kFewRows = 8;

// A call of few rows by the transposed weight, with its rows as prepare() leaves them.
struct FewRows {
  LinearCall call;
  const float* prepared;
  int64_t stride;              // floats of a prepared row
  bool has_nan[kFewRows];
};

struct FewRowsKernels {
  int64_t (*prepared)(const Weight4bit&);  // floats of a row
  int64_t (*scratch)(const Weight4bit&);   // floats for run()
  // Whether the row has a NaN.
  bool (*prepare[kDTypes])(const Weight4bit&, const Rows& input, int64_t row, float* prepared);
  void (*run[kDTypes])(const FewRows&, Span columns, float* scratch);
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::LinearKernels, linear_4bit)
PYKERN_DECLARE_TABLES(pykern::FewRowsKernels, linear_4bit_rows)
