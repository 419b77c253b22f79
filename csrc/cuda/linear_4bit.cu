// Products with 4-bit weights on NVIDIA GPUs: memory and the choice of kernels. The arithmetic is in
// linear_4bit.cuh and linear_4bit_backward.cuh, with few rows in linear_4bit_gemv.cuh.

#include <pykern/linear_4bit_backward.cuh>

#include <algorithm>
#include <array>
#include <optional>
#include <type_traits>

#include "../linear_4bit_ops.h"
#include "launch.h"
#include "linear.h"
#include "linear_4bit_gemv.h"
#include "weight4bit.h"

namespace pykern {
namespace {

using Choice = LinearKernels<LinearArgs>;

template <class T, int kRows, Scaling kScaling>
Choice forward_choice() {
  using Tiles = ForwardTiles<T, kRows, kScaling>;
  constexpr int kSlotBytes = ForwardSlot<Tiles, kRows>::kBytes;
  return {
      &linear_4bit_forward<T, kRows, kScaling>, &linear_4bit_combine<T>, kRows, Tiles::kDepth,
      linear_stages(kSlotBytes) * kSlotBytes};
}

template <class T, int kRows, Scaling kScaling>
Choice backward_choice() {
  return {
      &linear_4bit_input_gradient<T, kRows, kScaling>, &linear_4bit_combine<T>, kRows, kBackwardDepth,
      backward_shared_bytes<T, kRows, kScaling>()};
}

template <bool kBackward, class T, Scaling kScaling>
Choice choice_of(int64_t rows) {
  const auto choice = [](auto tile_rows) {
    if constexpr (kBackward) return backward_choice<T, tile_rows.value, kScaling>();
    else return forward_choice<T, tile_rows.value, kScaling>();
  };
  if (rows <= 16) return choice(std::integral_constant<int, 16>());
  if (rows <= 32) return choice(std::integral_constant<int, 32>());
  if (rows <= 64) return choice(std::integral_constant<int, 64>());
  return choice(std::integral_constant<int, 128>());
}

template <bool kBackward, class T>
Choice choice_of(Scaling scaling, int64_t rows) {
  if (scaling == Scaling::blocks) return choice_of<kBackward, T, Scaling::blocks>(rows);
  if (scaling == Scaling::nested) return choice_of<kBackward, T, Scaling::nested>(rows);
  return choice_of<kBackward, T, Scaling::groups>(rows);
}

class CudaLinear {
 public:
  explicit CudaLinear(const Tensor& input) : device_(input) {}

  Tensor empty(Sizes sizes, DType dtype) const { return device_.empty(sizes, dtype); }

  void forward(
      const Tensor& input, const WeightOf& given, const std::optional<Tensor>& bias, const LinearShape& shape,
      const Tensor& y) const {
    const DeviceWeight weight(device_, given);
    const StridedRows rows(device_, input, "input", chunks_have_one_scale(weight.weight));
    const std::optional<Tensor> contiguous_bias = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    Gemv4bit call = {};
    call.weight = weight.weight;
    call.x = rows.data;
    call.rows = shape.rows;
    call.x_stride = rows.stride;
    call.type = shape.dtype;
    call.bias = bias ? device_.in(*contiguous_bias, "bias") : nullptr;
    call.bias_type = bias ? dtype_of(*bias, "bias") : shape.dtype;
    call.y = device_.out(y, "y");
    if (gemv_serves(call) || !tiles_serve(weight.weight, shape)) return linear_4bit_gemv(device_, call);

    LinearArgs args = {};
    args.weight = call.weight;
    args.x = call.x;
    args.x_stride = call.x_stride;
    args.y = call.y;
    args.rows = shape.rows;
    args.columns = static_cast<int>(shape.out);
    args.depth = static_cast<int>(shape.in);
    args.bias = call.bias;
    args.wide_bias = call.bias_type == DType::f32;
    launch<false>(args, shape.dtype);
  }

  void backward_input(
      const Tensor& dy, const WeightOf& given, const LinearShape& shape, const Tensor& dinput) const {
    const DeviceWeight weight(device_, given);
    STD_TORCH_CHECK(
        tiles_serve(weight.weight, shape),
        "the input's gradient takes float16 or bfloat16, and rows of whole chunks of 32 weights with one scale each");
    const StridedRows rows(device_, dy, "dy", true);
    LinearArgs args = {};
    args.weight = weight.weight;
    args.x = rows.data;
    args.x_stride = rows.stride;
    args.y = device_.out(dinput, "dinput");
    args.rows = shape.rows;
    args.columns = static_cast<int>(shape.in);
    args.depth = static_cast<int>(shape.out);
    launch<true>(args, shape.dtype);
  }

  void backward_bias(const Tensor& dy, const LinearShape& shape, const Tensor& dbias) const {
    const StridedRows rows(device_, dy, "dy", false);
    SumArgs args = {};
    args.x = rows.data;
    args.x_stride = rows.stride;
    args.rows = shape.rows;
    args.columns = static_cast<int>(shape.out);
    const int64_t tiles = (shape.out + kWarp * 8 - 1) / (kWarp * 8);
    const int64_t wanted = (int64_t{kBusyBlocks} * device_.multiprocessors() + tiles - 1) / tiles;
    // A part's sums cost a row of fp32 written and read: of fewer rows than these they would be most of the traffic.
    constexpr int64_t kLeastRows = 8 * kSumWarps;
    args.part_rows = std::max((shape.rows + wanted - 1) / wanted, kLeastRows);
    const int64_t parts = (shape.rows + args.part_rows - 1) / args.part_rows;
    if (parts == 1) {
      sum_rows(shape.dtype, args, 1, device_.out(dbias, "dbias"), dtype_of(dbias, "dbias"));
      return;
    }
    const std::array<int64_t, 2> sizes = {parts, shape.out};
    const Tensor sums = device_.empty(Sizes(sizes.data(), sizes.size()), DType::f32);
    void* const of_parts = device_.out(sums, "sums of rows");
    sum_rows(shape.dtype, args, parts, of_parts, DType::f32);
    args.x = of_parts;
    args.x_stride = shape.out;
    args.rows = args.part_rows = parts;
    sum_rows(DType::f32, args, 1, device_.out(dbias, "dbias"), dtype_of(dbias, "dbias"));
  }

 private:
  // Whether the kernels on tensor cores compute this.
  static bool tiles_serve(const Weight4bit& weight, const LinearShape& shape) {
    return shape.dtype != DType::f32 && chunks_have_one_scale(weight) &&
        std::max(shape.in, shape.out) <= kMostLinearColumns;
  }

  template <bool kBackward>
  void launch(LinearArgs& args, DType dtype) const {
    const Choice choice = dtype == DType::f16 ? choice_of<kBackward, __half>(args.weight.scaling, args.rows)
                                              : choice_of<kBackward, __nv_bfloat16>(args.weight.scaling, args.rows);
    launch_linear(device_, choice, args);
  }

  void sum_rows(DType dtype, SumArgs& args, int64_t parts, void* sums, DType type) const {
    args.sums = sums;
    args.type = type;
    const int full = dtype == DType::f32 ? 4 : 8;
    const bool wide = args.columns % full == 0 && args.x_stride % full == 0 &&
        reinterpret_cast<uintptr_t>(args.x) % 16 == 0;
    const int64_t in_tile = kWarp * (wide ? full : 1);
    const dim3 grid(
        static_cast<unsigned>((args.columns + in_tile - 1) / in_tile), static_cast<unsigned>(parts));
    const auto kernel = by_element(dtype, [&](auto type) {
      using T = decltype(type);
      return wide ? &linear_4bit_row_sum<T, kFullWidth<T>> : &linear_4bit_row_sum<T, 1>;
    });
    device_.launch(kernel, grid, dim3(kSumThreads), 0, args);
  }

  const Device device_;
};

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { pykern::LinearOps<pykern::CudaLinear>::register_in(m); }
