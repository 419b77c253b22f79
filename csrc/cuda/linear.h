// What the launchers of linear layers share: rows that kernels read in place, and how the depth is split.

#pragma once

#include <pykern/linear_tile.cuh>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "launch.h"

namespace pykern {

// How calls are cut: by shapes and the device alone, so that sums are always added in the same order.

// A split writes a number of sums for each row that later are read again. Along these depths its codes are as many
// bytes as what it writes, and it passes a few times through its ring.
inline int64_t least_depth(int tile_rows) { return std::max(512, 8 * tile_rows); }

// Blocks that keep a multiprocessor's tensor cores, or its share of the memory, busy.
constexpr int kBusyBlocks = 2;

// The fewest splits with which the last block ends about as early as with any number. As many blocks as fit work at a
// time, each its steps along the depth.
inline int64_t split_count(int64_t tiles, int64_t steps, int64_t most, int multiprocessors) {
  const int64_t slots = int64_t{kBusyBlocks} * multiprocessors;
  const auto length = [&](int64_t splits) {
    const int64_t turns = (tiles * splits + slots - 1) / slots;
    return turns * ((steps + splits - 1) / splits);
  };
  int64_t best = length(1);
  for (int64_t splits = 2; splits <= most; ++splits) best = std::min(best, length(splits));
  int64_t splits = 1;
  while (length(splits) * 8 > best * 9) ++splits;  // an eighth longer costs no more than adding up another split
  return splits;
}

// The kernels of a tile of so many rows and steps along the depth.
template <class Args>
struct LinearKernels {
  void (*kernel)(const Args);
  void (*combine)(const Args, int);
  int rows, depth, shared_bytes;
};

template <class Args>
void launch_linear(const Device& device, const LinearKernels<Args>& chosen, Args& args) {
  const int64_t row_tiles = (args.rows + chosen.rows - 1) / chosen.rows;
  const int64_t column_tiles = (int64_t{args.columns} + kLinearColumns - 1) / kLinearColumns;
  STD_TORCH_CHECK(row_tiles < int64_t{1} << 31, "input has too many rows for one launch: ", args.rows);
  const int64_t steps = (int64_t{args.depth} + chosen.depth - 1) / chosen.depth;
  const int64_t wanted = split_count(
      row_tiles * column_tiles, steps, std::max<int64_t>(args.depth / least_depth(chosen.rows), 1),
      device.multiprocessors());
  args.split_tiles = static_cast<int>((steps + wanted - 1) / wanted);
  const int splits = static_cast<int>((steps + args.split_tiles - 1) / args.split_tiles);
  std::optional<Tensor> sums;
  if (splits > 1) {
    const std::array<int64_t, 3> sizes = {splits, args.rows, args.padded_columns()};
    sums = device.empty(Sizes(sizes.data(), sizes.size()), DType::f32);
    args.sums = static_cast<float*>(device.out(*sums, "sums"));
  }
  const dim3 grid(
      static_cast<unsigned>(row_tiles), static_cast<unsigned>(column_tiles), static_cast<unsigned>(splits));
  device.launch(chosen.kernel, grid, dim3(kLinearThreads), chosen.shared_bytes, args);
  if (splits == 1) return;
  const int64_t threads = args.rows * (args.padded_columns() / kCombineColumns);
  const int64_t blocks = (threads + kCombineLinearThreads - 1) / kCombineLinearThreads;
  device.launch(chosen.combine, dim3(static_cast<unsigned>(blocks)), dim3(kCombineLinearThreads), 0, args, splits);
}

constexpr int64_t kMostLinearColumns = 65535 * kLinearColumns;  // tiles in a grid's second dimension

// Rows of a tensor at one stride, 16-byte aligned if that is asked for; else those of a copy.
class StridedRows {
 public:
  StridedRows(const Device& device, const Tensor& given, const char* name, bool aligned) : rows_(given) {
    stride = rows_.rows.stride[0];
    const int64_t elements = 16 / given.element_size();
    const bool is_aligned = reinterpret_cast<uintptr_t>(rows_.rows.data) % 16 == 0 && stride % elements == 0;
    if (rows_.rows.dims == 1 && (is_aligned || !aligned)) {
      data = device.in(rows_.tensor, name);
      return;
    }
    std::vector<int64_t> sizes(given.sizes().begin(), given.sizes().end());
    const int64_t size = sizes.back(), last = static_cast<int64_t>(sizes.size()) - 1;
    stride = sizes.back() = (size + elements - 1) / elements * elements;
    copy_ = device.empty(Sizes(sizes.data(), sizes.size()), dtype_of(given, name));
    Tensor filled = torch::stable::narrow(*copy_, last, 0, size);
    torch::stable::copy_(filled, given);
    data = device.in(*copy_, name);
  }

  const void* data;
  int64_t stride;

 private:
  RowsOf rows_;
  std::optional<Tensor> copy_;
};

}  // namespace pykern
