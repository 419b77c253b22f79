// A tile of y = x Wᵀ + bias on tensor cores with mma.sync (sm_80 and later), fp16 and bf16, whatever W is made of:
// linear_4bit.cuh has 4-bit codes, lora.cuh floats as well.
//
// A block of threads owns a tile of y and passes over the depth that it sums along: x and W come by cp.async into a
// ring of slots in shared memory. Each warp has 32 columns of y and all of the tile's rows, so a block makes an operand
// of each weight once.
//
// The product is yᵀ = W xᵀ: the weights are the operand A of mma, which is also what Hopper's wgmma takes from
// registers. mma would have the lanes of a quad take turns every two weights along the depth; but a sum does not ask
// for the order of its terms, so lane t of a quad takes the t-th fourth of a step's numbers, of W as of x: eight, 16
// bytes, for two products.
//
// Where tiles are too few to fill the device, several blocks (splits) divide the depth. Their sums, in fp32, are added
// up by a second kernel, always in the same order.

#pragma once

#include "device.cuh"

#include "copy_async.cuh"
#include "mma.cuh"
#include "vector.cuh"
#include "weight4bit.h"

namespace pykern {

struct LinearArgs {
  Weight4bit weight;  // (out, in)
  const void* x;      // (rows, depth), rows of 16-byte aligned elements; the gradient of y in the backward
  int64_t x_stride;
  void* y;  // (rows, columns), contiguous; the gradient of x in the backward
  int64_t rows;
  int columns, depth;
  const void* bias;  // (columns,), of y's type or fp32; or null
  bool wide_bias;    // fp32
  int split_tiles;   // steps along the depth of a split
  float* sums;       // (splits, rows, padded_columns()) where there are several splits, else null

  __host__ __device__ constexpr int padded_columns() const { return (columns + 7) / 8 * 8; }
};

constexpr int kLinearColumns = 128;  // of a tile of y
constexpr int kLinearWarps = 4, kLinearThreads = kLinearWarps * kWarp;
constexpr int kWarpColumns = kLinearColumns / kLinearWarps;

// A lane has four columns of y side by side: 4 g + 2 n + h is row g + 8 h of operand A of product n, g = lane / 4.
constexpr int kN = kWarpColumns / FragmentA<__half>::kRows, kLaneColumns = 2 * kN;

// The accumulators of a warp, [n][m]: the columns above of rows 8 m + 2 t and 8 m + 2 t + 1, t = lane % 4.
template <int kM>
using Sums = FragmentC<float>[kN][kM];

// Rows of a tile: the fewest that hold all, up to 128, whose accumulators are half of a lane's registers. So there are
// several tiles of rows only of 128.
constexpr int kMostLinearRows = 128;

// Slots of a ring whose tiles have so many bytes: about 48 KiB, of which two to four blocks fit a multiprocessor, keep
// its share of the memory busy; two slots where these are larger, since then a tile's products take longer than a copy.
__host__ __device__ constexpr int linear_stages(int slot_bytes) {
  const int stages = 49152 / slot_bytes;
  return stages < 2 ? 2 : stages > 6 ? 6 : stages;
}

// Copies.

// Begins to copy rows of Layout::kChunks chunks of 16 bytes, kRows of them, to a tile in shared memory in the order of
// Layout::at(row, chunk), which repeats every 8 rows: so a thread keeps one address here and one there. Rows and bytes
// that are not there become zeros. kOnce: no other block reads them.
template <class Layout, int kRows, bool kOnce = false>
class ChunkLoader {
 public:
  static constexpr int kBytes = kRows * Layout::kChunks * 16;

  // `rows` and `bytes` are those from `first` on.
  __device__ __forceinline__ ChunkLoader(const void* first, int64_t row_bytes, int64_t rows, int64_t bytes)
      : row_bytes_(row_bytes) {
    const int thread = threadIdx.x, row = thread / Layout::kChunks, chunk = thread % Layout::kChunks;
    source_ = static_cast<const char*>(first) + row * row_bytes + 16 * chunk;
    rows_ = static_cast<int>(rows) - row;
    bytes_ = static_cast<int>(bytes) - 16 * chunk;
    to_ = 16 * Layout::at(row, chunk);
  }

  __device__ __forceinline__ void load(char* tile) const {
    const int filled = max(min(bytes_, 16), 0);
    const char* from = source_;
#pragma unroll
    for (int step = 0; step < kRows; step += kStep, from += kStep * row_bytes_) {
      char* const to = tile + to_ + step * Layout::kChunks * 16;
      if constexpr (kOnce) cp_async_once(to, from, step < rows_ ? filled : 0);
      else cp_async<16>(to, from, step < rows_ ? filled : 0);
    }
  }

  __device__ __forceinline__ void advance_bytes(int bytes) {
    source_ += bytes;
    bytes_ -= bytes;
  }
  __device__ __forceinline__ void advance_rows(int rows) {
    source_ += rows * row_bytes_;
    rows_ -= rows;
  }

 private:
  static constexpr int kStep = kLinearThreads / Layout::kChunks;
  static_assert(kStep % 8 == 0 && kRows % kStep == 0);

  const char* source_;
  int64_t row_bytes_;
  int rows_, bytes_, to_;
};

// The steps along the depth of a block's split.
struct SplitSteps {
  int first, count;

  __device__ __forceinline__ SplitSteps(const LinearArgs& a, int step) {
    const int all = (a.depth + step - 1) / step;
    first = static_cast<int>(blockIdx.z) * a.split_tiles;
    count = min(a.split_tiles, all - first);
  }
};

// Tiles in turn through kStages slots of so many bytes. load(slot) begins the copies of the next one.
template <int kStages, class Load, class Use>
__device__ __forceinline__ void pass_through_ring(
    char* slots, int bytes, int count, const Load& load, const Use& use) {
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < count) load(slots + stage * bytes);
    cp_async_commit();  // even nothing, so that waits count right
  }
  int slot = 0;
#pragma unroll 1
  for (int tile = 0; tile < count; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    const int before = slot == 0 ? kStages - 1 : slot - 1;  // which all threads have left
    if (tile + kStages - 1 < count) load(slots + before * bytes);
    cp_async_commit();
    use(slots + slot * bytes, tile);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
}

// The result.

// Some columns' numbers of a vector of T, or if wide of fp32; `missing` where there is no vector or no column.
template <class T, int kCount>
__device__ __forceinline__ void load_of_columns(
    const void* vector, bool wide, int column, int columns, float missing, float (&numbers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    numbers[i] = missing;
    if (!vector || column + i >= columns) continue;
    numbers[i] = wide ? static_cast<const float*>(vector)[column + i]
                      : Element<T>::widen(static_cast<const T*>(vector)[column + i]);
  }
}

// What is made of the sums of some columns before they are rounded: the bias is added.
template <class T, class Args, int kCount>
class Finish {
 public:
  __device__ __forceinline__ Finish(const Args& a, int column) {
    load_of_columns<T>(a.bias, a.wide_bias, column, a.columns, 0.f, bias_);
  }

  __device__ __forceinline__ void operator()(float (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += bias_[i];
  }

 private:
  float bias_[kCount];
};

// Those of four or eight numbers of a row of y that exist, rounded.
template <class T, int kCount>
__device__ __forceinline__ void store_result(
    const LinearArgs& a, int64_t row, int column, const float (&values)[kCount]) {
  T* const to = static_cast<T*>(a.y) + row * a.columns + column;
  if (a.columns % kCount == 0) {
    unsigned words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) words[i] = Element<T>::narrow_pair(values[2 * i], values[2 * i + 1]);
    if constexpr (kCount == 4) *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
    else *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (column + i < a.columns) to[i] = Element<T>::narrow(values[i]);
}

__device__ __forceinline__ int lane_column() {
  return static_cast<int>(threadIdx.x) / kWarp * kWarpColumns + lane_id() / 4 * kLaneColumns;
}

template <class T, int kM, class Args>
__device__ __forceinline__ void store_tile(const Args& a, const Sums<kM>& c) {
  const int column = static_cast<int>(blockIdx.y) * kLinearColumns + lane_column();
  if (column >= (a.sums ? a.padded_columns() : a.columns)) return;
  const Finish<T, Args, kLaneColumns> finish(a, a.sums ? a.columns : column);
  float values[kLaneColumns];
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int64_t row = static_cast<int64_t>(blockIdx.x) * (8 * kM) + 8 * m + lane_id() % 4 * 2 + odd;
      if (row >= a.rows) continue;
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) values[i] = c[i / 2][m].x[i % 2 * 2 + odd];
      if (a.sums) {
        store_floats(a.sums + (blockIdx.z * a.rows + row) * a.padded_columns() + column, values);
        continue;
      }
      finish(values);
      store_result<T>(a, row, column, values);
    }
}

// Adds up the sums of `splits` splits. Each thread has eight columns of a row.
constexpr int kCombineLinearThreads = 128, kCombineColumns = 8;

template <class T, class Args>
__device__ __forceinline__ void combine_splits(const Args& a, int splits) {
  const int in_row = a.padded_columns() / kCombineColumns;
  const int64_t own = static_cast<int64_t>(blockIdx.x) * kCombineLinearThreads + threadIdx.x;
  if (own >= a.rows * in_row) return;
  const int64_t row = own / in_row;
  const int column = static_cast<int>(own % in_row) * kCombineColumns;
  float sum[kCombineColumns] = {}, part[kCombineColumns];
#pragma unroll 4
  for (int split = 0; split < splits; ++split) {
    load_floats(a.sums + (split * a.rows + row) * a.padded_columns() + column, part);
#pragma unroll
    for (int i = 0; i < kCombineColumns; ++i) sum[i] += part[i];
  }
  const Finish<T, Args, kCombineColumns> finish(a, column);
  finish(sum);
  store_result<T>(a, row, column, sum);
}

// The product.

// Rows along the depth of a step in shared memory, of which lane t of a quad has kLaneChunks chunks in a row. Lanes
// read chunks so far apart, and eight lanes, of two rows at a time, meet all banks once if these are brought together
// and the halves of 128 bytes are exchanged in every other row. kApart: rows from a lane's to those of the next quad.
template <int kLaneChunks, int kApart = 1>
struct DepthLayout {
  static constexpr int kChunks = 4 * kLaneChunks;
  __host__ __device__ static constexpr int at(int row, int chunk) {
    return row * kChunks + ((chunk % kLaneChunks * 4 + chunk / kLaneChunks) ^ row / kApart % 2 * 4);
  }
};

// Eight weights along the depth of each of a lane's columns, as pairs, in operands of two products one after the other.
// This is the place where wgmma (sm_90a) would take them: but it reads x by itself, in its own order, so there a lane
// has to have numbers 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of sixteen, of codes one byte of each word.
template <class T>
using Weights = FragmentA<T>[kN][2];

template <class T>
__device__ __forceinline__ void place(Weights<T>& weights, int column, const unsigned (&pairs)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) weights[column / 2][i / 2].reg[i % 2 * 2 + column % 2] = pairs[i];
}

// The tiles of W that a block multiplies by, Tiles:
//   kLaneChunks, kDepth, kBytes   chunks of a lane in a step's row of x, numbers of that row, bytes of W's tile
//   load(tile)                    begins the copies of the next step's tile to shared memory
//   Step(tiles, tile, number)     what a lane has of it, whose get(weights, word) gives eight of each column, in turn
// What else x is multiplied by, Also:
//   kBytes, load(tile)            as above
//   kAccumulators                 registers of a lane; y's are as many as rows
//   multiply(x, tile, word)       x is where this lane has its chunk of row lane / 4
template <class Tiles, int kRows>
struct ForwardSlot {
  using Input = ChunkLoader<DepthLayout<Tiles::kLaneChunks>, kRows>;
  static constexpr int kBytes = Input::kBytes + Tiles::kBytes;
};

// c += W x' for a block's split of the depth; `also` sees all of x that goes by.
template <class T, int kRows, int kStages, class Tiles, class Args, class Also>
__device__ __forceinline__ void multiply_split(Sums<kRows / 8>& c, const Args& a, Also& also) {
  using Slot = ForwardSlot<Tiles, kRows>;
  using Layout = DepthLayout<Tiles::kLaneChunks>;
  constexpr int kM = kRows / 8;
  const SplitSteps steps(a, Tiles::kDepth);
  const int first_depth = steps.first * Tiles::kDepth;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  typename Slot::Input input(
      static_cast<const T*>(a.x) + first_row * a.x_stride + first_depth, a.x_stride * sizeof(T),
      min(a.rows - first_row, int64_t{kRows}), (a.depth - first_depth) * static_cast<int64_t>(sizeof(T)));
  Tiles tiles(a, steps, static_cast<int>(blockIdx.y) * kLinearColumns);

  const auto load = [&](char* slot) {
    input.load(slot);
    tiles.load(slot + Slot::Input::kBytes);
    also.load(slot + Slot::kBytes);
    input.advance_bytes(Layout::kChunks * 16);
  };
  const auto multiply = [&](const char* slot, int number) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    typename Tiles::Step step(tiles, slot + Slot::Input::kBytes, number);
    // Beside more accumulators the words to come and their addresses would not fit into registers.
    [[maybe_unused]] constexpr int kUnrolled = kRows + Also::kAccumulators <= 64 ? Tiles::kLaneChunks : 1;
#pragma unroll kUnrolled
    for (int word = 0; word < Tiles::kLaneChunks; ++word) {
      Weights<T> weights;
      step.get(weights, word);
      const uint4* const own =
          reinterpret_cast<const uint4*>(slot) + Layout::at(g, Tiles::kLaneChunks * t + word);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint4 eight = own[8 * m * Layout::kChunks];
        const FragmentB<T> b[2] = {{{eight.x, eight.y}}, {{eight.z, eight.w}}};
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int n = 0; n < kN; ++n) mma(c[n][m], weights[n][half], b[half]);
      }
      also.multiply(own, slot + Slot::kBytes, word);
    }
  };
  pass_through_ring<kStages>(dynamic_shared<char>(), Slot::kBytes + also.kBytes, steps.count, load, multiply);
}

}  // namespace pykern
