// Gradients of dense attention on NVIDIA GPUs: memory, the choice of kernels. The arithmetic is in
// attention_backward.cuh.

#include <pykern/attention_backward.cuh>

#include <algorithm>
#include <deque>
#include <numbers>
#include <tuple>
#include <vector>

#include "../attention_ops.h"
#include "launch.h"

namespace pykern {
namespace {

using Optional = std::optional<Tensor>;

unsigned checked_grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "the tensors have too many rows for one launch: ", blocks, " blocks");
  return static_cast<unsigned>(blocks);
}

template <class T, int kSize, Gradient kOf>
void launch_gradient(const Device& device, const AttentionGradientArgs& args, int64_t batch) {
  using Plan = GradientPlan<kSize, kOf>;
  constexpr int kOwned = Plan::kTile.owned;
  const int64_t tiles = ((Plan::kKeys ? args.band.keys : args.band.queries) + kOwned - 1) / kOwned;
  device.launch(
      args.softcap > 0 ? attention_gradients<T, kSize, kOf, true> : attention_gradients<T, kSize, kOf, false>,
      checked_grid(tiles * (Plan::kKeys ? args.key_heads : args.heads) * batch), Plan::kThreads,
      Plan::kSharedBytes, args);
}

template <class T, int kSize>
void launch_gradients(const Device& device, const AttentionGradientArgs& args, int64_t batch) {
  if (args.dquery.data) launch_gradient<T, kSize, Gradient::query>(device, args, batch);
  if constexpr (kSize <= 128) {
    if (args.dkey.data || args.dvalue.data) launch_gradient<T, kSize, Gradient::key_and_value>(device, args, batch);
  } else {
    if (args.dkey.data) launch_gradient<T, kSize, Gradient::key>(device, args, batch);
    if (args.dvalue.data) launch_gradient<T, kSize, Gradient::value>(device, args, batch);
  }
}

template <class T>
void launch_all(
    const Device& device, const AttentionStatisticsArgs& statistics, const AttentionGradientArgs& args, int64_t batch) {
  if (statistics.rows > 0)
    device.launch(
        attention_statistics<T>, checked_grid((statistics.rows + kStatisticsRows - 1) / kStatisticsRows),
        kStatisticsThreads, 0, statistics);
  const int widest = std::max(args.size, args.value_size);
  if (widest <= 64) launch_gradients<T, 64>(device, args, batch);
  else if (widest <= 128) launch_gradients<T, 128>(device, args, batch);
  else launch_gradients<T, 256>(device, args, batch);
}

// A statistic of the forward or its gradient: one float a query, contiguous.
Tensor statistic(const Tensor& given, const char* name, int64_t rows) {
  STD_TORCH_CHECK(
      dtype_of(given, name) == DType::f32 && given.numel() == rows, name, " must be float32, one a query and head");
  return given.is_contiguous() ? given : torch::stable::contiguous(given);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Optional& dout, const Optional& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Optional& attn_mask, const Optional& alibi_slopes, const Optional& sinks, const Optional&, double dropout_p,
    double scale, bool, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    std::optional<double> softcap, const std::string& align, const Tensor& out, const Tensor& lse,
    const std::vector<bool>& wanted) {
  STD_TORCH_CHECK(
      !attn_mask && !alibi_slopes && !sinks && dropout_p == 0,
      "attn_mask, alibi_slopes, sinks and dropout are not among what this kernel computes");
  const AttentionShape shape(query, key, value, window_left, window_right, align);
  STD_TORCH_CHECK(shape.dtype != DType::f32, "query must be float16 or bfloat16");
  const int widest = std::max(shape.size, shape.value_size);
  STD_TORCH_CHECK(
      shape.size % 8 == 0 && shape.value_size % 8 == 0 && widest <= 256,
      "heads must have a multiple of 8 elements, up to 256, not ", shape.size, " and ", shape.value_size);
  const std::vector<int64_t> out_sizes = shape.out_sizes();
  for (const Tensor* t : {&out, dout ? &*dout : &out}) {
    const char* const name = t == &out ? "out" : "dout";
    STD_TORCH_CHECK(
        dtype_of(*t, name) == shape.dtype && std::ranges::equal(t->sizes(), out_sizes), name,
        " must have the dtype and sizes of the attention's output");
  }

  const Device device(query);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> result;
  AttentionGradientArgs args = {};
  const auto gradient = [&](Tensor& into, const Tensor& like, const char* name) {
    into = device.empty(like.sizes(), shape.dtype);
    device.out(into, name);
    return HeadsOf(into, 16).heads;
  };
  if (wanted[0]) args.dquery = gradient(std::get<0>(result), query, "dquery");
  if (wanted[1]) args.dkey = gradient(std::get<1>(result), key, "dkey");
  if (wanted[2] && dout) args.dvalue = gradient(std::get<2>(result), value, "dvalue");
  if (wanted[2] && !dout) {
    std::get<2>(result) = device.empty(value.sizes(), shape.dtype);
    torch::stable::zero_(std::get<2>(result));
  }
  if (!args.dquery.data && !args.dkey.data && !args.dvalue.data) return result;

  std::deque<HeadsOf> read;  // what is read lives until it is launched
  const auto in = [&](const Tensor& t, const char* name) {
    const HeadsOf& given = read.emplace_back(t, 16);
    device.in(given.tensor, name);
    return given.heads;
  };
  args.query = in(query, "query");
  args.key = in(key, "key");
  args.value = in(value, "value");
  if (dout) args.dout = in(*dout, "dout");
  args.band = shape.band;
  args.heads = shape.heads;
  args.key_heads = shape.key_heads;
  args.size = shape.size;
  args.value_size = shape.value_size;
  args.scale = static_cast<float>(scale);
  args.to_exponent = static_cast<float>(softcap ? scale / *softcap : scale * std::numbers::log2e);
  args.softcap = static_cast<float>(softcap.value_or(0) * std::numbers::log2e);

  AttentionStatisticsArgs statistics = {};
  statistics.call = args;
  statistics.out = in(out, "out");
  const Tensor lse_rows = statistic(lse, "lse", shape.rows());
  statistics.lse = static_cast<const float*>(device.in(lse_rows, "lse"));
  Optional dlse_rows;
  if (dlse) {
    dlse_rows = statistic(*dlse, "dlse", shape.rows());
    statistics.dlse = static_cast<const float*>(device.in(*dlse_rows, "dlse"));
  }
  statistics.rows = shape.rows();
  const std::array<int64_t, 2> pairs = {shape.rows(), 2};
  const Tensor of_queries = device.empty(Sizes(pairs.data(), pairs.size()), DType::f32);
  statistics.statistics = static_cast<float2*>(device.out(of_queries, "statistics"));
  args.statistics = statistics.statistics;

  if (shape.dtype == DType::f16) launch_all<__half>(device, statistics, args, shape.batch);
  else launch_all<__nv_bfloat16>(device, statistics, args, shape.batch);
  return result;
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { m.impl("attention_backward", TORCH_BOX(&pykern::attention_backward)); }
