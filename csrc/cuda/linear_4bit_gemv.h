// A few rows times a 4-bit weight on NVIDIA GPUs.

#pragma once

#include "../include/pykern/weight4bit.h"
#include "launch.h"

namespace pykern {

// y = x · Wᵀ + bias. The pointers are Device::in()'s and out()'s, those of the weight included.
struct Gemv4bit {
  Weight4bit weight;  // (out, in)
  const void* x;      // (rows, in) of `type`, elements of a row contiguous
  int64_t rows;
  int64_t x_stride;  // elements from one row of x to the next
  DType type;        // of x and y
  const void* bias;  // (out,) or null
  DType bias_type;   // `type` or f32
  void* y;           // (rows, out), contiguous
};

// Whether reading the weight is what these rows cost, and rows and groups of it are of whole chunks: then this is the
// kernel to take.
bool gemv_serves(const Gemv4bit& call);

// Right for every call, but what gemv_serves does not take is slow.
void linear_4bit_gemv(const Device& device, const Gemv4bit& call);

}  // namespace pykern
