// What the launchers of dense and packed attention share on NVIDIA GPUs, backward.

#pragma once

#include <pykern/attention_backward.cuh>

#include <algorithm>
#include <array>
#include <deque>
#include <numbers>
#include <optional>
#include <vector>

#include "../attention_ops.h"
#include "launch.h"

namespace pykern {

inline unsigned checked_grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "the tensors have too many rows for one launch: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

// A call's tensors; dout, dlse, out and lse are of the forward's results.
struct GradientTensors {
  const std::optional<Tensor>&dout, &dlse;
  const Tensor &query, &key, &value, &out, &lse;
};

// What a call reads and writes. Shape is AttentionShape or PackedShape.
class GradientMemory {
 public:
  template <class Shape>
  GradientMemory(
      const Device& device, const Shape& shape, const GradientTensors& given, const std::vector<bool>& wanted,
      double scale, std::optional<double> softcap)
      : device_(device), dtype_(shape.dtype) {
    STD_TORCH_CHECK(dtype_ != DType::f32, "query must be float16 or bfloat16");
    STD_TORCH_CHECK(
        shape.size % 8 == 0 && shape.value_size % 8 == 0 && std::max(shape.size, shape.value_size) <= 256,
        "heads must have a multiple of 8 elements, up to 256, not ", shape.size, " and ", shape.value_size);
    const std::vector<int64_t> out_sizes = shape.out_sizes();
    for (const Tensor* t : {&given.out, given.dout ? &*given.dout : &given.out}) {
      const char* const name = t == &given.out ? "out" : "dout";
      STD_TORCH_CHECK(
          dtype_of(*t, name) == dtype_ && std::ranges::equal(t->sizes(), out_sizes), name,
          " must have the dtype and sizes of the attention's output");
    }
    if (wanted[0]) args.dquery = gradient(0, given.query, "dquery");
    if (wanted[1]) args.dkey = gradient(1, given.key, "dkey");
    if (wanted[2] && given.dout) args.dvalue = gradient(2, given.value, "dvalue");
    if (wanted[2] && !given.dout) {
      gradients[2] = device.empty(given.value.sizes(), dtype_);
      torch::stable::zero_(gradients[2]);
    }
    if (!anything()) return;

    args.query = in(given.query, "query");
    args.key = in(given.key, "key");
    args.value = in(given.value, "value");
    if (given.dout) args.dout = in(*given.dout, "dout");
    args.heads = shape.heads;
    args.key_heads = shape.key_heads;
    args.size = shape.size;
    args.value_size = shape.value_size;
    args.scale = static_cast<float>(scale);
    args.to_exponent = static_cast<float>(softcap ? scale / *softcap : scale * std::numbers::log2e);
    args.softcap = static_cast<float>(softcap.value_or(0) * std::numbers::log2e);

    statistics.out = in(given.out, "out");
    statistics.lse = statistic(given.lse, "lse", shape.rows());
    if (given.dlse) statistics.dlse = statistic(*given.dlse, "dlse", shape.rows());
    statistics.rows = shape.rows();
    const std::array<int64_t, 2> pairs = {shape.rows(), 2};
    const Tensor& of_queries =
        kept_.emplace_back(device.empty(Sizes(pairs.data(), pairs.size()), DType::f32));
    statistics.statistics = static_cast<float2*>(device.out(of_queries, "statistics"));
    statistics.call = args;
    args.statistics = statistics.statistics;
  }

  // Whether a kernel has to run.
  bool anything() const { return args.dquery.data || args.dkey.data || args.dvalue.data; }

  std::array<Tensor, 3> gradients;  // of query, key and value; undefined where not wanted
  // But for the band.
  AttentionGradientArgs args = {};
  AttentionStatisticsArgs statistics = {};

 private:
  Heads gradient(int which, const Tensor& like, const char* name) {
    gradients[which] = device_.empty(like.sizes(), dtype_);
    device_.out(gradients[which], name);
    return HeadsOf(gradients[which], 16).heads;
  }

  Heads in(const Tensor& t, const char* name) {
    const HeadsOf given(t, 16);
    device_.in(kept_.emplace_back(given.tensor), name);
    return given.heads;
  }

  // A statistic of the forward or its gradient: one float a query, contiguous.
  const float* statistic(const Tensor& given, const char* name, int64_t rows) {
    STD_TORCH_CHECK(
        dtype_of(given, name) == DType::f32 && given.numel() == rows, name, " must be float32, one a query and head");
    const Tensor& kept = kept_.emplace_back(given.is_contiguous() ? given : torch::stable::contiguous(given));
    return static_cast<const float*>(device_.in(kept, name));
  }

  const Device& device_;
  const DType dtype_;
  std::deque<Tensor> kept_;  // what is read lives until it is launched
};

// Calls `launch` with the head size that kernels are compiled for and each of the gradients that need one.
template <int kSize, class Launch>
void launch_gradients(const AttentionGradientArgs& args, const Launch& launch) {
  if (args.dquery.data) launch.template operator()<kSize, Gradient::query>();
  if constexpr (kSize <= 128) {
    if (args.dkey.data || args.dvalue.data) launch.template operator()<kSize, Gradient::key_and_value>();
  } else {
    if (args.dkey.data) launch.template operator()<kSize, Gradient::key>();
    if (args.dvalue.data) launch.template operator()<kSize, Gradient::value>();
  }
}

template <class Launch>
void launch_gradients(const AttentionGradientArgs& args, const Launch& launch) {
  const int widest = std::max(args.size, args.value_size);
  if (widest <= 64) launch_gradients<64>(args, launch);
  else if (widest <= 128) launch_gradients<128>(args, launch);
  else launch_gradients<256>(args, launch);
}

}  // namespace pykern
