// 4-bit weights as the launchers of every device take them. Arguments were checked in Python; what is checked here keeps
// a launcher from reading where it must not.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "include/pykern/weight4bit.h"
#include "tensors.h"

namespace pykern {

// The tensors of a weight, contiguous, and what kernels are told of them. They live as long as this.
class WeightOf {
 public:
  using Optional = std::optional<Tensor>;

  WeightOf(
      const Tensor& codes, const Tensor& absmax, const Optional& nested_absmax, const Optional& nested_code,
      const Optional& nested_offset, const Optional& code, const Optional& zero_points,
      const std::vector<int64_t>& shape, int64_t blocksize) {
    STD_TORCH_CHECK(!shape.empty(), "shape must have at least one dimension");
    STD_TORCH_CHECK(blocksize > 0, "blocksize must be at least 1, not ", blocksize);
    weight.count = 1;
    for (int64_t size : shape) {
      STD_TORCH_CHECK(size >= 0, "shape must have no negative sizes, not ", size);
      weight.count *= size;
    }
    weight.columns = shape.back();
    weight.blocksize = blocksize;
    weight.codes = static_cast<const uint8_t*>(take(codes, "codes", aoti_torch_dtype_uint8(), (weight.count + 1) / 2));
    if (!code) {
      weight.scaling = Scaling::groups;
      weight.groups = (weight.columns + blocksize - 1) / blocksize;
      const int64_t rows = weight.columns > 0 ? weight.count / weight.columns : 0;
      weight.scale_type = dtype_of(absmax, "absmax");
      weight.scales = take(absmax, "absmax", torch_code(weight.scale_type), rows * weight.groups);
      if (zero_points)
        weight.zero_points = static_cast<const uint8_t*>(
            take(*zero_points, "zero_points", aoti_torch_dtype_uint8(), rows * weight.groups));
      return;
    }
    STD_TORCH_CHECK(
        blocksize >= 32 && (blocksize & (blocksize - 1)) == 0, "blocksize must be a power of two from 32 on, not ",
        blocksize);
    const int64_t blocks = (weight.count + blocksize - 1) / blocksize;
    weight.scale_type = DType::f32;
    weight.code = floats(*code, "code", 16);
    if (!nested_absmax) {
      weight.scaling = Scaling::blocks;
      weight.scales = floats(absmax, "absmax", blocks);
      return;
    }
    STD_TORCH_CHECK(nested_code && nested_offset, "nested_absmax, nested_code and nested_offset belong together");
    weight.scaling = Scaling::nested;
    weight.scales = take(absmax, "absmax", aoti_torch_dtype_uint8(), blocks);
    weight.nested_scales = floats(*nested_absmax, "nested_absmax", (blocks + kNestedBlock - 1) / kNestedBlock);
    weight.nested_code = floats(*nested_code, "nested_code", 256);
    weight.nested_offset = floats(*nested_offset, "nested_offset", 1);
  }

  Weight4bit weight = {};

  // The tensors to which `weight` points, with their names.
  struct Named {
    Tensor tensor;
    const char* name;
  };
  std::vector<Named> tensors;

 private:
  const void* take(const Tensor& given, const char* name, int32_t dtype, int64_t count) {
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(given.get(), &code));
    STD_TORCH_CHECK(code == dtype, name, " has a dtype that this weight's format does not have");
    STD_TORCH_CHECK(given.numel() == count, name, " must have ", count, " elements, not ", given.numel());
    return tensors.emplace_back(given.is_contiguous() ? given : torch::stable::contiguous(given), name)
        .tensor.data_ptr();
  }

  const float* floats(const Tensor& given, const char* name, int64_t count) {
    return static_cast<const float*>(take(given, name, aoti_torch_dtype_float32(), count));
  }
};

// A dtype that an op is asked for.
inline DType dtype_from(torch::headeronly::ScalarType type, const char* name) {
  using torch::headeronly::ScalarType;
  if (type == ScalarType::Float) return DType::f32;
  if (type == ScalarType::Half) return DType::f16;
  if (type == ScalarType::BFloat16) return DType::bf16;
  STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  return DType::count;
}

}  // namespace pykern
