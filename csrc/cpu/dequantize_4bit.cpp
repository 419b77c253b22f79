// Dequantising 4-bit weights on the CPU: memory and threads. The arithmetic is in simd/dequantize_4bit.cpp.

#include "dequantize_4bit.h"

#include <torch/csrc/stable/library.h>

#include "../weight4bit_ops.h"
#include "compiled.h"
#include "parallel.h"

namespace pykern {
namespace {

using Optional = std::optional<Tensor>;

const Dequantize4bitKernels& kernels() { return compiled(&PYKERN_CHOOSE(dequantize_4bit)); }

// Whether the values go past the caches, which saves reading what is to be overwritten; where that pays, as for norms.
bool past_caches(const Tensor& out, const Weight4bit& weight) {
  constexpr int64_t kBytes = 8 << 20, kLine = 64, kWhole = 32;
  const bool whole_lines = weight.blocksize % kWhole == 0 && (weight.code || weight.columns % kWhole == 0);
  return whole_lines && out.numel() * out.element_size() >= kBytes &&
      reinterpret_cast<uintptr_t>(out.data_ptr()) % kLine == 0;
}

Tensor dequantize_4bit(
    const Tensor& codes, const Tensor& absmax, const Optional& nested_absmax, const Optional& nested_code,
    const Optional& nested_offset, const Optional& code, const Optional& zero_points, std::vector<int64_t> shape,
    int64_t blocksize, torch::headeronly::ScalarType dtype) {
  const WeightOf given(codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, shape, blocksize);
  const Weight4bit& weight = given.weight;
  const DType wanted = dtype_from(dtype, "dtype");
  const Tensor out = empty(shape, wanted);
  const bool stream = past_caches(out, weight);
  const auto kernel = kernels().dequantize[static_cast<int>(wanted)];
  constexpr int64_t kUnit = 1024;  // threads meet at a cache line's end
  parallel((weight.count + kUnit - 1) / kUnit, kUnit, [&](int64_t begin, int64_t end) {
    kernel(weight, begin * kUnit, std::min(weight.count, end * kUnit), out.data_ptr(), stream);
  });
  return out;
}

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) {
  m.impl("dequantize_4bit", TORCH_BOX(&pykern::dequantize_4bit));
}
