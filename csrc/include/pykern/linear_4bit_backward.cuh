// Gradients of y = x Wᵀ + bias with W of 4-bit codes: dx = dy W from the same codes, by tensor cores as in
// linear_4bit.cuh, and dbias, the sum of dy's rows.
//
// The depth is now W's rows. A warp's 32 columns of dx are one chunk of each: 16 bytes, one scale. A lane decodes four
// neighbouring columns of four rows; the weights of two rows share a register. Scales are decoded a step ahead, two a
// lane, and pass through shared memory.

#pragma once

#include "linear_4bit.cuh"
#include "matrix.cuh"
#include "swizzle.cuh"

namespace pykern {

constexpr int kBackwardDepth = 64;  // of a step: rows of W, and numbers of a row of dy, 128 bytes
static_assert(kWarpColumns == kChunk, "a warp's columns are a chunk of each row");

template <class T>
struct GradientLayout {
  static constexpr int kChunks = kBackwardDepth * static_cast<int>(sizeof(T)) / 16;
  __host__ __device__ static constexpr int at(int row, int chunk) {
    return Swizzle<T, kBackwardDepth>::at(row, chunk * kFullWidth<T>) / kFullWidth<T>;
  }
};

// Codes, 64 bytes a row, 16 for each warp: the lanes of a quad read every other row, all from the same banks but for
// this permutation.
struct CodeRowsLayout {
  static constexpr int kChunks = kLinearColumns / kChunk;
  __host__ __device__ static constexpr int at(int row, int chunk) { return row * kChunks + (chunk ^ row / 2 % 4); }
};

template <class T, int kRows>
struct BackwardSlot {
  using Gradient = ChunkLoader<GradientLayout<T>, kRows>;
  using Codes = ChunkLoader<CodeRowsLayout, kBackwardDepth, (kRows < kMostLinearRows)>;
  static constexpr int kBytes = Gradient::kBytes + Codes::kBytes, kStages = linear_stages(kBytes);
};

// The scales of a warp's chunks of codes in the rows of a step, each lane's four rows of every sixteen together.
template <Scaling kScaling>
struct StepScales {
  static constexpr int kPlanes = kScaling == Scaling::groups ? 2 : 1;  // factors, and zeros where codes have one
  static constexpr int kBytes = kPlanes * kBackwardDepth * static_cast<int>(sizeof(float));

  // Rows 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 are lane t's.
  static __device__ __forceinline__ int place(int row) {
    return row / 16 * 16 + row % 8 / 2 * 4 + row / 8 % 2 * 2 + row % 2;
  }

  __device__ __forceinline__ void put(int row, const Scale& scale) const {
    planes[place(row)] = scale.factor;
    if constexpr (kPlanes == 2) planes[kBackwardDepth + place(row)] = scale.zero;
  }

  // Those of this lane's rows of the sixteen from `depth` on.
  __device__ __forceinline__ void get(int depth, Scale (&scales)[4]) const {
    float factors[4], zeros[4] = {};
    load_floats(planes + depth + lane_id() % 4 * 4, factors);
    if constexpr (kPlanes == 2) load_floats(planes + kBackwardDepth + depth + lane_id() % 4 * 4, zeros);
#pragma unroll
    for (int i = 0; i < 4; ++i) scales[i] = {factors[i], zeros[i]};
  }

  float* planes;
};

// The weights of a lane's columns in its four rows of the sixteen from `depth` on.
template <class T, Scaling kScaling>
__device__ __forceinline__ void decode_rows(
    FragmentA<T> (&a)[kN], const char* packed, int depth, const Codes<kScaling>& codes, const Scale (&scales)[4]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp, g = lane_id() / 4, t = lane_id() % 4;
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    float values[2][kLaneColumns];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const char* const chunk = packed + 16 * CodeRowsLayout::at(depth + 2 * t + 8 * pair + i, warp);
      const unsigned bits = *reinterpret_cast<const uint16_t*>(chunk + 2 * g);
      const Scale& scale = scales[2 * pair + i];
#pragma unroll
      for (int column = 0; column < kLaneColumns; ++column)
        values[i][column] = __fmul_rn(codes.value(bits >> code_shift(column), scale), scale.factor);
    }
#pragma unroll
    for (int column = 0; column < kLaneColumns; ++column)
      a[column / 2].reg[2 * pair + column % 2] = pack<T>(values[0][column], values[1][column]);
  }
}

// c += W' dy' for one step.
template <class T, int kM, Scaling kScaling>
__device__ __forceinline__ void multiply_back(
    Sums<kM>& c, const char* slot, const Codes<kScaling>& codes, const StepScales<kScaling>& scales) {
  using Layout = Swizzle<T, kBackwardDepth>;
  const T* const dy = reinterpret_cast<const T*>(slot);
  const char* const packed = slot + sizeof(T) * 8 * kM * kBackwardDepth;
  const Coordinate own = wide(lane_id());
#pragma unroll
  for (int depth = 0; depth < kBackwardDepth; depth += FragmentA<T>::kCols) {
    Scale of_rows[4];
    scales.get(depth, of_rows);
    FragmentA<T> a[kN];
    decode_rows(a, packed, depth, codes, of_rows);
#pragma unroll
    for (int m = 0; m < kM; m += 2) {
      FragmentB<T> b[2];
      // The swizzle permutes by bits of the row below 8 m.
      ldmatrix(b[0].reg, b[1].reg, dy + 8 * m * kBackwardDepth + Layout::at(own.row, own.col + depth));
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < kN; ++n) mma(c[n][m + i], a[n], b[i]);
    }
  }
}

template <class T, int kRows, Scaling kScaling>
constexpr int backward_shared_bytes() {
  using Slot = BackwardSlot<T, kRows>;
  return Slot::kStages * Slot::kBytes + 2 * kLinearWarps * StepScales<kScaling>::kBytes;
}

// a.x is dy, a.y dx. Grid: (tiles of rows, tiles of columns, splits).
template <class T, int kRows, Scaling kScaling>
__global__ void __launch_bounds__(kLinearThreads) linear_4bit_input_gradient(const LinearArgs a) {
  using Slot = BackwardSlot<T, kRows>;
  using Scales = StepScales<kScaling>;
  constexpr int kM = kRows / 8;
  const SplitSteps steps(a, kBackwardDepth);
  const int first_depth = steps.first * kBackwardDepth, depth = a.depth - first_depth;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int first_column = static_cast<int>(blockIdx.y) * kLinearColumns;

  typename Slot::Gradient gradient(
      static_cast<const T*>(a.x) + first_row * a.x_stride + first_depth, a.x_stride * sizeof(T),
      min(a.rows - first_row, int64_t{kRows}), depth * static_cast<int64_t>(sizeof(T)));
  typename Slot::Codes packed(
      a.weight.codes + (static_cast<int64_t>(first_depth) * a.columns + first_column) / 2, a.columns / 2, depth,
      (a.columns - first_column) / 2);
  const auto load = [&](char* slot) {
    gradient.load(slot);
    packed.load(slot + Slot::Gradient::kBytes);
    gradient.advance_bytes(GradientLayout<T>::kChunks * 16);
    packed.advance_rows(kBackwardDepth);
  };

  // The scales of a step are read while the one before is worked on; a lane has those of every 32nd row.
  constexpr int kOwn = kBackwardDepth / kWarp;
  const ChunkScales<kScaling> scales(a.weight);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, column = first_column + warp * kWarpColumns;
  typename ChunkScales<kScaling>::Loaded loaded[kOwn] = {};
  const auto load_scales = [&](int step) {
    const int first = (steps.first + step) * kBackwardDepth + lane_id();
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      if (first + i * kWarp < a.depth && column < a.columns)
        loaded[i] = scales.load(int64_t{first + i * kWarp}, column);
  };
  char* const slots = dynamic_shared<char>();
  float* const planes =
      reinterpret_cast<float*>(slots + Slot::kStages * Slot::kBytes + 2 * warp * Scales::kBytes);
  // By turns in two places: lanes still read the scales of the step before.
  const auto scales_of = [&](int step) { return Scales{planes + step % 2 * (Scales::kBytes / 4)}; };
  const auto put_scales = [&](int step) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) scales_of(step).put(lane_id() + i * kWarp, scales.decode(loaded[i]));
  };
  load_scales(0);
  put_scales(0);
  if (steps.count > 1) load_scales(1);

  const Codes<kScaling> codes(a.weight);
  Sums<kM> c = {};
  pass_through_ring<Slot::kStages>(slots, Slot::kBytes, steps.count, load, [&](const char* slot, int step) {
    multiply_back<T, kM>(c, slot, codes, scales_of(step));
    // The barrier before the next step makes them seen.
    if (step + 1 < steps.count) put_scales(step + 1);
    if (step + 2 < steps.count) load_scales(step + 2);
  });
  store_tile<T, kM>(a, c);
}

// The sum of rows, in fp32 and always in the same order. A block has kSumColumns columns of some rows, which its warps
// take in turn; then the warps' sums are added up. Few blocks leave sums of a part of the rows each, which the same
// kernel adds up.
constexpr int kSumWarps = 8, kSumThreads = kSumWarps * kWarp;

struct SumArgs {
  const void* x;  // (rows, columns)
  int64_t x_stride, rows;
  int columns;
  int64_t part_rows;  // of a block
  void* sums;         // (parts, columns), of `type`
  DType type;
};

// kWidth elements are read at a time. Grid: (tiles of kWarp * kWidth columns, parts).
template <class T, int kWidth>
__global__ void __launch_bounds__(kSumThreads) linear_4bit_row_sum(const SumArgs a) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int column = (static_cast<int>(blockIdx.x) * kWarp + lane_id()) * kWidth;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * a.part_rows, end = min(first + a.part_rows, a.rows);
  float sum[kWidth] = {}, values[kWidth];
  if (column < a.columns) {
#pragma unroll 4
    for (int64_t row = first + warp; row < end; row += kSumWarps) {
      load_floats(static_cast<const T*>(a.x) + row * a.x_stride + column, values);
#pragma unroll
      for (int i = 0; i < kWidth; ++i) sum[i] += values[i];
    }
  }
  PYKERN_SHARED(of_warps, float[kSumWarps][kWidth][kWarp]);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) of_warps[warp][i][lane_id()] = sum[i];
  __syncthreads();
  for (int own = threadIdx.x; own < kWidth * kWarp; own += kSumThreads) {
    const int to = static_cast<int>(blockIdx.x) * kWarp * kWidth + own;
    if (to >= a.columns) continue;
    float total = 0;
#pragma unroll
    for (int i = 0; i < kSumWarps; ++i) total += of_warps[i][own % kWidth][own / kWidth];
    const int64_t at = static_cast<int64_t>(blockIdx.y) * a.columns + to;
    if (a.type == DType::f32) static_cast<float*>(a.sums)[at] = total;
    else if (a.type == DType::f16) static_cast<__half*>(a.sums)[at] = Element<__half>::narrow(total);
    else static_cast<__nv_bfloat16*>(a.sums)[at] = Element<__nv_bfloat16>::narrow(total);
  }
}

}  // namespace pykern
