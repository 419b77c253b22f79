// How the kernels of grouped products find their rows. Offsets on the device cut the rows into groups: group g reaches
// from offs[g - 1] (0) to offs[g]. An offset below the one before it counts as that one, one behind the rows as their
// end; rows behind the last offset are one more group. Nothing of this is known on the host, which only bounds the
// number of tiles. So every warp reads the offsets by itself, and no barrier or launch of its own is spent on them.

#pragma once

#include "device.cuh"

#include <cstdint>

#include "instruction.cuh"

namespace pykern {

// Which row of a matrix stands for row i of a product.
struct RowIndex {
  const int64_t* index;  // or null: row i itself
  int rows;              // of the matrix
  bool clamped;          // else what is out of bounds is nowhere

  static constexpr int kNowhere = -1;

  __device__ __forceinline__ int of(int i) const {
    if (!index) return i;
    const int64_t row = index[i];
    const int outside = !clamped ? kNowhere : row < 0 ? 0 : rows - 1;
    return static_cast<uint64_t>(row) < static_cast<uint64_t>(rows) ? static_cast<int>(row) : outside;
  }
};

struct GroupOffsets {
  const int* ends;  // (groups,)
  int groups, rows;

  // Where a group ends, unless one before it ends later.
  __device__ __forceinline__ int end(int group) const {
    return group < groups ? min(max(ends[group], 0), rows) : rows;
  }
};

struct GroupRows {
  int first, end;
};

// The rows of a group. All lanes of a warp come along and get the same.
__device__ __forceinline__ GroupRows rows_of_group(const GroupOffsets& offsets, int group) {
  int first = 0;
  for (int before = lane_id(); before < group; before += kWarp) first = max(first, offsets.end(before));
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    first = max(first, __shfl_xor_sync(kFullWarp, first, distance));
  return {first, max(first, offsets.end(group))};
}

struct RowTile {
  int group;       // `groups` for rows behind the last offset, more where there is no such tile
  int first, end;  // the tile's first row, and where the group ends
};

// The tile of a number, where groups are cut into tiles of kRows rows. All lanes of a warp come along and get the same.
// Each lane has some groups in a row: it reads where they end for a scan over the lanes, and once more, from the
// first-level cache, to count tiles.
template <int kRows>
__device__ __forceinline__ RowTile find_tile(const GroupOffsets& offsets, int tile) {
  const int all = offsets.groups + 1, each = (all + kWarp - 1) / kWarp, lane = lane_id();
  const int first_group = min(lane * each, all), end_group = min(first_group + each, all);
  int last = 0;
#pragma unroll 4
  for (int group = first_group; group < end_group; ++group) last = max(last, offsets.end(group));
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, last, distance);
    if (lane >= distance) last = max(last, other);
  }
  int first = __shfl_up_sync(kFullWarp, last, 1);  // of this lane's rows
  if (lane == 0) first = 0;

  const auto tiles_to = [&](int begin, int end) { return (end - begin + kRows - 1) / kRows; };
  int own = 0;
#pragma unroll 4
  for (int group = first_group, begin = first; group < end_group; ++group) {
    const int end = max(begin, offsets.end(group));
    own += tiles_to(begin, end);
    begin = end;
  }
  int through = own;
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, through, distance);
    if (lane >= distance) through += other;
  }
  const unsigned reached = __ballot_sync(kFullWarp, through > tile);
  if (!reached) return {all, 0, 0};
  const int owner = __ffs(static_cast<int>(reached)) - 1;
  RowTile found = {};
  if (lane == owner) {
    int before = through - own;
    for (int group = first_group; group < end_group; ++group) {
      const int end = max(first, offsets.end(group)), count = tiles_to(first, end);
      if (tile < before + count) {
        found = {group, first + (tile - before) * kRows, end};
        break;
      }
      before += count;
      first = end;
    }
  }
  return {
      __shfl_sync(kFullWarp, found.group, owner), __shfl_sync(kFullWarp, found.first, owner),
      __shfl_sync(kFullWarp, found.end, owner)};
}

}  // namespace pykern
