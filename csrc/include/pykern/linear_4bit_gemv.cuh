// A few rows times a 4-bit weight: y (rows, out) = x (rows, in) · Wᵀ + bias. Bound by reading the codes, so each is
// read once, 16 bytes a lane, and little may be done for each.
//
// For fp16 and bf16 tensor cores multiply (gemv_mma). A shuffle for every value would keep the shared-memory pipe of an
// H200 busy for longer than the codes take to come; PairTable gives two values in two instructions and one access,
// mma.sync multiplies them with up to eight rows for an eighth of an instruction. Values go in as T without their
// scale, which multiplies sums in fp32: so nothing is rounded but the sixteen values, and int4's not even those.
//
// An mma adds up what its lanes hold, but the 32 elements of a lane have a scale of their own. So a row of x takes four
// columns of B, one for each of the four lanes that share a row of W: that lane's elements stand in its column, zeros
// in the others, and a column's sum has one scale.
//
// For fp32 fused multiply-adds do (gemv_chunks). gemv_elements is right for every weight.

#pragma once

#include "weight4bit.cuh"

#include "mma.cuh"
#include "reduce.cuh"

namespace pykern {

struct GemvArgs {
  Weight4bit weight;  // (out, in)
  const void* x;
  int64_t x_stride;
  int rows;
  int64_t out;
  const void* bias;  // or null
  bool wide_bias;    // it is fp32, else as x
  void* y;
  int splits;       // of the columns; where there are several, y is made of
  float* partials;  // (splits, rows, out)
};

constexpr int kGemvThreads = 256, kGemvWarps = kGemvThreads / kWarp;
constexpr int kGemvStep = 4 * kChunk;  // columns of a warp's step: four lanes share a row of W

// Tiles of 16 rows of W a block, by how many tiles of two rows of x there are. Blocks read all of x, from the
// second-level cache: where that is much, they share it among more rows of W.
__host__ __device__ constexpr int gemv_row_tiles(int x_tiles) { return x_tiles > 1 ? 2 : 1; }

// Steps that are on their way while one is multiplied: 64 bytes a lane. For few rows of x two blocks fit into the
// registers of a multiprocessor, and 32 KiB under way keep its share of the memory busy; for more there is one.
__host__ __device__ constexpr int gemv_ahead(int x_tiles) { return 2 / gemv_row_tiles(x_tiles); }

template <class T>
__device__ __forceinline__ void store_result(const GemvArgs& a, int row, int64_t out, float sum) {
  if (a.bias)
    sum += a.wide_bias ? static_cast<const float*>(a.bias)[out]
                       : Element<T>::widen(static_cast<const T*>(a.bias)[out]);
  static_cast<T*>(a.y)[row * a.out + out] = Element<T>::narrow(sum);
}

// Both values less those of another pair.
template <class T>
__device__ __forceinline__ unsigned subtract_pair(unsigned pair, unsigned less) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  const Pair difference = __hsub2(*reinterpret_cast<const Pair*>(&pair), *reinterpret_cast<const Pair*>(&less));
  return *reinterpret_cast<const unsigned*>(&difference);
}

// Grid: (tiles of W's rows, splits, tiles of x's rows). Needs chunks of one scale and x aligned to 16 bytes.
template <class T, Scaling kScaling, class S, int kXTiles>
__global__ void __launch_bounds__(kGemvThreads) gemv_mma(const GemvArgs a) {
  constexpr int kRowTiles = gemv_row_tiles(kXTiles), kHalves = 2 * kRowTiles;  // of 8 rows of W
  constexpr int kAhead = gemv_ahead(kXTiles);
  constexpr int kOutRows = 16 * kRowTiles, kXRows = 2 * kXTiles;
  using Loaded = typename Scales<kScaling, S>::Loaded;
  struct Step {
    uint4 codes[kHalves];
    Loaded scales[kHalves];
  };
  PYKERN_SHARED(sums, float[kGemvWarps][kXRows][kOutRows]);
  const Weight4bit& w = a.weight;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int group = lane / 4, quarter = lane % 4;  // the row within eight, the chunk within four
  const int64_t first_out = int64_t{blockIdx.x} * kOutRows;
  const int first_x = static_cast<int>(blockIdx.z) * kXRows;
  const int columns = static_cast<int>(w.columns), steps = (columns + kGemvStep - 1) / kGemvStep;
  const int first_step = static_cast<int>(int64_t{steps} * blockIdx.y / a.splits);
  const int end_step = static_cast<int>(int64_t{steps} * (blockIdx.y + 1) / a.splits);
  const Scales<kScaling, S> scales(w);

  const uint4* codes_of_row[kHalves];
  int64_t scales_of_row[kHalves];
  int ends[kHalves];  // of the columns that are loaded
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const int64_t row = min(first_out + 8 * h + group, a.out - 1);
    codes_of_row[h] = reinterpret_cast<const uint4*>(w.codes) + row * (columns / kChunk);
    scales_of_row[h] = scales.start_of(row);
    ends[h] = first_out + 8 * h + group < a.out ? min(columns, end_step * kGemvStep) : 0;
  }
  // All warps make as many steps, those beyond the end with nothing loaded: the loop must be the same for all threads,
  // or the table's address does not stay in a uniform register and every look-up costs an addition.
  const auto load = [&](int step) {
    Step loaded = {};
    const int column = (step + warp) * kGemvStep + quarter * kChunk;
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      if (column >= ends[h]) continue;
      loaded.codes[h] = __ldcs(codes_of_row[h] + static_cast<unsigned>(column) / kChunk);
      loaded.scales[h] = scales.load_chunk(scales_of_row[h], column);
    }
    return loaded;
  };
  Step ring[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) ring[i] = load(first_step + i * kGemvWarps);

  char* const memory = dynamic_shared<char>();
  PairTable<unsigned>::fill(memory, kGemvThreads, [&](int low, int high) {
    if constexpr (kScaling == Scaling::groups)
      return Element<T>::narrow_pair(static_cast<float>(low), static_cast<float>(high));
    else return Element<T>::narrow_pair(w.code[low], w.code[high]);
  });
  __syncthreads();
  const PairTable<unsigned> table(memory);

  // Where this lane's part of B comes from: nowhere for most.
  const T* from[kXTiles];
#pragma unroll
  for (int n = 0; n < kXTiles; ++n) {
    const int row = first_x + 2 * n + group / 4;
    const bool there = group % 4 == quarter && row < a.rows;
    from[n] = there ? static_cast<const T*>(a.x) + row * a.x_stride + quarter * kChunk : nullptr;
  }
  FragmentC<float> totals[kRowTiles][kXTiles] = {};

  const auto multiply = [&](const Step& now, int step) {
    const int first_column = (step + warp) * kGemvStep;
    const bool there = first_column + quarter * kChunk < min(columns, end_step * kGemvStep);
    unsigned zeros[kHalves];
    float factors[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const Scale scale = scales.decode(now.scales[h]);
      // Zero times an infinite scale is NaN where the weight is decoded, and some code of such a block is zero's.
      factors[h] = fmaf(scale.factor, 0.f, scale.factor);
      if constexpr (kScaling == Scaling::groups) zeros[h] = Element<T>::narrow_pair(scale.zero, scale.zero);
    }
    FragmentC<float> parts[kRowTiles][kXTiles] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint4 x[kXTiles];
#pragma unroll
      for (int n = 0; n < kXTiles; ++n) {
        x[n] = make_uint4(0, 0, 0, 0);
        if (from[n] && there) x[n] = *reinterpret_cast<const uint4*>(from[n] + first_column + q * kWordCodes);
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        FragmentA<T> left, right;  // of the word's first four elements and of its last
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint4& codes = now.codes[2 * r + half];
          const unsigned word = q == 0 ? codes.x : q == 1 ? codes.y : q == 2 ? codes.z : codes.w;
          left.reg[half] = table.at<0>(word), left.reg[2 + half] = table.at<1>(word);
          right.reg[half] = table.at<2>(word), right.reg[2 + half] = table.at<3>(word);
          if constexpr (kScaling == Scaling::groups) {
#pragma unroll
            for (int i = 0; i < 4; i += 2) {
              left.reg[i + half] = subtract_pair<T>(left.reg[i + half], zeros[2 * r + half]);
              right.reg[i + half] = subtract_pair<T>(right.reg[i + half], zeros[2 * r + half]);
            }
          }
        }
#pragma unroll
        for (int n = 0; n < kXTiles; ++n) {
          mma(parts[r][n], left, FragmentB<T>{{x[n].x, x[n].y}});
          mma(parts[r][n], right, FragmentB<T>{{x[n].z, x[n].w}});
        }
      }
    }
    // A lane's two columns belong to two chunks, whose scales two lanes of its four have.
#pragma unroll
    for (int h = 0; h < kHalves; ++h) {
      const int own = 2 * quarter % 4;
      const float even = __shfl_sync(kFullWarp, factors[h], own, 4);
      const float odd = __shfl_sync(kFullWarp, factors[h], own + 1, 4);
#pragma unroll
      for (int n = 0; n < kXTiles; ++n) {
        float(&total)[4] = totals[h / 2][n].x;
        const float(&part)[4] = parts[h / 2][n].x;
        total[h % 2 * 2] = fmaf(part[h % 2 * 2], even, total[h % 2 * 2]);
        total[h % 2 * 2 + 1] = fmaf(part[h % 2 * 2 + 1], odd, total[h % 2 * 2 + 1]);
      }
    }
  };
#pragma unroll 1
  for (int step = first_step; step < end_step; step += kAhead * kGemvWarps) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int own = step + i * kGemvWarps;
      const Step now = ring[i];
      ring[i] = load(own + kAhead * kGemvWarps);
      multiply(now, own);
    }
  }

  // Four columns to a row of x, then all warps.
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r)
#pragma unroll
    for (int n = 0; n < kXTiles; ++n) {
      float both[2] = {totals[r][n].x[0] + totals[r][n].x[1], totals[r][n].x[2] + totals[r][n].x[3]};
      sum_over_lanes(both, 2);
      const int half = quarter % 2;
      sums[warp][2 * n + quarter / 2][16 * r + 8 * half + group] = half ? both[1] : both[0];
    }
  __syncthreads();
  for (int i = threadIdx.x; i < kXRows * kOutRows; i += kGemvThreads) {
    const int row = first_x + i / kOutRows;
    const int64_t out = first_out + i % kOutRows;
    if (row >= a.rows || out >= a.out) continue;
    float sum = 0;
#pragma unroll
    for (int from_warp = 0; from_warp < kGemvWarps; ++from_warp) sum += sums[from_warp][i / kOutRows][i % kOutRows];
    if (a.splits == 1) store_result<T>(a, row, out, sum);
    else a.partials[(int64_t{blockIdx.y} * a.rows + row) * a.out + out] = sum;
  }
}

// Adds up the splits, always in the same order: a thread for each element of y.
template <class T>
__global__ void __launch_bounds__(kGemvThreads) gemv_combine(const GemvArgs a) {
  const int64_t i = int64_t{blockIdx.x} * kGemvThreads + threadIdx.x, all = a.rows * a.out;
  if (i >= all) return;
  float sum = 0;
  for (int split = 0; split < a.splits; ++split) sum += a.partials[split * all + i];
  store_result<T>(a, static_cast<int>(i / a.out), i % a.out, sum);
}

// Rows of x that a warp of the kernels below takes at a time.
constexpr int kFewRows = 4;

// A warp for each row of W, whose lanes have a chunk each. Grid: (rows of W in warps, tiles of x's rows).
template <Scaling kScaling, class S>
__global__ void __launch_bounds__(kGemvThreads) gemv_chunks(const GemvArgs a) {
  const Weight4bit& w = a.weight;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, first_x = static_cast<int>(blockIdx.y) * kFewRows;
  const int64_t out = int64_t{blockIdx.x} * kGemvWarps + threadIdx.x / kWarp;
  if (out >= a.out) return;
  const Codes<kScaling> codes(w);
  const Scales<kScaling, S> scales(w);
  const int columns = static_cast<int>(w.columns);
  float sums[kFewRows] = {};
  for (int first = 0; first < columns; first += kWarp * kChunk) {
    const int column = first + lane * kChunk;
    uint4 chunk = {};
    Scale scale = {};
    if (column < columns) {
      chunk = load_chunk(w.codes, out * (columns / kChunk) + column / kChunk);
      scale = scales.decode(scales.load_chunk(scales.start_of(out), column));
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const unsigned word = q == 0 ? chunk.x : q == 1 ? chunk.y : q == 2 ? chunk.z : chunk.w;
      float values[kWordCodes];
#pragma unroll
      for (int i = 0; i < kWordCodes; ++i)
        values[i] = __fmul_rn(codes.value(word >> code_shift(i), scale), scale.factor);
#pragma unroll
      for (int n = 0; n < kFewRows; ++n) {
        if (column >= columns || first_x + n >= a.rows) continue;
        float x[kWordCodes];
        load_floats(static_cast<const float*>(a.x) + (first_x + n) * a.x_stride + column + q * kWordCodes, x);
#pragma unroll
        for (int i = 0; i < kWordCodes; ++i) sums[n] = fmaf(values[i], x[i], sums[n]);
      }
    }
  }
  sum_over_lanes(sums, kWarp);
#pragma unroll
  for (int n = 0; n < kFewRows; ++n)
    if (lane == n && first_x + n < a.rows) store_result<float>(a, first_x + n, out, sums[n]);
}

// A weight's element, however it is stored.
__device__ __forceinline__ float element_of(const Weight4bit& w, int64_t row, int64_t column) {
  const int64_t element = row * w.columns + column;
  const unsigned code = w.codes[element / 2] >> code_shift(static_cast<int>(element % 2)) & 15u;
  const auto in_group = [&](auto type) {
    const Scales<Scaling::groups, decltype(type)> scales(w);
    const Scale scale = scales.decode(scales.load(row, column));
    return __fmul_rn(static_cast<float>(code) - scale.zero, scale.factor);
  };
  if (w.scaling == Scaling::groups) {
    if (w.scale_type == DType::f32) return in_group(float());
    if (w.scale_type == DType::f16) return in_group(__half());
    return in_group(__nv_bfloat16());
  }
  const auto in_block = [&](const auto& scales) {
    return __fmul_rn(w.code[code], scales.decode(scales.load(row, column)).factor);
  };
  if (w.scaling == Scaling::blocks) return in_block(Scales<Scaling::blocks>(w));
  return in_block(Scales<Scaling::nested>(w));
}

// Rows may begin within a byte, groups end anywhere. Grid as that of gemv_chunks.
template <class T>
__global__ void __launch_bounds__(kGemvThreads) gemv_elements(const GemvArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, first_x = static_cast<int>(blockIdx.y) * kFewRows;
  const int64_t out = int64_t{blockIdx.x} * kGemvWarps + threadIdx.x / kWarp;
  if (out >= a.out) return;
  float sums[kFewRows] = {};
  for (int64_t column = lane; column < a.weight.columns; column += kWarp) {
    const float value = element_of(a.weight, out, column);
#pragma unroll
    for (int n = 0; n < kFewRows; ++n)
      if (first_x + n < a.rows)
        sums[n] = fmaf(
            value, Element<T>::widen(static_cast<const T*>(a.x)[(first_x + n) * a.x_stride + column]), sums[n]);
  }
  sum_over_lanes(sums, kWarp);
#pragma unroll
  for (int n = 0; n < kFewRows; ++n)
    if (lane == n && first_x + n < a.rows) store_result<T>(a, first_x + n, out, sums[n]);
}

}  // namespace pykern
