// Cached attention on NVIDIA GPUs: memory, the choice of kernels and of splits. The arithmetic is in
// attention_decode.cuh.

#include <pykern/attention_decode.cuh>

#include <algorithm>
#include <deque>
#include <tuple>

#include "../decode_ops.h"
#include "attention.h"

namespace pykern {
namespace {

// How a call is cut: by its shapes alone, not by lengths, so that it can be captured in a graph.

constexpr int64_t kMostRowTiles = 65535;  // in the grid's third dimension

// Parts of more splits than these would be merged for longer than their keys are read.
constexpr int kMostSplits = 128;

// Blocks a multiprocessor that keep its share of the memory busy (see decode_tile); room for more is not a reason to
// split.
constexpr int kBusyBlocks = 2;

// A part is written and read again in fp32, at size 128 as many bytes a row as two keys. Below these many keys a split
// loses more to that, and to beginning and ending, than it gains.
int least_keys(const DecodeShape& shape) { return std::max(128, 8 * shape.shared_rows()); }

// The fewest splits that keep the device about as busy as any number would: of the blocks' last turn, which few of them
// may share, no more than a fifth is lost.
int split_count(const DecodeShape& shape, int64_t blocks, int multiprocessors) {
  const int64_t slots = int64_t{kBusyBlocks} * multiprocessors;
  const int most = static_cast<int>(std::clamp<int64_t>(shape.capacity / least_keys(shape), 1, kMostSplits));
  const auto busy = [&](int splits) {
    const int64_t turns = (blocks * splits + slots - 1) / slots;
    return static_cast<double>(blocks * splits) / static_cast<double>(turns * slots);
  };
  double best = 0;
  for (int splits = 1; splits <= most; ++splits) best = std::max(best, busy(splits));
  int splits = 1;
  while (busy(splits) < 0.8 * best) ++splits;
  return splits;
}

// The kernels: more rows than the largest tile's are several tiles, which read the same keys.

using Kernel = void (*)(const AttentionDecodeArgs);

struct Choice {
  Kernel kernel;
  ForwardTile tile;
  int shared_bytes;
};

template <class T, int kSize, int kRows>
Choice choice() {
  constexpr ForwardTile kTile = decode_tile(kSize, kRows);
  return {&attention_decode<T, kSize, kRows>, kTile, decode_shared_bytes(kTile, kSize)};
}

template <class T, int kSize>
Choice choice_of(int rows) {
  // Eight warps of 16 rows at 256 would leave no registers for a second block, and little shared memory.
  constexpr int kLeast = kSize == 32 || kSize == 256 ? 32 : 16, kMost = kSize == 256 ? 64 : 128;
  if (rows <= kLeast) return choice<T, kSize, kLeast>();
  if (rows <= 64) return choice<T, kSize, 64>();
  return choice<T, kSize, kMost>();
}

template <class T>
Choice choice_of(int size, int rows) {
  switch (size) {
    case 32: return choice_of<T, 32>(rows);
    case 64: return choice_of<T, 64>(rows);
    case 128: return choice_of<T, 128>(rows);
    default: return choice_of<T, 256>(rows);
  }
}

void launch(const Device& device, const DecodeShape& shape, int size, AttentionDecodeArgs& args) {
  const bool f16 = shape.dtype == DType::f16;
  const int rows = shape.shared_rows();
  const Choice choice = f16 ? choice_of<__half>(size, rows) : choice_of<__nv_bfloat16>(size, rows);
  const int64_t row_tiles = (rows + choice.tile.queries - 1) / choice.tile.queries;
  const int64_t key_heads = int64_t{shape.batch} * shape.key_heads;
  STD_TORCH_CHECK(row_tiles <= kMostRowTiles, "query has too many heads: ", shape.heads);
  STD_TORCH_CHECK(shape.rows() < int64_t{1} << 31, "query has too many heads: ", shape.rows());
  args.splits = split_count(shape, key_heads * row_tiles, device.multiprocessors());

  std::optional<Tensor> parts, part_outs;
  if (args.splits > 1) {
    parts = device.empty(as_sizes({shape.rows(), args.splits, 2}), DType::f32);
    part_outs = device.empty(as_sizes({shape.rows(), args.splits, shape.value_size}), DType::f32);
    args.parts = static_cast<SoftmaxPart*>(device.out(*parts, "parts"));
    args.part_outs = static_cast<float*>(device.out(*part_outs, "part_outs"));
  }
  const dim3 grid(
      static_cast<unsigned>(key_heads), static_cast<unsigned>(args.splits), static_cast<unsigned>(row_tiles));
  device.launch(choice.kernel, grid, dim3(choice.tile.threads()), choice.shared_bytes, args);
  if (args.splits > 1) {
    const Kernel combine = f16 ? &attention_decode_combine<__half> : &attention_decode_combine<__nv_bfloat16>;
    device.launch(combine, dim3(static_cast<unsigned>(shape.rows())), dim3(kCombineThreads), 0, args);
  }
}

std::tuple<Tensor, Tensor> attention_decode_op(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& cache_seqlens,
    const std::optional<Tensor>& block_table, const std::optional<Tensor>& alibi_slopes,
    const std::optional<Tensor>& sinks, double scale, std::optional<int64_t> window_left,
    std::optional<double> softcap) {
  const DecodeShape shape(query, key_cache, value_cache, cache_seqlens, block_table, window_left);
  STD_TORCH_CHECK(shape.dtype != DType::f32, "query must be float16 or bfloat16");
  const int compiled = forward_size(shape.size, shape.value_size);

  const Device device(query);
  const std::vector<int64_t> out_sizes = shape.out_sizes(), lse_sizes = shape.lse_sizes();
  Tensor out = device.empty(as_sizes(out_sizes), shape.dtype), lse = device.empty(as_sizes(lse_sizes), DType::f32);
  if (shape.rows() > 0) {
    // A cache is copied only if its elements have gaps: an unaligned one Python gives to another kernel.
    AttentionInputs in(device);
    std::deque<Tensor> kept;
    const auto integers = [&](const Tensor& t, const char* name) {
      return static_cast<const int*>(device.in(kept.emplace_back(int32_values(t, name)), name));
    };
    AttentionDecodeArgs args = {};
    args.query = in.heads(query, "query");
    args.key = in.heads(key_cache, "key_cache");
    args.value = in.heads(value_cache, "value_cache");
    args.out = HeadsOf(out).heads;
    device.out(out, "out");
    args.lse = static_cast<float*>(device.out(lse, "lse"));
    args.lengths = integers(cache_seqlens, "cache_seqlens");
    args.pages = shape.pages_by(block_table ? integers(*block_table, "block_table") : nullptr);
    args.capacity = shape.capacity;
    args.band = {shape.tokens, 0, 0, shape.left, 0};
    args.heads = shape.heads;
    args.key_heads = shape.key_heads;
    args.group = shape.group();
    args.size = shape.size;
    args.value_size = shape.value_size;
    args.slopes_of_batch = alibi_slopes && alibi_slopes->dim() > 1;
    const int64_t batches = args.slopes_of_batch ? shape.batch : 1;
    args.slopes = in.floats(alibi_slopes, "alibi_slopes", batches * shape.heads);
    args.sinks = in.floats(sinks, "sinks", shape.heads);
    args.softcap = softcap.has_value();
    set_scores(args, scale, softcap);
    launch(device, shape, compiled, args);
  }
  return {out, lse};
}

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { m.impl("attention_decode", TORCH_BOX(&pykern::attention_decode_op)); }
