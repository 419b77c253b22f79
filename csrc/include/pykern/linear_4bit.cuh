// y = x Wᵀ + bias with W of 4-bit codes, by the tiles of linear_tile.cuh; linear_4bit_backward.cuh has the gradient of
// x, linear_4bit_gemv.cuh the product with few rows.
//
// Steps are 128 along the depth. Each code is decoded once a block, in registers: W is never in memory. A weight is its
// code's value times its scale in fp32, rounded once, the very number that dequantize_4bit gives. A lane reads 16 bytes
// of codes: 32 weights along the depth that share a scale.

#pragma once

#include "device.cuh"

#include "linear_tile.cuh"
#include "weight4bit.cuh"

namespace pykern {

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

// Codes, 64 bytes a row: eight lanes read rows 4 apart, which would both be in the same half of the banks.
struct CodesLayout {
  static constexpr int kChunks = 4;
  __host__ __device__ static constexpr int at(int row, int chunk) { return (row ^ row / 4 % 2) * kChunks + chunk; }
};

// Tiles of codes, a chunk for each lane of a quad. The scales of a lane's columns are read a step ahead.
template <class T, Scaling kScaling, bool kOnce>
class CodedTiles {
  using Loader = ChunkLoader<CodesLayout, kLinearColumns, kOnce>;

 public:
  static constexpr int kLaneChunks = 4;  // of a row of x: numbers [32 t, 32 t + 32) are lane t's
  static constexpr int kDepth = 4 * kChunk, kBytes = Loader::kBytes;

  __device__ __forceinline__ CodedTiles(const LinearArgs& a, const SplitSteps& steps, int first_column)
      : a_(a),
        steps_(steps),
        column_(first_column + lane_column()),
        loader_(
            a.weight.codes + (static_cast<int64_t>(first_column) * a.depth + steps.first * kDepth) / 2, a.depth / 2,
            a.columns - first_column, (a.depth - steps.first * kDepth) / 2),
        scales_(a.weight),
        codes_(a.weight) {
    load_scales(0);
  }

  __device__ __forceinline__ void load(char* tile) {
    loader_.load(tile);
    loader_.advance_bytes(CodesLayout::kChunks * 16);
  }

  class Step {
   public:
    __device__ __forceinline__ Step(CodedTiles& tiles, const char* tile, int number) : codes_(tiles.codes_) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) scales_[i] = tiles.scales_.decode(tiles.loaded_[i]);
      if (number + 1 < tiles.steps_.count) tiles.load_scales(number + 1);
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        chunks_[i] = reinterpret_cast<const uint4*>(tile)[CodesLayout::at(lane_column() + i, lane_id() % 4)];
    }

    __device__ __forceinline__ void get(Weights<T>& weights, int) {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        unsigned pairs[4];
        decode_pairs<T>(chunks_[i].x, codes_, scales_[i], pairs);
        place<T>(weights, i, pairs);
        chunks_[i] = make_uint4(chunks_[i].y, chunks_[i].z, chunks_[i].w, 0);
      }
    }

   private:
    const Codes<kScaling>& codes_;
    Scale scales_[kLaneColumns];
    uint4 chunks_[kLaneColumns];
  };

 private:
  __device__ __forceinline__ void load_scales(int step) {
    const int at = (steps_.first + step) * kDepth + lane_id() % 4 * kChunk;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (at < a_.depth && column_ + i < a_.columns) loaded_[i] = scales_.load(int64_t{column_ + i}, at);
  }

  const LinearArgs& a_;
  const SplitSteps& steps_;
  int column_;
  Loader loader_;
  ChunkScales<kScaling> scales_;
  typename ChunkScales<kScaling>::Loaded loaded_[kLaneColumns] = {};
  Codes<kScaling> codes_;
};

struct NothingElse {
  static constexpr int kBytes = 0, kAccumulators = 0;
  __device__ __forceinline__ void load(char*) const {}
  __device__ __forceinline__ void multiply(const uint4*, const char*, int) const {}
};

template <class T, int kRows, Scaling kScaling>
using ForwardTiles = CodedTiles<T, kScaling, (kRows < kMostLinearRows)>;

// Grid: (tiles of rows, tiles of columns, splits).
template <class T, int kRows, Scaling kScaling>
__global__ void __launch_bounds__(kLinearThreads) linear_4bit_forward(const LinearArgs a) {
  using Tiles = ForwardTiles<T, kRows, kScaling>;
  Sums<kRows / 8> c = {};
  NothingElse nothing;
  multiply_split<T, kRows, linear_stages(ForwardSlot<Tiles, kRows>::kBytes), Tiles>(c, a, nothing);
  store_tile<T, kRows / 8>(a, c);
}

template <class T>
__global__ void __launch_bounds__(kCombineLinearThreads) linear_4bit_combine(const LinearArgs a, int splits) {
  combine_splits<T>(a, splits);
}

}  // namespace pykern
