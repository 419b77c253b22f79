// Gradients of dense attention on NVIDIA GPUs: memory, the choice of kernels. The arithmetic is in
// attention_backward.cuh.

#include "attention_backward.h"

#include <tuple>

namespace pykern {
namespace {

using Optional = std::optional<Tensor>;

template <class T>
void launch_all(
    const Device& device, const AttentionStatisticsArgs& statistics, const AttentionGradientArgs& args, int64_t batch) {
  if (statistics.rows > 0)
    device.launch(
        attention_statistics<T>, checked_grid((statistics.rows + kStatisticsRows - 1) / kStatisticsRows),
        kStatisticsThreads, 0, statistics);
  launch_gradients(args, [&]<int kSize, Gradient kOf>() {
    using Plan = GradientPlan<kSize, kOf>;
    const int64_t tiles = DenseGradient<Plan>::tiles(Plan::kKeys ? args.band.keys : args.band.queries);
    device.launch(
        args.softcap > 0 ? attention_gradients<T, kSize, kOf, true> : attention_gradients<T, kSize, kOf, false>,
        checked_grid(tiles * (Plan::kKeys ? args.key_heads : args.heads) * batch), Plan::kThreads, Plan::kSharedBytes,
        args);
  });
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
  const Device device(query);
  GradientMemory memory(device, shape, {dout, dlse, query, key, value, out, lse}, wanted, scale, softcap);
  if (memory.anything()) {
    memory.args.band = memory.statistics.call.band = shape.band;
    if (shape.dtype == DType::f16) launch_all<__half>(device, memory.statistics, memory.args, shape.batch);
    else launch_all<__nv_bfloat16>(device, memory.statistics, memory.args, shape.batch);
  }
  const auto& [dquery, dkey, dvalue] = memory.gradients;
  return {dquery, dkey, dvalue, {}, {}, {}};
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { m.impl("attention_backward", TORCH_BOX(&pykern::attention_backward)); }
