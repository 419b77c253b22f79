// The functions of a file of cpu/simd, for the processor at hand.

#pragma once

#include <torch/headeronly/util/Exception.h>

namespace pykern {

// The table that PYKERN_CHOOSE found.
template <class Kernels>
const Kernels& compiled(const Kernels* table) {
  STD_TORCH_CHECK(table, "pykern's CPU kernels were not compiled for this processor");
  return *table;
}

}  // namespace pykern
