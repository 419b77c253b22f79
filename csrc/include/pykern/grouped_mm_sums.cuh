// Sums of rows in a fixed order, in fp32: of each group, for the gradient of a bias, and of all that were gathered from
// the same row, for the gradient of that.

#pragma once

#include "device.cuh"

#include "grouped_mm.cuh"
#include "grouped_rows.cuh"
#include "vector.cuh"

namespace pykern {

constexpr int kGroupSumWarps = 8, kGroupSumThreads = kGroupSumWarps * kWarp;
constexpr int kSummedColumns = 8;  // of a lane, which reads 16 bytes of 16-bit elements at a time
constexpr int kGroupSumColumns = kWarp * kSummedColumns;

struct GroupSumArgs {
  const void* values;  // rows of `columns` elements
  int64_t stride;
  bool aligned;  // to 16 bytes, every row
  RowIndex index;
  GroupOffsets offsets;  // without ends: one group of all rows
  int columns;
  void* sums;  // (groups, columns), of `type`
  DType type;
};

// Grid: groups times panels of kGroupSumColumns columns. Warps take a group's rows in turn, then their sums are added.
template <class T>
__global__ void __launch_bounds__(kGroupSumThreads) grouped_sums(const GroupSumArgs args) {
  const int panels = (args.columns + kGroupSumColumns - 1) / kGroupSumColumns;
  const int group = static_cast<int>(blockIdx.x) / panels;
  const int first_column = static_cast<int>(blockIdx.x) % panels * kGroupSumColumns;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, column = first_column + lane_id() * kSummedColumns;
  const int left = args.columns - column;
  const GroupRows rows = args.offsets.ends ? rows_of_group(args.offsets, group) : GroupRows{0, args.offsets.rows};
  const bool whole = args.aligned && left >= kSummedColumns;
  float sum[kSummedColumns] = {};
#pragma unroll 4
  for (int row = rows.first + warp; row < rows.end; row += kGroupSumWarps) {
    const int source = args.index.of(row);
    if (source == RowIndex::kNowhere) continue;
    const T* const from = static_cast<const T*>(args.values) + source * args.stride + column;
    float values[kSummedColumns] = {};
    if (whole) {
      load_floats(from, values);
    } else {
#pragma unroll
      for (int i = 0; i < kSummedColumns; ++i)
        if (i < left) values[i] = Element<T>::widen(from[i]);
    }
#pragma unroll
    for (int i = 0; i < kSummedColumns; ++i) sum[i] += values[i];
  }
  PYKERN_SHARED(of_warps, float[kGroupSumWarps][kSummedColumns][kWarp]);
#pragma unroll
  for (int i = 0; i < kSummedColumns; ++i) of_warps[warp][i][lane_id()] = sum[i];
  __syncthreads();
  static_assert(kGroupSumThreads == kGroupSumColumns);
  const int own = static_cast<int>(threadIdx.x), to = first_column + own;
  if (to >= args.columns) return;
  float total = 0;
#pragma unroll
  for (int i = 0; i < kGroupSumWarps; ++i) total += of_warps[i][own % kSummedColumns][own / kSummedColumns];
  const int64_t at = int64_t{group} * args.columns + to;
  if (args.type == DType::f32) static_cast<float*>(args.sums)[at] = total;
  else if (args.type == DType::f16) static_cast<__half*>(args.sums)[at] = Element<__half>::narrow(total);
  else static_cast<__nv_bfloat16*>(args.sums)[at] = Element<__nv_bfloat16>::narrow(total);
}

constexpr int kGatheredThreads = 128, kGatheredColumns = kStoredColumns;

struct GatheredSumArgs {
  const float* values;      // (count, columns)
  const int64_t* gathered;  // (count,) the rows that were read, sorted; out of bounds counts as the nearest
  const int64_t* order;     // (count,) and whose they are of values
  int count, rows, columns;
  void* sums;  // (rows, columns)
};

// Grid: (rows, panels of kGatheredThreads * kGatheredColumns columns).
template <class T>
__global__ void __launch_bounds__(kGatheredThreads) grouped_gathered_sums(const GatheredSumArgs args) {
  const int row = static_cast<int>(blockIdx.x);
  const int column = static_cast<int>(blockIdx.y * kGatheredThreads + threadIdx.x) * kGatheredColumns;
  const int left = args.columns - column;
  if (left <= 0) return;
  int first = 0, end = row > 0 ? args.count : 0;
  while (first < end) {
    const int middle = first + (end - first) / 2;
    if (args.gathered[middle] < row) first = middle + 1;
    else end = middle;
  }
  const int64_t last = row + 1 < args.rows ? row : INT64_MAX;
  const bool whole = args.columns % kGatheredColumns == 0;
  float sum[kGatheredColumns] = {};
  for (int i = first; i < args.count && args.gathered[i] <= last; ++i) {
    const float* const from = args.values + args.order[i] * args.columns + column;
    float values[kGatheredColumns] = {};
    if (whole) {
      load_floats(from, values);
    } else {
#pragma unroll
      for (int c = 0; c < kGatheredColumns; ++c)
        if (c < left) values[c] = from[c];
    }
#pragma unroll
    for (int c = 0; c < kGatheredColumns; ++c) sum[c] += values[c];
  }
  store_numbers(static_cast<T*>(args.sums) + int64_t{row} * args.columns + column, sum, left, whole);
}

}  // namespace pykern
