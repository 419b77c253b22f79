// Tensors as the launchers of every device take them: allocation, rows and element types, over libtorch's stable C
// interface.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "include/pykern/rows.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 has it by its older name alone
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace pykern {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline int32_t torch_code(DType dtype) {
  static const std::array<int32_t, kDTypes> codes = {
      aoti_torch_dtype_float32(), aoti_torch_dtype_float16(), aoti_torch_dtype_bfloat16()};
  return codes[static_cast<int>(dtype)];
}

inline DType dtype_of(const Tensor& t, const char* name) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  for (DType dtype : {DType::f32, DType::f16, DType::bf16})
    if (torch_code(dtype) == code) return dtype;
  STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  return DType::count;
}

// Whether empty() fills CPU memory, so that what no kernel writes is seen. torch does it where it allocates by itself,
// in deterministic mode, but not behind its stable C interface.
inline bool poison_memory = false;

// A contiguous tensor with uninitialised contents. The general empty() of the stable interface boxes six optional
// arguments, which costs more than a small kernel.
inline Tensor empty_of(Sizes sizes, int32_t dtype, int32_t device_type, int32_t index) {
  std::array<int64_t, 64> strides;
  STD_TORCH_CHECK(sizes.size() <= strides.size(), "at most 64 dimensions are supported");
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), dtype, device_type, index, &handle));
  Tensor out(handle);
  // All bits set are NaN in every float type.
  if (poison_memory && device_type == aoti_torch_device_type_cpu() && out.numel() > 0)
    std::memset(out.data_ptr(), 0xff, out.numel() * out.element_size());
  return out;
}

inline Tensor empty(Sizes sizes, DType dtype, int32_t device_type = aoti_torch_device_type_cpu(), int32_t index = 0) {
  return empty_of(sizes, torch_code(dtype), device_type, index);
}

inline Tensor empty_bytes(Sizes sizes, int32_t device_type = aoti_torch_device_type_cpu(), int32_t index = 0) {
  return empty_of(sizes, aoti_torch_dtype_uint8(), device_type, index);
}

// The rows of a tensor, read in place where the last dimension is contiguous and the others fold into few; else the
// rows of a contiguous copy, which lives as long as this.
class RowsOf {
 public:
  explicit RowsOf(const Tensor& t) : tensor(t) {
    if (!fold(tensor)) {
      tensor = torch::stable::contiguous(t);
      fold(tensor);
    }
    rows.data = tensor.data_ptr();
  }

  Tensor tensor;  // the one that is read
  Rows rows;

 private:
  bool fold(const Tensor& t) {
    const Sizes sizes = t.sizes(), strides = t.strides();
    const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
    if (sizes[last] > 1 && strides[last] != 1) return false;
    std::array<int64_t, kRowDims> size = {1}, stride = {0};  // innermost first
    int dims = 0;
    for (int64_t d = last - 1; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (dims > 0 && strides[d] == size[dims - 1] * stride[dims - 1]) {
        size[dims - 1] *= sizes[d];
        continue;
      }
      if (dims == kRowDims) return false;
      size[dims] = sizes[d];
      stride[dims++] = strides[d];
    }
    rows.dims = std::max(dims, 1);
    std::reverse_copy(size.begin(), size.begin() + rows.dims, rows.size);
    std::reverse_copy(stride.begin(), stride.begin() + rows.dims, rows.stride);
    return true;
  }
};

}  // namespace pykern
