// Dense attention on NVIDIA GPUs, forward: memory, the choice of kernels. The arithmetic is in attention.cuh.

#include <pykern/attention.cuh>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "../attention_ops.h"
#include "launch.h"

namespace pykern {
namespace {

// How a call is cut.

constexpr int64_t kMostBlocks = 65535;  // in the grid's second and third dimension

// K and V of the heads that are worked on together should stay in the second-level cache beside other things; an A100's
// has 40 MB, an H100's 50.
constexpr int64_t kCachedBytes = 16 << 20;

int64_t heads_together(const AttentionShape& shape) {
  const int64_t key_head = int64_t{2} * shape.band.keys * (shape.size + shape.value_size);
  const int64_t key_heads = std::max<int64_t>(kCachedBytes / std::max<int64_t>(key_head, 1), 1);
  return std::min(key_heads * shape.group(), shape.batch * shape.heads);
}

int padded_size(const AttentionShape& shape) {
  const int widest = std::max(shape.size, shape.value_size);
  return widest <= 32 ? 32 : widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
}

// The kernels.

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

// What kernels read, as they read it.

class Inputs {
 public:
  Inputs(const Device& device, const AttentionShape& shape) : device_(device), shape_(shape) {}

  Heads heads(const Tensor& t, const char* name) {
    const HeadsOf given(t, 16);
    device_.in(kept_.emplace_back(given.tensor), name);
    return given.heads;
  }

  // fp32 for each head or, where `batched`, for each head of all batch entries; null where not given.
  const float* per_head(const std::optional<Tensor>& given, const char* name, bool batched) {
    if (!given) return nullptr;
    const int64_t count = batched ? shape_.batch * shape_.heads : shape_.heads;
    STD_TORCH_CHECK(given->numel() == count, name, " must have ", count, " elements, not ", given->numel());
    Tensor& copy = kept_.emplace_back(device_.empty(given->sizes(), DType::f32));
    torch::stable::copy_(copy, *given);
    return static_cast<const float*>(device_.in(copy, name));
  }

 private:
  const Device& device_;
  const AttentionShape& shape_;
  std::vector<Tensor> kept_;
};

// How a product of rows becomes a score.
void set_scores(AttentionForwardArgs& args, double scale, std::optional<double> softcap) {
  args.inner = static_cast<float>(softcap ? scale / *softcap : std::copysign(1.0, scale));
  const double outer = softcap ? *softcap : std::abs(scale);
  args.outer = static_cast<float>(outer * 1.4426950408889634);
  // It multiplies the -inf of masked keys, where ALiBi does not come before; times zero they would be NaN. The smallest
  // normal number leaves all weights alike as well.
  if (!args.slopes) args.outer = std::max(args.outer, std::numeric_limits<float>::min());
  // ln 2, but for the rounding of `outer` where it multiplies all that a score is made of.
  args.natural = args.slopes || args.sinks ? kLn2 : static_cast<float>(outer / args.outer);
}

void launch(const Device& device, const AttentionShape& shape, AttentionForwardArgs& args, bool softcap) {
  const int size = padded_size(shape);
  const ForwardTile tile = forward_tile(size);
  const int64_t all_heads = shape.batch * shape.heads, together = heads_together(shape);
  const int64_t tiles = (shape.band.queries + tile.queries - 1) / tile.queries;
  const int64_t times = (all_heads + together - 1) / together;
  STD_TORCH_CHECK(tiles <= kMostBlocks, "query must have a length of up to ", kMostBlocks * tile.queries);
  STD_TORCH_CHECK(all_heads < int64_t{1} << 31 && times <= kMostBlocks, "query has too many heads: ", all_heads);
  args.all_heads = static_cast<int>(all_heads);
  const Kernel kernel =
      shape.dtype == DType::f16 ? kernel_of<__half>(size, softcap) : kernel_of<__nv_bfloat16>(size, softcap);
  const dim3 grid(static_cast<unsigned>(together), static_cast<unsigned>(tiles), static_cast<unsigned>(times));
  device.launch(kernel, grid, dim3(tile.threads()), tile.shared_bytes(size), args);
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& attn_mask,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& sinks, const std::optional<Tensor>&,
    double dropout_p, double scale, bool, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    std::optional<double> softcap, const std::string& align) {
  STD_TORCH_CHECK(!attn_mask && dropout_p == 0, "attn_mask and dropout are not among what this kernel computes");
  const AttentionShape shape(query, key, value, window_left, window_right, align);
  STD_TORCH_CHECK(shape.dtype != DType::f32, "query must be float16 or bfloat16");
  STD_TORCH_CHECK(
      shape.size % 8 == 0 && shape.value_size % 8 == 0 && std::max(shape.size, shape.value_size) <= 256,
      "heads must have a multiple of 8 elements, up to 256, not ", shape.size, " and ", shape.value_size);

  const Device device(query);
  const std::vector<int64_t> out_sizes = shape.out_sizes(), lse_sizes = shape.lse_sizes();
  Tensor out = device.empty(as_sizes(out_sizes), shape.dtype), lse = device.empty(as_sizes(lse_sizes), DType::f32);
  if (shape.rows() > 0) {
    Inputs in(device, shape);
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
    args.slopes = in.per_head(alibi_slopes, "alibi_slopes", args.slopes_of_batch);
    args.sinks = in.per_head(sinks, "sinks", false);
    set_scores(args, scale, softcap);
    launch(device, shape, args, softcap.has_value());
  }
  return {out, lse};
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { m.impl("attention", TORCH_BOX(&pykern::attention)); }
