// The C++ type of a dtype, as CUDA's launchers choose kernels by it.

#pragma once

#include <pykern/vector.cuh>

#include <pykern/rows.h>

namespace pykern {

// choose(T()) for the C++ type of dtype.
template <class Choose>
auto by_element(DType dtype, const Choose& choose) {
  if (dtype == DType::f32) return choose(float());
  if (dtype == DType::f16) return choose(__half());
  return choose(__nv_bfloat16());
}

}  // namespace pykern
