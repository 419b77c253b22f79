// Linear layers with low-rank adapters and few rows of input on NVIDIA GPUs: memory and the choice of kernels. The
// arithmetic is in lora.cuh.

#include <pykern/lora.cuh>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "../lora_ops.h"
#include "launch.h"
#include "linear.h"
#include "weight4bit.h"

namespace pykern {
namespace {

using Choice = LinearKernels<LoraArgs>;

template <class T, int kRows, class Tiles>
Choice choice_of(const LoraArgs& args) {
  using Rank = RankProduct<T, kRows / 8, Tiles::kLaneChunks>;
  constexpr int kSlotBytes = ForwardSlot<Tiles, kRows>::kBytes, kStages = lora_stages(kRows);
  static_assert(kRows * Rank::kStride * sizeof(float) <= kStages * kSlotBytes, "S lies where the slots were");
  return {
      &lora_forward<T, kRows, Tiles>, &lora_combine<T>, kRows, Tiles::kDepth,
      kStages * (kSlotBytes + Rank::tile_bytes(args.rank, args.wide_adapter))};
}

// W of codes, which another tile of rows may read as well.
template <class T, int kRows>
Choice coded_choice(const LoraArgs& args) {
  constexpr bool kOnce = kRows == 16;
  if (args.weight.scaling == Scaling::blocks) return choice_of<T, kRows, CodedTiles<T, Scaling::blocks, kOnce>>(args);
  if (args.weight.scaling == Scaling::nested) return choice_of<T, kRows, CodedTiles<T, Scaling::nested, kOnce>>(args);
  return choice_of<T, kRows, CodedTiles<T, Scaling::groups, kOnce>>(args);
}

// Beside what decodes codes, the accumulators of 64 rows and of their S would not fit into registers.
template <class T>
Choice choice_of(const LoraArgs& args) {
  if (args.rows <= 16) return args.floats ? choice_of<T, 16, FloatTiles<T>>(args) : coded_choice<T, 16>(args);
  return args.floats ? choice_of<T, 64, FloatTiles<T>>(args) : coded_choice<T, 32>(args);
}

class CudaLora {
 public:
  explicit CudaLora(const Tensor& input) : device_(input) {}

  Tensor empty(Sizes sizes, DType dtype) const { return device_.empty(sizes, dtype); }

  void forward(const OneLora& call, const Tensor& y) const {
    const LinearShape& shape = call.shape;
    STD_TORCH_CHECK(shape.dtype != DType::f32, "input must be float16 or bfloat16");
    STD_TORCH_CHECK(!call.dropout, "the adapter's kernel for few rows has no dropout");
    STD_TORCH_CHECK(call.rank <= kMostRank, "lora_a must have at most ", kMostRank, " rows, not ", call.rank);
    STD_TORCH_CHECK(
        std::max(shape.in, shape.out) <= kMostLinearColumns, "weight must have at most ", kMostLinearColumns,
        " rows and columns");
    LoraArgs args = {};
    args.rows = shape.rows;
    args.columns = static_cast<int>(shape.out);
    args.depth = static_cast<int>(shape.in);
    args.rank = static_cast<int>(call.rank);
    args.scaling = static_cast<float>(call.scaling);
    args.wide_adapter = call.adapter_dtype == DType::f32;
    args.y = device_.out(y, "y");

    const StridedRows input(device_, call.input, "input", true), lora_a(device_, call.lora_a, "lora_a", true),
        lora_b(device_, call.lora_b, "lora_b", false);
    args.x = input.data;
    args.x_stride = input.stride;
    args.lora_a = lora_a.data;
    args.a_stride = lora_a.stride;
    args.lora_b = lora_b.data;
    args.b_stride = lora_b.stride;
    const uintptr_t four = args.wide_adapter ? 16 : 8;  // bytes of four numbers
    args.aligned_b =
        args.rank % 4 == 0 && lora_b.stride % 4 == 0 && reinterpret_cast<uintptr_t>(lora_b.data) % four == 0;

    const Vector bias(device_, call.bias, "bias"), dora_scale(device_, call.dora_scale, "dora_scale");
    args.bias = bias.data;
    args.wide_bias = bias.wide;
    args.dora_scale = dora_scale.data;
    args.wide_dora_scale = dora_scale.wide;

    if (call.weight.packed) {
      const DeviceWeight weight(device_, *call.weight.packed);
      STD_TORCH_CHECK(
          chunks_have_one_scale(weight.weight), "rows must be of whole chunks of 32 weights with one scale each");
      args.weight = weight.weight;
      launch(args, shape.dtype);
    } else {
      const StridedRows weight(device_, *call.weight.floats, "weight", true);
      args.floats = weight.data;
      args.floats_stride = weight.stride;
      launch(args, shape.dtype);
    }
  }

 private:
  // What there is of a vector over the columns of y.
  struct Vector {
    Vector(const Device& device, const std::optional<Tensor>& given, const char* name) {
      if (!given) return;
      tensor = torch::stable::contiguous(*given);
      data = device.in(*tensor, name);
      wide = dtype_of(*given, name) == DType::f32;
    }

    std::optional<Tensor> tensor;
    const void* data = nullptr;
    bool wide = false;
  };

  void launch(LoraArgs& args, DType dtype) const {
    const Choice chosen = dtype == DType::f16 ? choice_of<__half>(args) : choice_of<__nv_bfloat16>(args);
    launch_linear(device_, chosen, args);
  }

  const Device device_;
};

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { pykern::LoraOps<pykern::CudaLora>::register_forward_in(m); }
