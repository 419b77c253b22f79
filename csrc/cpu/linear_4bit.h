// What csrc/cpu asks of simd/linear_4bit_rows.cpp. Plain data: this header is compiled for every instruction set.

#pragma once

#include "linear.h"

namespace pykern {

constexpr int kFewRows = 8;

// result (rows, columns) = input · Wᵀ + bias, with the rows of input as prepare() leaves them.
struct FewRows {
  Weight4bit weight;
  int64_t rows, columns;
  const float* bias;  // (columns,); null: none
  void* result;       // contiguous
  const float* prepared;
  int64_t stride;  // floats of a prepared row
  bool has_nan[kFewRows];
};

// One function per DType of input, and of result.
struct FewRowsKernels {
  int64_t (*prepared)(const Weight4bit&);  // floats of a row
  int64_t (*scratch)(const Weight4bit&);   // floats for run()
  // Whether the row has a NaN.
  bool (*prepare[kDTypes])(const Weight4bit&, const Rows& input, int64_t row, float* prepared);
  void (*run[kDTypes])(const FewRows&, Span columns, float* scratch);
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::FewRowsKernels, linear_4bit_rows)
