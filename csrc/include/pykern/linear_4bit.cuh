// y = x Wᵀ + bias with W of 4-bit codes, on tensor cores with mma.sync (sm_80 and later), fp16 and bf16;
// linear_4bit_backward.cuh has the gradient of x, linear_4bit_gemv.cuh the product with few rows.
//
// A block of threads owns a tile of y and passes over the depth that it sums along, 128 at a time: x and codes come by
// cp.async into a ring of slots in shared memory. Each warp has 32 columns of y and all of the tile's rows, so a block
// decodes each code once, in registers: W is never in memory. A weight is its code's value times its scale in fp32,
// rounded once, the very number that dequantize_4bit gives.
//
// The product is yᵀ = W xᵀ: the decoded weights are the operand A of mma, which is also what Hopper's wgmma takes from
// registers. A lane reads 16 bytes of codes: 32 weights along the depth that share a scale. mma would have the lanes of
// a quad take turns every two weights; but a sum does not ask for the order of its terms, so lane t of a quad takes
// numbers [32 t, 32 t + 32) of x as well, eight, 16 bytes, for two products.
//
// Where tiles are too few to fill the device, several blocks (splits) divide the depth. Their sums, in fp32, are added
// up by a second kernel, always in the same order.

#pragma once

#include "device.cuh"

#include "copy_async.cuh"
#include "mma.cuh"
#include "vector.cuh"
#include "weight4bit.cuh"

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
static_assert(kWarpColumns == kChunk, "a warp's columns are a chunk of codes in the backward");

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

// Tiles in turn through kStages slots of kBytes. load(slot) begins the copies of the next one.
template <int kStages, int kBytes, class Load, class Use>
__device__ __forceinline__ void pass_through_ring(char* slots, int count, const Load& load, const Use& use) {
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < count) load(slots + stage * kBytes);
    cp_async_commit();  // even nothing, so that waits count right
  }
  int slot = 0;
#pragma unroll 1
  for (int tile = 0; tile < count; ++tile) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    const int before = slot == 0 ? kStages - 1 : slot - 1;  // which all threads have left
    if (tile + kStages - 1 < count) load(slots + before * kBytes);
    cp_async_commit();
    use(slots + slot * kBytes, tile);
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }
}

// Scales of chunks of codes. Groups have whole chunks, and their scales' type is told apart here.
template <Scaling kScaling>
class ChunkScales : public Scales<kScaling> {
 public:
  using Scales<kScaling>::Scales;
};

template <>
class ChunkScales<Scaling::groups> {
 public:
  struct Loaded {
    uint32_t scale;
    uint8_t zero;
  };

  __device__ __forceinline__ explicit ChunkScales(const Weight4bit& w) : w_(w) {}

  __device__ __forceinline__ Loaded load(int64_t row, int column) const {
    const int64_t group = row * w_.groups + static_cast<unsigned>(column) / static_cast<unsigned>(w_.blocksize);
    return {
        w_.scale_type == DType::f32 ? static_cast<const uint32_t*>(w_.scales)[group]
                                    : static_cast<const uint16_t*>(w_.scales)[group],
        w_.zero_points ? w_.zero_points[group] : static_cast<uint8_t>(kInt4Zero)};
  }

  __device__ __forceinline__ Scale decode(Loaded loaded) const {
    const float scale = w_.scale_type == DType::f32 ? __uint_as_float(loaded.scale)
        : w_.scale_type == DType::f16               ? Element<__half>::widen_pair(loaded.scale).x
                                                    : Element<__nv_bfloat16>::widen_pair(loaded.scale).x;
    return {scale, static_cast<float>(loaded.zero)};
  }

 private:
  const Weight4bit& w_;
};

// The result.

// The bias of some columns; zeros where there is none.
template <class T, int kCount>
__device__ __forceinline__ void load_bias(const LinearArgs& a, int column, float (&bias)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    bias[i] = 0;
    if (!a.bias || column + i >= a.columns) continue;
    bias[i] = a.wide_bias ? static_cast<const float*>(a.bias)[column + i]
                          : Element<T>::widen(static_cast<const T*>(a.bias)[column + i]);
  }
}

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

template <class T, int kM>
__device__ __forceinline__ void store_tile(const LinearArgs& a, const Sums<kM>& c) {
  const int column = static_cast<int>(blockIdx.y) * kLinearColumns + lane_column();
  if (column >= (a.sums ? a.padded_columns() : a.columns)) return;
  float bias[kLaneColumns], values[kLaneColumns];
  if (!a.sums) load_bias<T>(a, column, bias);
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
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) values[i] += bias[i];
      store_result<T>(a, row, column, values);
    }
}

// Adds up the sums of `splits` splits. Each thread has eight columns of a row.
constexpr int kCombineLinearThreads = 128, kCombineColumns = 8;

template <class T>
__global__ void __launch_bounds__(kCombineLinearThreads) linear_4bit_combine(const LinearArgs a, int splits) {
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
  load_bias<T>(a, column, part);
#pragma unroll
  for (int i = 0; i < kCombineColumns; ++i) sum[i] += part[i];
  store_result<T>(a, row, column, sum);
}

// The product.

constexpr int kForwardDepth = 4 * kChunk;  // of a step: a chunk for each lane of a quad

// Rows of x in shared memory, 256 bytes: the quad's lanes read chunks 4 apart, and eight lanes, of two rows at a time,
// meet all banks once if these are brought together and the rows' halves are exchanged in every other row.
struct InputLayout {
  static constexpr int kChunks = kForwardDepth * 2 / 16;
  __host__ __device__ static constexpr int at(int row, int chunk) {
    return row * kChunks + ((chunk % 4 * 4 + chunk / 4) ^ row % 2 * 4);
  }
};

// Codes, 64 bytes a row: eight lanes read rows 4 apart, which would both be in the same half of the banks.
struct CodesLayout {
  static constexpr int kChunks = kForwardDepth / kChunk;
  __host__ __device__ static constexpr int at(int row, int chunk) { return (row ^ row / 4 % 2) * kChunks + chunk; }
};

template <int kRows>
struct ForwardSlot {
  using Input = ChunkLoader<InputLayout, kRows>;
  using Codes = ChunkLoader<CodesLayout, kLinearColumns, (kRows < kMostLinearRows)>;
  static constexpr int kBytes = Input::kBytes + Codes::kBytes, kStages = linear_stages(kBytes);
};

// A word of codes of each of a lane's columns, eight weights along the depth, as operands of two products one after the
// other. This is the place where wgmma (sm_90a) would take them: but it reads x by itself, in its own order, so there a
// lane has to decode numbers 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of sixteen, one byte of each word.
template <class T, Scaling kScaling>
__device__ __forceinline__ void decode_words(
    FragmentA<T> (&a)[kN][2], const unsigned (&words)[kLaneColumns], const Codes<kScaling>& codes,
    const Scale (&scales)[kLaneColumns]) {
#pragma unroll
  for (int column = 0; column < kLaneColumns; ++column) {
    unsigned pairs[4];
    decode_pairs<T>(words[column], codes, scales[column], pairs);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[column / 2][i / 2].reg[i % 2 * 2 + column % 2] = pairs[i];
  }
}

// c += W x' for one step.
template <class T, int kM, Scaling kScaling>
__device__ __forceinline__ void multiply_step(
    Sums<kM>& c, const char* slot, const Codes<kScaling>& codes, const Scale (&scales)[kLaneColumns]) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const uint4* const x = reinterpret_cast<const uint4*>(slot);
  const uint4* const packed = x + 8 * kM * InputLayout::kChunks;
  uint4 chunks[kLaneColumns];
#pragma unroll
  for (int i = 0; i < kLaneColumns; ++i) chunks[i] = packed[CodesLayout::at(lane_column() + i, t)];
  // Beside the accumulators of 128 rows the words to come and their addresses would not fit into registers.
  [[maybe_unused]] constexpr int kUnrolled = 8 * kM < kMostLinearRows ? 4 : 1;
#pragma unroll kUnrolled
  for (int word = 0; word < 4; ++word) {
    unsigned words[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      words[i] = chunks[i].x;
      chunks[i] = make_uint4(chunks[i].y, chunks[i].z, chunks[i].w, 0);
    }
    FragmentA<T> a[kN][2];
    decode_words(a, words, codes, scales);
    const uint4* const own = x + InputLayout::at(g, 4 * t + word);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const uint4 eight = own[8 * m * InputLayout::kChunks];
      const FragmentB<T> b[2] = {{{eight.x, eight.y}}, {{eight.z, eight.w}}};
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int n = 0; n < kN; ++n) mma(c[n][m], a[n][half], b[half]);
    }
  }
}

// Grid: (tiles of rows, tiles of columns, splits).
template <class T, int kRows, Scaling kScaling>
__global__ void __launch_bounds__(kLinearThreads) linear_4bit_forward(const LinearArgs a) {
  using Slot = ForwardSlot<kRows>;
  constexpr int kM = kRows / 8;
  const SplitSteps steps(a, kForwardDepth);
  const int first_depth = steps.first * kForwardDepth, depth = a.depth - first_depth;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int first_column = static_cast<int>(blockIdx.y) * kLinearColumns;

  typename Slot::Input input(
      static_cast<const T*>(a.x) + first_row * a.x_stride + first_depth, a.x_stride * sizeof(T),
      min(a.rows - first_row, int64_t{kRows}), depth * static_cast<int64_t>(sizeof(T)));
  typename Slot::Codes packed(
      a.weight.codes + (static_cast<int64_t>(first_column) * a.depth + first_depth) / 2, a.depth / 2,
      a.columns - first_column, depth / 2);
  const auto load = [&](char* slot) {
    input.load(slot);
    packed.load(slot + Slot::Input::kBytes);
    input.advance_bytes(InputLayout::kChunks * 16);
    packed.advance_bytes(CodesLayout::kChunks * 16);
  };

  // The scales of a lane's columns are read a step ahead.
  const ChunkScales<kScaling> scales(a.weight);
  const int column = first_column + lane_column();
  typename ChunkScales<kScaling>::Loaded loaded[kLaneColumns] = {};
  const auto load_scales = [&](int step) {
    const int at = (steps.first + step) * kForwardDepth + lane_id() % 4 * kChunk;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (at < a.depth && column + i < a.columns) loaded[i] = scales.load(int64_t{column + i}, at);
  };
  load_scales(0);

  const Codes<kScaling> codes(a.weight);
  Sums<kM> c = {};
  pass_through_ring<Slot::kStages, Slot::kBytes>(
      dynamic_shared<char>(), steps.count, load, [&](const char* slot, int step) {
        Scale now[kLaneColumns];
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) now[i] = scales.decode(loaded[i]);
        if (step + 1 < steps.count) load_scales(step + 1);
        multiply_step<T, kM>(c, slot, codes, now);
      });
  store_tile<T, kM>(a, c);
}

}  // namespace pykern
