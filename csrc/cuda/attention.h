// What the launchers of dense and packed attention share on NVIDIA GPUs, forward.

#pragma once

#include <pykern/attention.cuh>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>

#include "../attention_ops.h"
#include "launch.h"

namespace pykern {

// The head size that kernels are compiled for.
inline int forward_size(int size, int value_size) {
  STD_TORCH_CHECK(
      size % 8 == 0 && value_size % 8 == 0 && std::max(size, value_size) <= 256,
      "heads must have a multiple of 8 elements, up to 256, not ", size, " and ", value_size);
  const int widest = std::max(size, value_size);
  return widest <= 32 ? 32 : widest <= 64 ? 64 : widest <= 128 ? 128 : 256;
}

// What kernels read, as they read it.
class AttentionInputs {
 public:
  explicit AttentionInputs(const Device& device) : device_(device) {}

  Heads heads(const Tensor& t, const char* name) {
    const HeadsOf given(t, 16);
    device_.in(kept_.emplace_back(given.tensor), name);
    return given.heads;
  }

  // `count` numbers in fp32, or null where not given.
  const float* floats(const std::optional<Tensor>& given, const char* name, int64_t count) {
    if (!given) return nullptr;
    STD_TORCH_CHECK(given->numel() == count, name, " must have ", count, " elements, not ", given->numel());
    Tensor& copy = kept_.emplace_back(device_.empty(given->sizes(), DType::f32));
    torch::stable::copy_(copy, *given);
    return static_cast<const float*>(device_.in(copy, name));
  }

 private:
  const Device& device_;
  std::deque<Tensor> kept_;
};

// How a product of rows becomes a score.
template <class Args>
void set_scores(Args& args, double scale, std::optional<double> softcap) {
  args.inner = static_cast<float>(softcap ? scale / *softcap : std::copysign(1.0, scale));
  const double outer = softcap ? *softcap : std::abs(scale);
  args.outer = static_cast<float>(outer * 1.4426950408889634);
  // It multiplies the -inf of masked keys, where ALiBi does not come before; times zero they would be NaN. The smallest
  // normal number leaves all weights alike as well.
  if (!args.slopes) args.outer = std::max(args.outer, std::numeric_limits<float>::min());
  // ln 2, but for the rounding of `outer` where it multiplies all that a score is made of.
  args.natural = args.slopes || args.sinks ? kLn2 : static_cast<float>(outer / args.outer);
}

// From where ForwardPlace reads a block's place: tiles for `batch` sequences of up to so many queries and keys.
inline dim3 forward_grid(AttentionForwardArgs& args, ForwardTile tile, int64_t batch, int64_t queries, int64_t keys) {
  constexpr int64_t kMostBlocks = 65535;  // in the grid's second and third dimension
  // K and V of the heads that are worked on together should stay in the second-level cache beside other things; an
  // A100's has 40 MB, an H100's 50.
  constexpr int64_t kCachedBytes = 16 << 20;
  const int64_t all_heads = batch * args.heads;
  const int64_t tiles = std::max<int64_t>((queries + tile.queries - 1) / tile.queries, 1);
  STD_TORCH_CHECK(tiles <= kMostBlocks, "query must have a length of up to ", kMostBlocks * tile.queries);
  STD_TORCH_CHECK(all_heads < int64_t{1} << 31, "query has too many heads: ", all_heads);
  args.all_heads = static_cast<int>(all_heads);
  const int64_t key_head = int64_t{2} * keys * (args.size + args.value_size);
  const int64_t key_heads = std::max<int64_t>(kCachedBytes / std::max<int64_t>(key_head, 1), 1);
  const int64_t together =
      std::min(std::max(key_heads * args.group, (all_heads + kMostBlocks - 1) / kMostBlocks), all_heads);
  return dim3(static_cast<unsigned>(together), static_cast<unsigned>(tiles),
              static_cast<unsigned>((all_heads + together - 1) / together));
}

}  // namespace pykern
