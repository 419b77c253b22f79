// A few rows times a 4-bit weight on NVIDIA GPUs: the choice of kernels and of splits. The arithmetic is in
// linear_4bit_gemv.cuh.

#include "linear_4bit_gemv.h"

#include <pykern/linear_4bit_gemv.cuh>

#include <algorithm>
#include <array>
#include <optional>

#include "weight4bit.h"

namespace pykern {
namespace {

constexpr int64_t kMostServed = 8;  // rows: what one pass of gemv_mma over the codes multiplies

enum class Way { mma, chunks, elements };

bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

Way way_of(const Gemv4bit& call) {
  const Weight4bit& w = call.weight;
  const int64_t row_bytes = call.x_stride * (call.type == DType::f32 ? 4 : 2);
  const bool aligned = is_aligned(w.codes) && is_aligned(call.x) && (call.rows == 1 || row_bytes % 16 == 0);
  if (!aligned || !chunks_have_one_scale(w) || w.columns >= 1 << 30) return Way::elements;
  return call.type == DType::f32 ? Way::chunks : Way::mma;
}

// Splits need a second kernel, which takes as long as a multiprocessor needs to read some hundred KiB: they are for
// weights of few and long rows, and each keeps every warp busy for four steps.
int split_count(int64_t blocks, int64_t columns, int multiprocessors) {
  constexpr int64_t kLeastColumns = int64_t{4} * kGemvWarps * kGemvStep;
  const int64_t wanted = multiprocessors / blocks;
  return static_cast<int>(std::max<int64_t>(std::min(wanted, columns / kLeastColumns), 1));
}

int64_t tiles(int64_t count, int64_t size) { return (count + size - 1) / size; }

dim3 grid_of(int64_t x, int64_t y, int64_t z) {
  STD_TORCH_CHECK(x < int64_t{1} << 31, "shape has too many rows: ", x);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

template <class T>
void launch_mma(const Device& device, GemvArgs& args) {
  const int x_tiles = args.rows <= 2 ? 1 : 4;
  const int64_t row_tiles = tiles(args.out, 16 * gemv_row_tiles(x_tiles));
  const int64_t all_x_tiles = tiles(args.rows, 2 * x_tiles);
  args.splits = split_count(row_tiles * all_x_tiles, args.weight.columns, device.multiprocessors());
  std::optional<Tensor> partials;
  if (args.splits > 1) {
    const std::array<int64_t, 3> sizes = {args.splits, args.rows, args.out};
    partials = device.empty(Sizes(sizes.data(), sizes.size()), DType::f32);
    args.partials = static_cast<float*>(device.out(*partials, "partial sums"));
  }
  const auto kernel = by_scales(args.weight, [&](auto scaling, auto scale) {
    using S = decltype(scale);
    return x_tiles == 1 ? &gemv_mma<T, scaling.value, S, 1> : &gemv_mma<T, scaling.value, S, 4>;
  });
  device.launch(
      kernel, grid_of(row_tiles, args.splits, all_x_tiles), dim3(kGemvThreads), PairTable<unsigned>::kBytes, args);
  if (args.splits > 1)
    device.launch(
        &gemv_combine<T>, grid_of(tiles(args.rows * args.out, kGemvThreads), 1, 1), dim3(kGemvThreads), 0, args);
}

void launch(const Device& device, Way way, DType type, GemvArgs& args) {
  if (way == Way::mma) {
    if (type == DType::f16) launch_mma<__half>(device, args);
    else launch_mma<__nv_bfloat16>(device, args);
    return;
  }
  const auto kernel = way == Way::chunks
      ? by_scales(args.weight, [](auto scaling, auto scale) { return &gemv_chunks<scaling.value, decltype(scale)>; })
      : by_element(type, [](auto element) { return &gemv_elements<decltype(element)>; });
  const dim3 grid = grid_of(tiles(args.out, kGemvWarps), tiles(args.rows, kFewRows), 1);
  device.launch(kernel, grid, dim3(kGemvThreads), 0, args);
}

}  // namespace

bool gemv_serves(const Gemv4bit& call) { return call.rows <= kMostServed && way_of(call) != Way::elements; }

void linear_4bit_gemv(const Device& device, const Gemv4bit& call) {
  const int64_t columns = call.weight.columns, out = columns > 0 ? call.weight.count / columns : 0;
  if (out == 0) return;
  GemvArgs args = {};
  args.weight = call.weight;
  args.x_stride = call.x_stride;
  args.out = out;
  args.bias = call.bias;
  args.wide_bias = call.bias_type == DType::f32;
  args.splits = 1;
  const Way way = way_of(call);
  constexpr int64_t kMostRows = 1 << 16;  // of x in one grid
  const int64_t element_size = call.type == DType::f32 ? 4 : 2;
  for (int64_t first = 0; first < call.rows; first += kMostRows) {
    args.rows = static_cast<int>(std::min(call.rows - first, kMostRows));
    args.x = static_cast<const char*>(call.x) + first * call.x_stride * element_size;
    args.y = static_cast<char*>(call.y) + first * out * element_size;
    launch(device, way, call.type, args);
  }
}

}  // namespace pykern
