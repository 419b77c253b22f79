// LayerNorm and RMSNorm over rows of n elements, with or without a residual added first; norm_backward.cuh has their
// gradients. An RMSNorm is a LayerNorm whose mean is taken to be zero and that has no bias: kCentred says which.
//
// All of them are bound by memory, so what counts is that a row is read once. A team of threads shares a row, each
// thread every team.size-th pack of it. Where rows fit, a thread keeps its packs in registers from the one load to the
// one store; longer ones stay in shared memory as far as they fit, and the rest is read again.
//
// Accuracy: the mean is subtracted before squares are taken. What the rounding of the mean to fp32 has lost is summed
// up as well; it corrects the variance and shifts the output, so that a mean far from zero costs nothing.

#pragma once

#include "device.cuh"

#include "reduce.cuh"
#include "rows.h"
#include "vector.cuh"

namespace pykern {

struct NormParameters {
  const void* weight;  // (n,), or null: ones
  const void* bias;    // (n,), or null: zeros
  bool wide;           // both are fp32; else of x's type
  float weight_offset;  // 0 without a weight
};

struct NormForwardArgs {
  Rows x;
  Rows residual;
  void* summed;  // (rows, n), x + residual
  NormParameters parameters;
  void* y;      // (rows, n)
  float* mean;  // (rows,); not written by RMSNorm
  float* rstd;  // (rows,)
  int64_t rows;
  int n;
  float eps;
  bool round_before_weight;
  int team;    // threads that share a row
  int cached;  // packs of a row that stay in shared memory; for rows too long for registers
};

// Rows whose indices count through several dimensions are fewer than 2³²: dividing 64 bits would take a third of the
// registers.
template <class T>
__device__ T* row_of(const Rows& rows, int64_t row) {
  T* const data = static_cast<T*>(rows.data);
  return data + (rows.dims == 1 ? row * rows.stride[0] : row_offset(rows, static_cast<uint32_t>(row)));
}

template <class P, int kWidth>
__device__ void load_parameter(const void* data, int column, float missing, float (&out)[kWidth]) {
  if (data) {
    load_floats(static_cast<const P*>(data) + column, out);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = missing;
  }
}

template <class P, int kWidth>
__device__ void load_factor(const NormParameters& parameters, int column, float (&out)[kWidth]) {
  load_parameter<P>(parameters.weight, column, 1.f, out);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) out[j] += parameters.weight_offset;
}

// normed = (value - centre) · rstd + shift
struct RowScale {
  float mean = 0, centre = 0, shift = 0, rstd;

  template <bool kCentred>
  __device__ float normed(float value) const {
    if constexpr (kCentred) return fmaf(value - centre, rstd, shift);
    else return value * rstd;
  }
};

// 1 / √x to within half an ulp and a little: an error here scales a whole row. The residuals of the root and of the
// quotient are exact.
__device__ float reciprocal_root(float x) {
  const float root = __fsqrt_rn(x);
  const float guess = __fdiv_rn(1.f, root);
  if (!(guess > 0.f && guess < __int_as_float(0x7f800000))) return guess;  // of zero, infinity and NaN
  const float quotient_residual = fmaf(-root, guess, 1.f);
  const float root_residual = fmaf(-root, root, x);
  return fmaf(guess, quotient_residual - 0.5f * root_residual * guess * guess, guess);
}

// The scale of a row from its mean as fp32 holds it, and from the means of (x - mean) and (x - mean)².
__device__ RowScale row_scale(float centre, float missing, float square, float eps) {
  float variance = square - missing * missing;
  if (variance < 0.f) variance = 0.f;  // equal elements; NaN stays
  RowScale scale;
  scale.rstd = reciprocal_root(variance + eps);
  scale.mean = scale.centre = centre;
  scale.shift = -missing * scale.rstd;
  return scale;
}

__device__ float elements(int n) { return static_cast<float>(n > 0 ? n : 1); }

template <bool kCentred>
__device__ void store_statistics(const NormForwardArgs& a, const RowScale& scale, int64_t row) {
  if constexpr (kCentred) a.mean[row] = scale.mean;
  a.rstd[row] = scale.rstd;
}

template <class T, int kWidth>
__device__ Pack<T, kWidth> sum_of(const Pack<T, kWidth>& x, const Pack<T, kWidth>& residual) {
  float a[kWidth], b[kWidth];
  widen(x, a);
  widen(residual, b);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) a[j] += b[j];
  return narrow<T, kWidth>(a);
}

template <class T, class P, bool kCentred, int kWidth>
__device__ void store_normed(
    const NormForwardArgs& a, const RowScale& scale, const Pack<T, kWidth>& pack, T* y, int column) {
  float values[kWidth], factor[kWidth], bias[kWidth];
  load_factor<P>(a.parameters, column, factor);
  if constexpr (kCentred) load_parameter<P>(a.parameters.bias, column, 0.f, bias);
  widen(pack, values);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    float normed = scale.normed<kCentred>(values[j]);
    if constexpr (!kCentred) {
      if (a.round_before_weight) normed = rounded<T>(normed);
      values[j] = normed * factor[j];
    } else {
      values[j] = fmaf(normed, factor[j], bias[j]);
    }
  }
  store_pack(y + column, narrow<T, kWidth>(values));
}

template <class T, class P, bool kCentred, int kWidth, int kPacks>
__device__ void store_row(
    const NormForwardArgs& a, const RowScale& scale, const Pack<T, kWidth> (&held)[kPacks], const Team& team,
    int64_t row) {
  T* const y = static_cast<T*>(a.y) + row * a.n;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int column = (team.thread + k * team.size) * kWidth;
    if (column < a.n) store_normed<T, P, kCentred>(a, scale, held[k], y, column);
  }
}

// The packs of a row that a thread of norm_forward holds: 16-byte ones leave a block of kForwardThreads the registers
// it needs, and are enough loads in flight to hide the memory's latency.
PYKERN_ANYWHERE constexpr int forward_packs(int width) { return width > 1 ? 4 : 8; }
constexpr int kForwardThreads = 1024;

// Rows that fit into the registers of a team. Block: whole teams; grid: as many blocks as rows need.
template <class T, bool kCentred, bool kAdds, int kWidth>
__global__ void __launch_bounds__(kForwardThreads) norm_forward(const NormForwardArgs a) {
  constexpr int kPacks = forward_packs(kWidth);
  Team team(a.team);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / team.size) + team.index;
  const bool live = row < a.rows;  // teams without a row take part in the sums, where warps meet
  const int n = live ? a.n : 0;

  Pack<T, kWidth> held[kPacks] = {};
  if (live) {
    const T* const x = row_of<const T>(a.x, row);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int column = (team.thread + k * team.size) * kWidth;
      if (column < n) held[k] = load_pack<kWidth>(x + column);
    }
    if constexpr (kAdds) {
      const T* const residual = row_of<const T>(a.residual, row);
      T* const summed = static_cast<T*>(a.summed) + row * a.n;
      Pack<T, kWidth> added[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int column = (team.thread + k * team.size) * kWidth;
        if (column < n) added[k] = load_pack<kWidth>(residual + column);
      }
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int column = (team.thread + k * team.size) * kWidth;
        if (column < n) {
          held[k] = sum_of(held[k], added[k]);
          store_pack(summed + column, held[k]);
        }
      }
    }
  }

  const float count = elements(a.n);
  float centre = 0;
  if constexpr (kCentred) {
    float sums[1] = {};
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      float values[kWidth], sum = 0;  // sums of short sums lose less than one long sum
      widen(held[k], values);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum += values[j];
      sums[0] += sum;
    }
    sum_over_team(sums, team);
    centre = __fdiv_rn(sums[0], count);
  }
  float sums[kCentred ? 2 : 1] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if ((team.thread + k * team.size) * kWidth >= n) continue;
    float values[kWidth], squares = 0;
    widen(held[k], values);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      const float gap = values[j] - centre;
      squares = fmaf(gap, gap, squares);
      if constexpr (kCentred) sums[1] += gap;
    }
    sums[0] += squares;
  }
  sum_over_team(sums, team);
  if (!live) return;
  float missing = 0;
  if constexpr (kCentred) missing = __fdiv_rn(sums[1], count);
  const RowScale scale = row_scale(centre, missing, __fdiv_rn(sums[0], count), a.eps);

  if constexpr (!std::is_same_v<T, float>) {
    if (a.parameters.wide) store_row<T, float, kCentred>(a, scale, held, team, row);
    else store_row<T, T, kCentred>(a, scale, held, team, row);
  } else {
    store_row<T, T, kCentred>(a, scale, held, team, row);
  }
  if (team.thread == 0) store_statistics<kCentred>(a, scale, row);
}


// What a thread has seen of a long row: how many values, their mean, and the squares about it (Welford's method, merged
// as Chan, Golub and LeVeque do). For RMSNorm the mean stays zero. The level is rounded at each step, which is nothing
// to y, but too much for the mean of a row where that is almost zero: it is taken from the sum.
struct Spread {
  float count = 0, level = 0, squares = 0, sum = 0;

  template <bool kCentred, int kWidth>
  __device__ void add(const float (&values)[kWidth]) {
    if constexpr (!kCentred) {
      float square = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) square = fmaf(values[j], values[j], square);
      squares += square;
    } else {
      float mean = 0;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) mean += values[j];
      sum += mean;
      mean *= 1.f / kWidth;
      const float gap = mean - level;
      const float share = __fdiv_rn(kWidth, count + kWidth);
      squares = fmaf(gap * gap, count * share, squares);
      level = fmaf(gap, share, level);
      count += kWidth;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) squares = fmaf(values[j] - mean, values[j] - mean, squares);
    }
  }
};

template <class T, class P, bool kCentred, int kWidth>
__device__ void store_long_row(
    const NormForwardArgs& a, const RowScale& scale, const Pack<T, kWidth>* cache, const T* source, int64_t row) {
  T* const y = static_cast<T*>(a.y) + row * a.n;
  constexpr int kBatch = 4;
  const int packs = a.n / kWidth, threads = blockDim.x;
  for (int first = threadIdx.x; first < packs; first += kBatch * threads) {
    Pack<T, kWidth> batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = first + b * threads;
      if (p < a.cached) batch[b] = cache[p];
      else if (p < packs) batch[b] = load_pack<kWidth>(source + p * kWidth);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = first + b * threads;
      if (p < packs) store_normed<T, P, kCentred>(a, scale, batch[b], y, p * kWidth);
    }
  }
}

// Rows that are too long for registers: a block of kForwardThreads each. A thread meets only its own packs, in shared
// and in global memory, so nothing but the sums needs a barrier. One block a multiprocessor is said to be enough, or
// the compiler spills to fit two.
template <class T, bool kCentred, bool kAdds, int kWidth>
__global__ void __launch_bounds__(kForwardThreads, 1) norm_forward_long(const NormForwardArgs a) {
  Team team(blockDim.x);
  Pack<T, kWidth>* const cache = dynamic_shared<Pack<T, kWidth>>();
  const int64_t row = blockIdx.x;
  const T* const x = row_of<const T>(a.x, row);
  const T* residual = nullptr;
  T* summed = nullptr;
  if constexpr (kAdds) {
    residual = row_of<const T>(a.residual, row);
    summed = static_cast<T*>(a.summed) + row * a.n;
  }
  constexpr int kBatch = kAdds ? 2 : 4;  // packs that a thread asks for at a time: 64 KiB in flight a block
  const int packs = a.n / kWidth, threads = blockDim.x;

  Spread spread;
  for (int first = threadIdx.x; first < packs; first += kBatch * threads) {
    Pack<T, kWidth> batch[kBatch], added[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = first + b * threads;
      if (p >= packs) continue;
      batch[b] = load_pack<kWidth>(x + p * kWidth);
      if constexpr (kAdds) added[b] = load_pack<kWidth>(residual + p * kWidth);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int p = first + b * threads;
      if (p >= packs) continue;
      if constexpr (kAdds) {
        batch[b] = sum_of(batch[b], added[b]);
        store_pack(summed + p * kWidth, batch[b]);
      }
      if (p < a.cached) cache[p] = batch[b];
      float values[kWidth];
      widen(batch[b], values);
      spread.add<kCentred>(values);
    }
  }

  const float count = elements(a.n);
  float mean = 0, centre = 0, missing = 0, square;
  if constexpr (kCentred) {
    float levels[2] = {spread.level * spread.count, spread.sum};
    sum_over_team(levels, team);
    centre = __fdiv_rn(levels[0], count);
    mean = __fdiv_rn(levels[1], count);
    const float gap = spread.level - centre;
    float sums[2] = {fmaf(gap * gap, spread.count, spread.squares), gap * spread.count};
    sum_over_team(sums, team);
    square = __fdiv_rn(sums[0], count);
    missing = __fdiv_rn(sums[1], count);
  } else {
    float sums[1] = {spread.squares};
    sum_over_team(sums, team);
    square = __fdiv_rn(sums[0], count);
  }
  RowScale scale = row_scale(centre, missing, square, a.eps);
  scale.mean = mean;

  const T* source = x;
  if constexpr (kAdds) source = summed;
  if constexpr (!std::is_same_v<T, float>) {
    if (a.parameters.wide) store_long_row<T, float, kCentred>(a, scale, cache, source, row);
    else store_long_row<T, T, kCentred>(a, scale, cache, source, row);
  } else {
    store_long_row<T, T, kCentred>(a, scale, cache, source, row);
  }
  if (threadIdx.x == 0) store_statistics<kCentred>(a, scale, row);
}

}  // namespace pykern
