// What csrc/cpu/lora.cpp asks of simd/lora.cpp beyond products. Plain data: this header is compiled for every
// instruction set.

#pragma once

#include "linear.h"

namespace pykern {

// With scratch as LinearKernels have it, for spans as large. Of the call, left · right and low are computed, and the
// result is fp32.
struct LoraKernels {
  // result[c] = the sum over all rows of dy · (left · right + low), for some columns.
  void (*column_dots)(const LinearCall&, const FloatRows& dy, Span columns, float* scratch);
  // result[r] = the norm of row r of left · right + weight, for some rows.
  void (*norms)(const LinearCall&, const FloatRows& weight, Span rows, float* scratch);
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::LoraKernels, lora)
