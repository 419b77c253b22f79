// Packed attention on NVIDIA GPUs, forward: memory, the choice of kernels. The arithmetic is in attention_varlen.cuh.

#include "attention_varlen.h"

#include <tuple>

#include "../packed_ops.h"
#include "attention.h"

namespace pykern {
namespace {

PackedForwardKernel kernel_of(const PackedShape& shape, int size, bool softcap) {
  if (shape.sequences.pages.table) return paged_forward_kernel(shape.dtype, size, softcap);
  return shape.dtype == DType::f16 ? packed_forward_of<__half, false>(size, softcap)
                                   : packed_forward_of<__nv_bfloat16, false>(size, softcap);
}

std::tuple<Tensor, Tensor> attention_varlen(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, const std::optional<Tensor>& seqused_k,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>&, double dropout_p, double scale,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, std::optional<double> softcap) {
  STD_TORCH_CHECK(dropout_p == 0, "dropout is not among what this kernel computes");
  const PackedShape shape(
      query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k, block_table, window_left,
      window_right);
  STD_TORCH_CHECK(shape.dtype != DType::f32, "query must be float16 or bfloat16");
  const int compiled = forward_size(shape.size, shape.value_size);

  const Device device(query);
  const std::vector<int64_t> out_sizes = shape.out_sizes(), lse_sizes = shape.lse_sizes();
  Tensor out = device.empty(as_sizes(out_sizes), shape.dtype), lse = device.empty(as_sizes(lse_sizes), DType::f32);
  if (shape.rows() == 0) return {out, lse};

  const Sequences& sequences = shape.sequences;
  AttentionInputs in(device);
  PackedForwardArgs args = {};
  args.sequences = sequences;
  for (const PackedShape::Named& given : shape.integer_tensors) device.in(given.tensor, given.name);
  args.query = in.heads(query, "query");
  args.key = in.heads(key, "key");
  args.value = in.heads(value, "value");
  args.out = HeadsOf(out).heads;
  device.out(out, "out");
  args.lse = static_cast<float*>(device.out(lse, "lse"));
  args.heads = shape.heads;
  args.group = shape.group();
  args.size = shape.size;
  args.value_size = shape.value_size;
  args.slopes_of_batch = alibi_slopes && alibi_slopes->dim() > 1;
  args.slopes =
      in.floats(alibi_slopes, "alibi_slopes", int64_t{args.slopes_of_batch ? sequences.count : 1} * shape.heads);
  args.sinks = in.floats(sinks, "sinks", shape.heads);
  set_scores(args, scale, softcap);
  const ForwardTile tile = forward_tile(compiled);
  // One more sequence than there are, for the rows after the last one.
  const dim3 grid = forward_grid(
      args, tile, int64_t{sequences.count} + 1, sequences.most_queries, sequences.most_keys);
  device.launch(
      kernel_of(shape, compiled, softcap.has_value()), grid, dim3(tile.threads()), tile.shared_bytes(compiled), args);
  return {out, lse};
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { m.impl("attention_varlen", TORCH_BOX(&pykern::attention_varlen)); }
