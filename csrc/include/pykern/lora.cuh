// y = g (x Wᵀ + s (x Aᵀ) Bᵀ) + bias with few rows of x, fp16 and bf16, in one kernel: the tiles of linear_tile.cuh,
// with W of 4-bit codes or of floats.
//
// A block has a tile of y, and the x that passes it is all that S = x Aᵀ needs: so it multiplies by A beside its rows
// of W, each warp by 16 of A's rows, and keeps S in shared memory to multiply it by B in the end. That repeats x Aᵀ for
// each tile of columns; but up to 64 ranks of A are at most as many bytes as the tile of a 16-bit W, come from the
// second-level cache, and cost less time than another kernel before this one would. The product is linear in x: a
// split of the depth adds its own S Bᵀ to its sums, and nothing has to be told between blocks.
//
// fp32 adapters are as good as fp32 here, and so is S: as operands they are two numbers of tf32 each, whose range is
// fp32's. One holds any of fp16 and bf16.

#pragma once

#include "linear_4bit.cuh"

namespace pykern {

struct LoraArgs : LinearArgs {
  const void* floats;  // W (out, in) of x's type, with rows of 16-byte aligned elements, where it has no codes
  int64_t floats_stride;
  const void* lora_a;  // (rank, in), rows of 16-byte aligned elements
  const void* lora_b;  // (out, rank), elements of a row contiguous
  int64_t a_stride, b_stride;
  bool wide_adapter;  // A and B are fp32, else of x's type
  bool aligned_b;     // four elements of B from a multiple of four on are one aligned access
  int rank;
  float scaling;
  const void* dora_scale;  // (out,), of x's type or fp32; or null
  bool wide_dora_scale;
};

constexpr int kRankTile = FragmentA<__half>::kRows;  // of a warp
constexpr int kMostRank = kLinearWarps * kRankTile;

// Slots of the ring: three for 16 rows, of which two blocks keep a multiprocessor's share of the memory busy. Those of
// more rows are up to 48 KiB, and two of them leave room for another block.
__host__ __device__ constexpr int lora_stages(int tile_rows) { return tile_rows > 16 ? 2 : 3; }

// The scale of DoRA is that of the sums, and the bias is added.
template <class T, int kCount>
class Finish<T, LoraArgs, kCount> {
 public:
  __device__ __forceinline__ Finish(const LoraArgs& a, int column) : add_(a, column) {
    load_of_columns<T>(a.dora_scale, a.wide_dora_scale, column, a.columns, 1.f, scale_);
  }

  __device__ __forceinline__ void operator()(float (&sums)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] *= scale_[i];
    add_(sums);
  }

 private:
  Finish<T, LinearArgs, kCount> add_;
  float scale_[kCount];
};

// Tiles of W as it is. A step is half as deep as one of codes, since its weights are four times the bytes.
template <class T>
class FloatTiles {
 public:
  static constexpr int kLaneChunks = 2;

 private:
  using Layout = DepthLayout<kLaneChunks, kLaneColumns>;
  using Loader = ChunkLoader<Layout, kLinearColumns, true>;

 public:
  static constexpr int kDepth = 4 * kLaneChunks * kFullWidth<T>, kBytes = Loader::kBytes;

  __device__ __forceinline__ FloatTiles(const LoraArgs& a, const SplitSteps& steps, int first_column)
      : loader_(
            static_cast<const T*>(a.floats) + first_column * a.floats_stride + steps.first * kDepth,
            a.floats_stride * sizeof(T), a.columns - first_column,
            (a.depth - steps.first * kDepth) * static_cast<int64_t>(sizeof(T))) {}

  __device__ __forceinline__ void load(char* tile) {
    loader_.load(tile);
    loader_.advance_bytes(Layout::kChunks * 16);
  }

  class Step {
   public:
    __device__ __forceinline__ Step(const FloatTiles&, const char* tile, int)
        : tile_(reinterpret_cast<const uint4*>(tile)) {}

    __device__ __forceinline__ void get(Weights<T>& weights, int word) const {
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i) {
        const uint4 eight = tile_[Layout::at(lane_column() + i, kLaneChunks * (lane_id() % 4) + word)];
        place<T>(weights, i, {eight.x, eight.y, eight.z, eight.w});
      }
    }

   private:
    const uint4* tile_;
  };

 private:
  Loader loader_;
};

// A number as the sum of two of tf32.
struct Tf32Pair {
  __device__ __forceinline__ explicit Tf32Pair(float x) {
    high = round_to_tf32(x);
    low = round_to_tf32(x - __uint_as_float(high));
  }

  uint32_t high, low;
};

// c += rest, the products of low numbers. Where these are not finite, factors are not, and c has seen those itself.
__device__ __forceinline__ void add_rest(FragmentC<float>& c, const FragmentC<float>& rest) {
#pragma unroll
  for (int e = 0; e < LayoutC::kElements; ++e) c.x[e] += rest.x[e] - rest.x[e] == 0.f ? rest.x[e] : 0.f;
}

// S' = A x' of the rows that pass, and then S in shared memory.
template <class T, int kM, int kLaneChunks>
class RankProduct {
  // A lane has as many numbers of a row of A as of x; those of fp32 are twice as many chunks.
  using Layout = DepthLayout<kLaneChunks>;
  using WideLayout = DepthLayout<2 * kLaneChunks>;
  static constexpr int kStepBytes = 16 * Layout::kChunks;  // of a row of x's type

 public:
  static constexpr int kAccumulators = kM * LayoutC::kElements;
  const int kBytes;  // of a step's tile

  // Of S in shared memory: quads read 64 bytes each of two rows at a time, from all banks once.
  static constexpr int kStride = kMostRank + 16;

  __host__ __device__ static constexpr int tile_bytes(int rank, bool wide) {
    return (rank + kRankTile - 1) / kRankTile * kRankTile * kStepBytes * (wide ? 2 : 1);
  }

  __device__ __forceinline__ RankProduct(const LoraArgs& a, int first_depth)
      : kBytes(tile_bytes(a.rank, a.wide_adapter)),
        ranks_(a.rank),
        wide_(a.wide_adapter),
        row_bytes_(a.a_stride * element_bytes()),
        bytes_((a.depth - first_depth) * element_bytes()),
        from_(static_cast<const char*>(a.lora_a) + first_depth * element_bytes()) {}

  __device__ __forceinline__ void load(char* tile) {
    if (wide_) load_as<WideLayout>(tile);
    else load_as<Layout>(tile);
  }

  __device__ __forceinline__ void multiply(const uint4* x, const char* tile, int word) {
    const int own = static_cast<int>(threadIdx.x) / kWarp * kRankTile;
    if (own >= ranks_) return;
    const uint4* const rows = reinterpret_cast<const uint4*>(tile);
    const int g = lane_id() / 4, t = lane_id() % 4;
    if (wide_) {
      const uint4* const from = rows + own * WideLayout::kChunks;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = 2 * (kLaneChunks * t + word) + half;
        const uint4 upper = from[WideLayout::at(g, chunk)], lower = from[WideLayout::at(g + 8, chunk)];
        FragmentA<Tf32> high[2], low[2];
        split_rows(upper, 0, high, low);
        split_rows(lower, 1, high, low);
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const uint4 eight = x[8 * m * Layout::kChunks];
          const unsigned pairs[2] = {half == 0 ? eight.x : eight.z, half == 0 ? eight.y : eight.w};
          FragmentC<float> rest = {};
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const float2 numbers = Element<T>::widen_pair(pairs[i]);
            const FragmentB<Tf32> b = {{__float_as_uint(numbers.x), __float_as_uint(numbers.y)}};
            mma(sums_[m], high[i], b);
            mma(rest, low[i], b);
          }
          add_rest(sums_[m], rest);
        }
      }
      return;
    }
    const uint4* const from = rows + own * Layout::kChunks;
    const uint4 upper = from[Layout::at(g, kLaneChunks * t + word)];
    const uint4 lower = from[Layout::at(g + 8, kLaneChunks * t + word)];
    const FragmentA<T> a[2] = {{{upper.x, lower.x, upper.y, lower.y}}, {{upper.z, lower.z, upper.w, lower.w}}};
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const uint4 eight = x[8 * m * Layout::kChunks];
      mma(sums_[m], a[0], FragmentB<T>{{eight.x, eight.y}});
      mma(sums_[m], a[1], FragmentB<T>{{eight.z, eight.w}});
    }
  }

  // Writes scaling * S. What ranks that are not there have seen may be NaN, zero times infinity: theirs are zeros.
  __device__ __forceinline__ void store(float* s, float scaling) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int e = 0; e < LayoutC::kElements; ++e) {
        const int token = 8 * m + LayoutC::col(lane_id(), e), rank = warp * kRankTile + LayoutC::row(lane_id(), e);
        s[token * kStride + rank] = rank < ranks_ ? scaling * sums_[m].x[e] : 0.f;
      }
  }

 private:
  __device__ __forceinline__ int element_bytes() const { return wide_ ? 4 : static_cast<int>(sizeof(T)); }

  // Four numbers of a row of fp32 into two products' operands: of row g, or `below` it by 8.
  static __device__ __forceinline__ void split_rows(
      const uint4& four, int below, FragmentA<Tf32> (&high)[2], FragmentA<Tf32> (&low)[2]) {
    const unsigned words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Tf32Pair number(__uint_as_float(words[i]));
      high[i / 2].reg[i % 2 * 2 + below] = number.high;
      low[i / 2].reg[i % 2 * 2 + below] = number.low;
    }
  }

  template <class Rows>
  __device__ __forceinline__ void load_as(char* tile) {
    const int chunk = threadIdx.x % Rows::kChunks;
    const int64_t filled = max(min(bytes_ - 16 * chunk, int64_t{16}), int64_t{0});
    const int padded = (ranks_ + kRankTile - 1) / kRankTile * kRankTile;
#pragma unroll 1
    for (int row = threadIdx.x / Rows::kChunks; row < padded; row += kLinearThreads / Rows::kChunks)
      cp_async<16>(
          tile + 16 * Rows::at(row, chunk), from_ + row * row_bytes_ + 16 * chunk,
          row < ranks_ ? static_cast<int>(filled) : 0);
    from_ += 16 * Rows::kChunks;
    bytes_ -= 16 * Rows::kChunks;
  }

  int ranks_;
  bool wide_;
  int64_t row_bytes_, bytes_;
  const char* from_;
  FragmentC<float> sums_[kM] = {};
};

// Four numbers of a row of B, zeros for those that are not there.
template <class T>
__device__ __forceinline__ void load_b(const LoraArgs& a, int column, int rank, float (&b)[4]) {
#pragma unroll
  for (float& x : b) x = 0;
  if (column >= a.columns) return;
  const auto load = [&](const auto* from) {
    using E = std::remove_cv_t<std::remove_reference_t<decltype(*from)>>;
    from += column * a.b_stride + rank;
    if (a.aligned_b && rank < a.rank) {
      if constexpr (sizeof(E) == 4) {
        load_floats(from, b);
      } else {
        const uint2 words = *reinterpret_cast<const uint2*>(from);
        const float2 first = Element<E>::widen_pair(words.x), second = Element<E>::widen_pair(words.y);
        b[0] = first.x, b[1] = first.y, b[2] = second.x, b[3] = second.y;
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (rank + i < a.rank) b[i] = Element<E>::widen(from[i]);
  };
  if (a.wide_adapter) load(static_cast<const float*>(a.lora_b));
  else load(static_cast<const T*>(a.lora_b));
}

// c += B S' with S in shared memory.
template <class T, int kM>
__device__ __forceinline__ void add_update(Sums<kM>& c, const LoraArgs& a, const float* s, int stride) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  const int column = static_cast<int>(blockIdx.y) * kLinearColumns + lane_column();
#pragma unroll 1
  for (int first = 0; first < a.rank; first += 16) {
    float b[kLaneColumns][4];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) load_b<T>(a, column + i, first + 4 * t, b[i]);
#pragma unroll
    for (int pair = 0; pair < 4; pair += 2) {
      FragmentA<Tf32> high[kN], low[kN];
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const Tf32Pair number(b[i][pair + j]);
          high[i / 2].reg[2 * j + i % 2] = number.high;
          low[i / 2].reg[2 * j + i % 2] = number.low;
        }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const float* const own = s + (8 * m + g) * stride + first + 4 * t + pair;
        const Tf32Pair x(own[0]), y(own[1]);
#pragma unroll
        for (int n = 0; n < kN; ++n) {
          FragmentC<float> rest = {};
          mma(c[n][m], high[n], FragmentB<Tf32>{{x.high, y.high}});
          mma(rest, high[n], FragmentB<Tf32>{{x.low, y.low}});
          if (a.wide_adapter) mma(rest, low[n], FragmentB<Tf32>{{x.high, y.high}});
          add_rest(c[n][m], rest);
        }
      }
    }
  }
}

// Grid: (tiles of rows, tiles of columns, splits).
// To fit three blocks of 32 rows into a multiprocessor the compiler would spill; two have registers to spare.
template <class T, int kRows, class Tiles>
__global__ void __launch_bounds__(kLinearThreads, kRows == 32 ? 2 : 1) lora_forward(const LoraArgs a) {
  using Rank = RankProduct<T, kRows / 8, Tiles::kLaneChunks>;
  Sums<kRows / 8> c = {};
  Rank rank(a, static_cast<int>(blockIdx.z) * a.split_tiles * Tiles::kDepth);
  multiply_split<T, kRows, lora_stages(kRows), Tiles>(c, a, rank);
  __syncthreads();  // all warps have left the slots
  float* const s = dynamic_shared<float>();
  rank.store(s, a.scaling);
  __syncthreads();
  add_update<T, kRows / 8>(c, a, s, Rank::kStride);
  store_tile<T, kRows / 8>(a, c);
}

template <class T>
__global__ void __launch_bounds__(kCombineLinearThreads) lora_combine(const LoraArgs a, int splits) {
  combine_splits<T>(a, splits);
}

}  // namespace pykern
