// What csrc/cpu/dequantize_4bit.cpp asks of csrc/cpu/simd/dequantize_4bit.cpp.

#pragma once

#include "../include/pykern/weight4bit.h"
#include "isa.h"

namespace pykern {

// One function per DType of the values.
struct Dequantize4bitKernels {
  // The values of elements [begin, end), at `out` those of element 0. `past_caches` where `out` and the range's
  // bounds are whole cache lines and each scale serves a multiple of 32 elements.
  using Dequantize =
      void (*)(const Weight4bit& weight, int64_t begin, int64_t end, void* out, bool past_caches);

  Dequantize dequantize[kDTypes];
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::Dequantize4bitKernels, dequantize_4bit)
