// Quantising to 4 bits on the CPU: memory, threads and code tables. The arithmetic is in simd/quantize_4bit.cpp.

#include "quantize_4bit.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "../weight4bit_ops.h"
#include "compiled.h"
#include "parallel.h"

namespace pykern {
namespace {

const Quantize4bitKernels& kernels() { return compiled(&PYKERN_CHOOSE(quantize_4bit)); }

std::tuple<Tensor, Tensor> quantize_4bit(const Tensor& weight, std::string quant_type, int64_t blocksize) {
  STD_TORCH_CHECK(quant_type == "nf4" || quant_type == "fp4", "quant_type must be nf4 or fp4, not ", quant_type);
  STD_TORCH_CHECK(blocksize > 0 && blocksize % 2 == 0, "blocksize must be positive and even, not ", blocksize);
  const Tensor x = torch::stable::contiguous(weight);
  const int64_t count = x.numel(), blocks = (count + blocksize - 1) / blocksize;
  const Tensor codes = empty_bytes({(count + 1) / 2}), absmax = empty({blocks}, DType::f32);

  QuantizeBlocks args;
  args.weight = x.data_ptr();
  args.count = count;
  args.blocksize = blocksize;
  args.book = codebook(quant_type == "nf4");
  args.codes = static_cast<uint8_t*>(codes.data_ptr());
  args.absmax = static_cast<float*>(absmax.data_ptr());
  const auto kernel = kernels().blocks[static_cast<int>(dtype_of(x, "weight"))];
  parallel(blocks, blocksize, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  return {codes, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_int4(
    const Tensor& weight, int64_t blocksize, bool symmetric, torch::headeronly::ScalarType scale_dtype) {
  STD_TORCH_CHECK(weight.dim() > 0, "weight must have at least one dimension");
  STD_TORCH_CHECK(blocksize > 0, "blocksize must be at least 1, not ", blocksize);
  const Tensor x = torch::stable::contiguous(weight);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t columns = sizes.back(), rows = columns > 0 ? x.numel() / columns : 0;
  sizes.back() = (columns + blocksize - 1) / blocksize;
  QuantizeGroups args;
  args.scale_type = dtype_from(scale_dtype, "scale_dtype");
  const Tensor codes = empty_bytes({(x.numel() + 1) / 2}), scales = empty(sizes, args.scale_type);
  const Tensor zero_points = empty_bytes(sizes);

  args.weight = x.data_ptr();
  args.columns = columns;
  args.blocksize = blocksize;
  args.symmetric = symmetric;
  args.codes = static_cast<uint8_t*>(codes.data_ptr());
  args.scales = scales.data_ptr();
  args.zero_points = static_cast<uint8_t*>(zero_points.data_ptr());
  const auto kernel = kernels().groups[static_cast<int>(dtype_of(x, "weight"))];
  // Two rows of odd length share a byte, which is for one thread to write.
  const int64_t together = columns % 2 + 1;
  parallel((rows + together - 1) / together, together * columns, [&](int64_t begin, int64_t end) {
    kernel(args, begin * together, std::min(rows, end * together));
  });
  return {codes, scales, zero_points};
}

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) {
  m.impl("quantize_4bit", TORCH_BOX(&pykern::quantize_4bit));
  m.impl("quantize_int4", TORCH_BOX(&pykern::quantize_int4));
}
