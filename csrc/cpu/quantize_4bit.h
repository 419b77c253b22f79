// What csrc/cpu/quantize_4bit.cpp asks of csrc/cpu/simd/quantize_4bit.cpp.

#pragma once

#include <cstdint>

#include "../include/pykern/code_tables.h"
#include "../include/pykern/rows.h"
#include "isa.h"

namespace pykern {

// A weight in blocks of the flattened whole.
struct QuantizeBlocks {
  const void* weight;
  int64_t count;
  int64_t blocksize;  // even
  Codebook book;
  uint8_t* codes;
  float* absmax;
};

// A weight in groups along its rows.
struct QuantizeGroups {
  const void* weight;
  int64_t columns;
  int64_t blocksize;
  bool symmetric;
  uint8_t* codes;
  void* scales;
  DType scale_type;
  uint8_t* zero_points;
};

// One function per DType of the weight.
struct Quantize4bitKernels {
  using Blocks = void (*)(const QuantizeBlocks&, int64_t first_block, int64_t end_block);
  // The first row begins at an even element.
  using Groups = void (*)(const QuantizeGroups&, int64_t first_row, int64_t end_row);

  Blocks blocks[kDTypes];
  Groups groups[kDTypes];
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::Quantize4bitKernels, quantize_4bit)
