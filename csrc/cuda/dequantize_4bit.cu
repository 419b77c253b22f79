// Dequantising 4-bit weights on NVIDIA GPUs: memory, the choice of kernels. The arithmetic is in dequantize_4bit.cuh.

#include <pykern/dequantize_4bit.cuh>

#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "launch.h"
#include "weight4bit.h"

namespace pykern {
namespace {

using Optional = std::optional<Tensor>;

Tensor dequantize_4bit_op(
    const Tensor& codes, const Tensor& absmax, const Optional& nested_absmax, const Optional& nested_code,
    const Optional& nested_offset, const Optional& code, const Optional& zero_points,
    const std::vector<int64_t>& shape, int64_t blocksize, torch::headeronly::ScalarType dtype) {
  const WeightOf given(codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, shape, blocksize);
  const DType type = dtype_from(dtype, "dtype");
  const Device device(codes);
  Tensor out = device.empty(Sizes(shape.data(), shape.size()), type);
  if (given.weight.count == 0) return out;
  const DeviceWeight held(device, given);
  const Weight4bit& weight = held.weight;
  constexpr int64_t kTile = int64_t{kDequantizeThreads} * kChunk;
  const int64_t blocks = (weight.count + kTile - 1) / kTile;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "shape has too many elements for one launch: ", weight.count);
  const bool one_scale = weight.scaling != Scaling::groups ||
      (chunks_have_one_scale(weight) && weight.count / kChunk < int64_t{1} << 32);
  void* const to = device.out(out, "weight");
  by_element(type, [&](auto element) {
    using T = decltype(element);
    by_scales(weight, [&](auto scaling, auto scale) {
      using S = decltype(scale);
      constexpr Scaling kScaling = scaling.value;
      auto* kernel = &dequantize_4bit<T, kScaling, S, true>;
      if constexpr (kScaling == Scaling::groups)
        if (!one_scale) kernel = &dequantize_4bit<T, kScaling, S, false>;
      const dim3 grid(static_cast<unsigned>(blocks));
      device.launch(kernel, grid, dim3(kDequantizeThreads), 0, weight, static_cast<T*>(to));
    });
  });
  return out;
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { m.impl("dequantize_4bit", TORCH_BOX(&pykern::dequantize_4bit_op)); }
