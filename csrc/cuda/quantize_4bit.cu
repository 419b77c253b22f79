// Quantising to 4 bits on NVIDIA GPUs: memory, code tables, the choice of kernels. The arithmetic is in
// quantize_4bit.cuh.

#include <pykern/quantize_4bit.cuh>

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <string>
#include <tuple>
#include <vector>

#include "launch.h"
#include "weight4bit.h"

namespace pykern {
namespace {

// Contiguous and aligned to 16 bytes, copied where it is not.
Tensor aligned(const Device& device, const Tensor& weight, DType dtype) {
  Tensor x = torch::stable::contiguous(weight);
  if (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0) return x;
  Tensor copy = device.empty(x.sizes(), dtype);
  torch::stable::copy_(copy, x);
  return copy;
}

// Threads that take `each` of `count`, in blocks.
dim3 blocks_for(int64_t count, int64_t each) {
  const int64_t blocks = (count + each - 1) / each;
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "weight has too many elements for one launch: ", count);
  return dim3(static_cast<unsigned>(blocks));
}

std::tuple<Tensor, Tensor> quantize_4bit_op(const Tensor& weight, std::string quant_type, int64_t blocksize) {
  STD_TORCH_CHECK(quant_type == "nf4" || quant_type == "fp4", "quant_type must be nf4 or fp4, not ", quant_type);
  constexpr int64_t kElements = kQuantizeThreads * kPerThread;
  STD_TORCH_CHECK(
      blocksize >= 32 && blocksize <= kElements && std::has_single_bit(static_cast<uint64_t>(blocksize)),
      "blocksize must be a power of two from 32 to ", kElements, ", not ", blocksize);
  const DType dtype = dtype_of(weight, "weight");
  const Device device(weight);
  const Tensor x = aligned(device, weight, dtype);
  QuantizeBlocksArgs args = {};
  args.count = x.numel();
  const int64_t bytes = (args.count + 1) / 2, scales = (args.count + blocksize - 1) / blocksize;
  const Tensor codes = device.empty_bytes(Sizes(&bytes, 1)), absmax = device.empty(Sizes(&scales, 1), DType::f32);
  if (args.count == 0) return {codes, absmax};
  args.weight = device.in(x, "weight");
  args.blocksize = static_cast<int>(blocksize);
  args.book = codebook(quant_type == "nf4");
  args.codes = static_cast<uint8_t*>(device.out(codes, "codes"));
  args.absmax = static_cast<float*>(device.out(absmax, "absmax"));
  const auto kernel = by_element(dtype, [](auto type) { return &quantize_4bit<decltype(type)>; });
  device.launch(kernel, blocks_for(args.count, kElements), dim3(kQuantizeThreads), 0, args);
  return {codes, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_int4_op(
    const Tensor& weight, int64_t blocksize, bool symmetric, torch::headeronly::ScalarType scale_dtype) {
  STD_TORCH_CHECK(weight.dim() > 0, "weight must have at least one dimension");
  STD_TORCH_CHECK(blocksize > 0, "blocksize must be at least 1, not ", blocksize);
  const DType dtype = dtype_of(weight, "weight");
  const Device device(weight);
  const Tensor x = aligned(device, weight, dtype);
  QuantizeGroupsArgs args = {};
  args.count = x.numel();
  std::vector<int64_t> sizes;
  sizes.assign(x.sizes().begin(), x.sizes().end());
  args.columns = sizes.back();
  args.blocksize = std::min(blocksize, std::max<int64_t>(args.columns, 1));
  sizes.back() = args.groups = (args.columns + args.blocksize - 1) / args.blocksize;
  args.all_groups = args.columns > 0 ? args.count / args.columns * args.groups : 0;
  args.scale_type = dtype_from(scale_dtype, "scale_dtype");
  const int64_t bytes = (args.count + 1) / 2;
  const Sizes scale_sizes(sizes.data(), sizes.size());
  const Tensor codes = device.empty_bytes(Sizes(&bytes, 1)), scales = device.empty(scale_sizes, args.scale_type);
  const Tensor zero_points = device.empty_bytes(scale_sizes);
  if (args.count == 0) return {codes, scales, zero_points};
  args.weight = device.in(x, "weight");
  args.symmetric = symmetric;
  args.codes = static_cast<uint8_t*>(device.out(codes, "codes"));
  args.scales = device.out(scales, "scales");
  args.zero_points = static_cast<uint8_t*>(device.out(zero_points, "zero_points"));
  const uint64_t threads = static_cast<uint64_t>((args.blocksize + kPerThread - 1) / kPerThread);
  args.team = static_cast<int>(std::min<uint64_t>(std::bit_ceil(threads), kWarp));
  const bool whole = args.columns % kPerThread == 0 && args.blocksize % kPerThread == 0 &&
      args.all_groups < int64_t{1} << 32;
  const auto kernel = by_element(dtype, [&](auto type) {
    using T = decltype(type);
    return whole ? &quantize_int4<T, true> : &quantize_int4<T, false>;
  });
  device.launch(kernel, blocks_for(args.all_groups, kGroupsThreads / args.team), dim3(kGroupsThreads), 0, args);
  if (!whole) {
    const auto codes_kernel = by_element(dtype, [](auto type) { return &quantize_int4_codes<decltype(type)>; });
    device.launch(codes_kernel, blocks_for(bytes, kGroupsThreads), dim3(kGroupsThreads), 0, args);
  }
  return {codes, scales, zero_points};
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) {
  m.impl("quantize_4bit", TORCH_BOX(&pykern::quantize_4bit_op));
  m.impl("quantize_int4", TORCH_BOX(&pykern::quantize_int4_op));
}
