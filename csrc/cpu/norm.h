// What csrc/cpu/norm.cpp asks of csrc/cpu/simd/norm.cpp. Statistics, weights and partial sums are fp32.

#pragma once

#include "../include/pykern/rows.h"
#include "isa.h"

namespace pykern {

struct NormForward {
  Rows x;
  Rows residual;      // data is null without one
  void* summed;       // (rows, n), x + residual; written only with a residual
  const float* weight;  // (n,), the offset included
  const float* bias;    // (n,); not read by rms_norm
  void* y;              // (rows, n)
  float* mean;          // (rows,); not written by rms_norm
  float* rstd;          // (rows,)
  int64_t n;
  double eps;
  bool round_before_weight;
  bool stream;  // y goes past the caches; its rows are multiples of a cache line
};

struct NormBackward {
  Rows dy;
  Rows x;
  Rows dsummed;  // data is null without one
  const float* weight;
  const float* mean;  // not read by rms_norm
  const float* rstd;
  void* dx;  // (rows, n), or null: not wanted
  int64_t n;
  bool stream;  // dx goes past the caches, as above
};

// One function per DType of x.
struct NormKernels {
  using Forward = void (*)(const NormForward&, int64_t first_row, int64_t end_row);
  // Adds these rows' share to dweight and dbias, (n,) each, or null: not wanted.
  using Backward = void (*)(const NormBackward&, int64_t first_row, int64_t end_row, float* dweight, float* dbias);

  Forward layer_norm[kDTypes];
  Forward rms_norm[kDTypes];
  Backward layer_norm_backward[kDTypes];
  Backward rms_norm_backward[kDTypes];
  // out[i] = in[i] + offset, from any DType.
  void (*widen[kDTypes])(const void* in, float offset, float* out, int64_t n);
  // out[i] = the sum over j < count of partial[j * stride + i], in that order, to any DType.
  void (*reduce[kDTypes])(const float* partial, int64_t count, int64_t stride, void* out, int64_t begin, int64_t end);
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::NormKernels, norm)
