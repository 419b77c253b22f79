// Products of matrices as csrc/cpu/*.cpp ask simd/linear.cpp for them. Plain data: this header is compiled for every
// instruction set.

#pragma once

#include "../include/pykern/weight4bit.h"
#include "isa.h"

namespace pykern {

struct Span {
  int64_t first, end;
};

// Which elements of a matrix count as zero, by pykern/ops/_philox.py; the others are multiplied by `kept`.
struct Dropout {
  uint64_t seed, offset;
  int64_t groups;         // counters of a row
  uint32_t last_dropped;  // the largest word that drops
  float kept;
};

// Rows of floats, as products read them.
struct FloatRows {
  Rows rows;
  DType dtype;
  const int64_t* order = nullptr;  // row i is row order[i] of `rows`; null: row i
  const float* factor = nullptr;   // one for each column, by which it is multiplied; null: 1
  float scale = 1;                 // by which everything is multiplied
  const Dropout* dropout = nullptr;
};

// A right matrix: rows of a 4-bit weight or of floats, or its transpose.
struct RightMatrix {
  const Weight4bit* packed;  // null: `floats`
  FloatRows floats;
  bool transposed;
};

// left (…, depth) · right (depth, columns), added to these rows of a result. Row i of left belongs to row i of that.
struct LowRank {
  Span rows;
  FloatRows left;
  RightMatrix right;
  int64_t depth;
};

// result = sum + dropout(low_factor · low + other_factor · other) + bias, where sum is scale · left (rows, depth) · right
// (depth, columns), and factors are one for each column. What is null, or no rows, is left out; a factor, counts 1;
// other, where other_factor is not, is the sum.
struct LinearCall {
  FloatRows left;
  bool left_transposed = false;  // left's rows are columns of the left matrix; depth counts them
  RightMatrix right;
  int64_t rows, columns, depth;
  float scale = 1;
  const LowRank* low = nullptr;
  int64_t lows = 0;
  const float* low_factor = nullptr;
  const float* other = nullptr;  // contiguous (rows, columns)
  const float* other_factor = nullptr;
  const Dropout* dropout = nullptr;
  const float* bias = nullptr;
  void* result;  // contiguous (rows, columns)
  DType dtype;   // of result
  const int64_t* order = nullptr;  // row i of the product is row order[i] of result, and of other; null: row i
};

struct LinearKernels {
  // The spans that scratch suffices for, and its floats; columns are cut at multiples of column_unit.
  int64_t most_rows, most_columns, column_unit, scratch;
  void (*multiply)(const LinearCall&, Span rows, Span columns, float* scratch);
  // out[c] = the sum over all rows of column c.
  void (*sum_rows)(const FloatRows& from, int64_t rows, Span columns, float* out);
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::LinearKernels, linear)
