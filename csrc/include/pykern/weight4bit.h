// A 4-bit weight as kernels see it. Plain data: this header is compiled for every instruction set and on every device.
// The formats are told in pykern/ops/_weight4bit.py.

#pragma once

#include <cstdint>

#include "rows.h"

namespace pykern {

// Whose scales are what: of NF4 and FP4 those of blocks of the flattened weight, floats or codes that are decoded by
// nested_code[code] * nested_scales[block / 256] + nested_offset, product and sum rounded each for itself; of int4
// those of groups along rows.
enum class Scaling { blocks, nested, groups };

constexpr int kNestedBlock = 256;
constexpr int kInt4Zero = 8;  // the code of zero where there are no zero points

struct Weight4bit {
  Scaling scaling;
  const uint8_t* codes;        // element 2i in the high nibble of byte i, 2i + 1 in the low one
  const void* scales;          // Scaling::nested: uint8_t; blocks: float; groups: of scale_type
  DType scale_type;            // f32 but for groups
  const float* nested_scales;  // these three for Scaling::nested alone
  const float* nested_code;    // (256,)
  const float* nested_offset;  // one
  const float* code;           // (16,), the value of each code; null for groups
  const uint8_t* zero_points;  // for groups, as many as scales; null: kInt4Zero
  int64_t count;               // elements
  int64_t columns;             // of a row: the last dimension
  int64_t blocksize;           // elements of a block or of a group: for blocks a power of two of at least 32
  int64_t groups;              // of a row: ceil(columns / blocksize); Scaling::groups alone
};

}  // namespace pykern
