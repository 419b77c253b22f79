// Gradients of packed attention on NVIDIA GPUs: memory, the choice of kernels. The arithmetic is in
// attention_varlen_backward.cuh.

#include <pykern/attention_varlen_backward.cuh>

#include <tuple>

#include "../packed_ops.h"
#include "attention_backward.h"

namespace pykern {
namespace {

using Optional = std::optional<Tensor>;

int64_t tiles_of(int rows, int tile) { return (int64_t{rows} + tile - 1) / tile; }

template <class T>
void launch_all(const Device& device, const GradientMemory& memory, const Sequences& sequences) {
  const AttentionGradientArgs& call = memory.args;
  const int64_t tiles = tiles_of(sequences.most_queries, kStatisticsRows);
  const int64_t blocks = tiles * call.heads * sequences.count;
  if (blocks > 0)
    device.launch(
        attention_varlen_statistics<T>, checked_grid(blocks), kStatisticsThreads, 0,
        PackedStatisticsArgs{memory.statistics, sequences, static_cast<int>(tiles)});
  launch_gradients(call, [&]<int kSize, Gradient kOf>() {
    using Plan = GradientPlan<kSize, kOf>;
    const int longest = Plan::kKeys ? sequences.most_keys : sequences.most_queries;
    const int64_t tiles = std::max<int64_t>(tiles_of(longest, Plan::kTile.owned), 1);
    // One more sequence than there are, for the rows after the last one.
    const int64_t heads = (int64_t{sequences.count} + 1) * (Plan::kKeys ? call.key_heads : call.heads);
    device.launch(
        call.softcap > 0 ? attention_varlen_gradients<T, kSize, kOf, true>
                         : attention_varlen_gradients<T, kSize, kOf, false>,
        checked_grid(tiles * heads), Plan::kThreads, Plan::kSharedBytes,
        PackedGradientArgs{call, sequences, static_cast<int>(tiles)});
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_varlen_backward(
    const Optional& dout, const Optional& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const Optional& alibi_slopes, const Optional& sinks, const Optional& seqused_k, const Optional& block_table,
    const Optional&, double dropout_p, double scale, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, std::optional<double> softcap, const Tensor& out, const Tensor& lse,
    const std::vector<bool>& wanted) {
  STD_TORCH_CHECK(
      !alibi_slopes && !sinks && !block_table && dropout_p == 0,
      "alibi_slopes, sinks, block_table and dropout are not among what this kernel computes");
  const PackedShape shape(
      query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, block_table, window_left,
      window_right);
  const Device device(query);
  const GradientMemory memory(device, shape, {dout, dlse, query, key, value, out, lse}, wanted, scale, softcap);
  if (memory.anything()) {
    for (const PackedShape::Named& given : shape.integer_tensors) device.in(given.tensor, given.name);
    if (shape.dtype == DType::f16) launch_all<__half>(device, memory, shape.sequences);
    else launch_all<__nv_bfloat16>(device, memory, shape.sequences);
  }
  const auto& [dquery, dkey, dvalue] = memory.gradients;
  return {dquery, dkey, dvalue, {}, {}};
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { m.impl("attention_varlen_backward", TORCH_BOX(&pykern::attention_varlen_backward)); }
