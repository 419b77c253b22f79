// Dense attention on NVIDIA GPUs, forward: memory, the choice of kernels. The arithmetic is in attention.cuh.

#include <tuple>

#include "attention.h"

namespace pykern {
namespace {

using Kernel = void (*)(const AttentionForwardArgs);

template <class T, int kSize>
Kernel kernel_of(bool softcap) {
  return softcap ? &attention_forward<T, kSize, true> : &attention_forward<T, kSize, false>;
}

template <class T>
Kernel kernel_of(int size, bool softcap) {
  switch (size) {
    case 32: return kernel_of<T, 32>(softcap);
    case 64: return kernel_of<T, 64>(softcap);
    case 128: return kernel_of<T, 128>(softcap);
    default: return kernel_of<T, 256>(softcap);
  }
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks, const std::optional<Tensor>&,
    double dropout_p, double scale, bool, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    std::optional<double> softcap, const std::string& align) {
  STD_TORCH_CHECK(!attn_mask && dropout_p == 0, "attn_mask and dropout are not among what this kernel computes");
  const AttentionShape shape(query, key, value, window_left, window_right, align);
  STD_TORCH_CHECK(shape.dtype != DType::f32, "query must be float16 or bfloat16");
  const int compiled = forward_size(shape.size, shape.value_size);

  const Device device(query);
  const std::vector<int64_t> out_sizes = shape.out_sizes(), lse_sizes = shape.lse_sizes();
  Tensor out = device.empty(as_sizes(out_sizes), shape.dtype), lse = device.empty(as_sizes(lse_sizes), DType::f32);
  if (shape.rows() > 0) {
    AttentionInputs in(device);
    AttentionForwardArgs args = {};
    args.query = in.heads(query, "query");
    args.key = in.heads(key, "key");
    args.value = in.heads(value, "value");
    args.out = HeadsOf(out).heads;
    device.out(out, "out");
    args.lse = static_cast<float*>(device.out(lse, "lse"));
    args.band = shape.band;
    args.heads = shape.heads;
    args.group = shape.group();
    args.size = shape.size;
    args.value_size = shape.value_size;
    args.slopes_of_batch = alibi_slopes && alibi_slopes->dim() > 1;
    args.slopes = in.floats(alibi_slopes, "alibi_slopes", (args.slopes_of_batch ? shape.batch : 1) * shape.heads);
    args.sinks = in.floats(sinks, "sinks", shape.heads);
    set_scores(args, scale, softcap);
    const ForwardTile tile = forward_tile(compiled);
    device.launch(
        shape.dtype == DType::f16 ? kernel_of<__half>(compiled, softcap.has_value())
                                  : kernel_of<__nv_bfloat16>(compiled, softcap.has_value()),
        forward_grid(args, tile, shape.batch, shape.band.queries, shape.band.keys), dim3(tile.threads()),
        tile.shared_bytes(compiled), args);
  }
  return {out, lse};
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { m.impl("attention", TORCH_BOX(&pykern::attention)); }
