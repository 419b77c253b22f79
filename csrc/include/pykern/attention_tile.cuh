// What the forward and backward kernels of attention do with tiles: rows of a head between global and swizzled shared
// memory, fragments of a tile for mma.sync, masks, numbers in base 2.

#pragma once

#include "device.cuh"

#include "copy_async.cuh"
#include "heads.h"
#include "matrix.cuh"
#include "mma.cuh"
#include "swizzle.cuh"
#include "vector.cuh"

namespace pykern {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;
constexpr float kInfinity = __builtin_huge_valf();

// Arithmetic.

// 2^x to 2 ulp, results below 2^-126 flushed to zero: the instruction behind exp2f, which spends three more on those.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// tanh(x) to 5 ulp. The instruction tanh.approx is good to 11 bits, which a softcap of 50 turns into wrong weights.
// Near zero 1 - 2 / (e^2x + 1) cancels; there it is an odd polynomial, fitted for the least relative error (4e-9) below
// 5/8.
__device__ __forceinline__ float tanh_fast(float x) {
  const float size = fabsf(x), square = x * x;
  float q = fmaf(-0.005704986862838268f, square, 0.02063908614218235f);
  q = fmaf(q, square, -0.05373971536755562f);
  q = fmaf(q, square, 0.13331441581249237f);
  q = fmaf(q, square, -0.3333328068256378f);
  const float small = fmaf(x * square, q, x);
  const float large = 1.f - __fdividef(2.f, exp2_approx(2 * kLog2e * size) + 1.f);
  return size < 0.625f ? small : copysignf(large, x);  // NaN is not less
}

// The same number, of which the compiler does not know where it is from: what follows from it is computed again in each
// turn of a loop, or after it, instead of waiting in a register.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// The four lanes that hold a row of an accumulator fragment, LayoutC: all end with the same.
__device__ __forceinline__ float max_over_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}
__device__ __forceinline__ float sum_over_quad(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Global memory.

// The rows of one head: `size` contiguous elements each, a multiple of 8, at addresses divisible by 16.
template <class T>
struct HeadRows {
  T* data;
  int64_t stride;
  int rows, size;
};

template <class T>
__device__ __forceinline__ HeadRows<T> rows_of_head(
    const Heads& heads, int64_t batch, int64_t head, int rows, int size) {
  return {static_cast<T*>(heads.data) + batch * heads.batch + head * heads.head, heads.row, rows, size};
}

// How kThreads threads, a block or one of its warps, share the chunks of 16 bytes of a tile of kRows rows of kCols
// elements, in shared memory in the order of Swizzle<T, kCols>: each has a column, and every kStep-th row.
template <class T, int kRows, int kCols, int kThreads>
struct TileChunks {
  static constexpr int kChunks = kCols / 8, kStep = kThreads / kChunks;
  static_assert(sizeof(T) == 2 && kThreads % kChunks == 0 && kRows % kStep == 0);

  const int thread = opaque(static_cast<int>(threadIdx.x)) % kThreads;
  const int row = thread / kChunks, col = thread % kChunks * 8;

  // Where row `row + step` is. The swizzle repeats every 8 rows: said like this, threads need one or two addresses.
  __device__ __forceinline__ int at(int step) const {
    return Swizzle<T, kCols>::at(row + step % 8, col) + step / 8 * 8 * kCols;
  }
};

// Begins to copy a head's rows, kRows after kRows from `first` on, to tiles; zeros where there is no row or column.
// What a thread keeps between tiles is a pointer and a count. The threads commit.
template <class Rows, int kRows, int kCols, int kThreads>
class TileLoader;

template <class T, int kRows, int kCols, int kThreads>
class TileLoader<HeadRows<T>, kRows, kCols, kThreads> {
 public:
  __device__ __forceinline__ TileLoader(const HeadRows<T>& from, int first)
      : source_(from.data + static_cast<int64_t>(first + own_.row) * from.stride + own_.col),
        stride_(from.stride),
        rows_(own_.col < from.size ? from.rows - first - own_.row : 0) {}

  __device__ __forceinline__ void load(T* tile) {
#pragma unroll
    for (int step = 0; step < kRows; step += Chunks::kStep, source_ += Chunks::kStep * stride_)
      cp_async<16>(tile + own_.at(step), source_, step < rows_ ? 16 : 0);
    rows_ -= kRows;
  }

 private:
  using Chunks = TileChunks<T, kRows, kCols, kThreads>;

  Chunks own_;
  const T* source_;
  int64_t stride_;
  int rows_;  // that are there, from this thread's first on
};

// One tile, of rows [first, first + kRows).
template <int kRows, int kCols, int kThreads, class T>
__device__ __forceinline__ void load_rows(T* tile, const HeadRows<T>& from, int first) {
  TileLoader<HeadRows<T>, kRows, kCols, kThreads>(from, first).load(tile);
}

// The other way, at once: those rows and columns of the tile that exist.
template <int kRows, int kCols, int kThreads, class T>
__device__ __forceinline__ void store_rows(const HeadRows<T>& to, const T* tile, int first) {
  using Chunks = TileChunks<T, kRows, kCols, kThreads>;
  const Chunks own;
  T* target = to.data + static_cast<int64_t>(first + own.row) * to.stride + own.col;
  const int rows = own.col < to.size ? to.rows - first - own.row : 0;
#pragma unroll
  for (int step = 0; step < kRows; step += Chunks::kStep, target += Chunks::kStep * to.stride)
    if (step < rows) store_pack(target, load_pack<8>(tile + own.at(step)));
}

// Zeros in rows [first, first + kRows) of those that exist.
template <int kRows, int kCols, int kThreads, class T>
__device__ __forceinline__ void clear_rows(const HeadRows<T>& to, int first) {
  using Chunks = TileChunks<T, kRows, kCols, kThreads>;
  const Chunks own;
  if (own.col >= to.size) return;
#pragma unroll 1
  for (int row = first + own.row; row < min(first + kRows, to.rows); row += Chunks::kStep)
    store_pack(to.data + row * to.stride + own.col, Pack<T, 8>{});
}

// Shared memory to registers and back.

// A tile of rows of kCols elements in the order of Swizzle<T, kCols>, as one warp reads it. It begins at a multiple of
// 128 bytes. Rows and columns below are multiples of 16, and best known to the compiler.
template <class T, int kCols>
class TileReader {
 public:
  __device__ __forceinline__ TileReader()
      : TileReader(offset(tall(lane_id())), offset(wide(lane_id()))) {}

  // For one turn of a loop: else the compiler keeps addresses for each way in which the swizzle permutes columns, eight
  // registers instead of two.
  __device__ __forceinline__ TileReader again() const { return {opaque(tall_), opaque(wide_)}; }

  // A[m][k] = tile[row + m][col + k], and A[m][k] = tile[row + k][col + m].
  __device__ __forceinline__ void load_a(FragmentA<T>& a, const T* tile, int row, int col) const {
    ldmatrix(a.reg, at(tile, tall_, row, col));
  }
  __device__ __forceinline__ void load_a_trans(FragmentA<T>& a, const T* tile, int row, int col) const {
    ldmatrix_trans(a.reg, at(tile, wide_, row, col));
  }

  // B[k][n] = tile[row + n][col + k], and B[k][n] = tile[row + k][col + n]; n from 8 on is in the second.
  __device__ __forceinline__ void load_b(FragmentB<T> (&b)[2], const T* tile, int row, int col) const {
    ldmatrix(b[0].reg, b[1].reg, at(tile, wide_, row, col));
  }
  __device__ __forceinline__ void load_b_trans(FragmentB<T> (&b)[2], const T* tile, int row, int col) const {
    ldmatrix_trans(b[0].reg, b[1].reg, at(tile, tall_, row, col));
  }

 private:
  using Layout = Swizzle<T, kCols>;

  __device__ __forceinline__ TileReader(int tall, int wide) : tall_(tall), wide_(wide) {}

  static __device__ __forceinline__ int offset(Coordinate of_lane) { return Layout::at(of_lane.row, of_lane.col); }

  // A row's chunks are permuted by bits of its number below 8, which `row` has not: so the lane's offset in the first
  // 16 x 16 elements, XOR the column, is its offset there.
  static __device__ __forceinline__ const T* at(const T* tile, int of_lane, int row, int col) {
    return tile + (row * kCols + col / 64 * 64) + (of_lane ^ col % 64);
  }

  int tall_, wide_;
};

// Writes an accumulator fragment, rounded, to tile[row .. row + 16)[col .. col + 8).
template <int kCols, class T>
__device__ __forceinline__ void store_fragment(T* tile, const FragmentC<float>& c, int row, int col) {
  const int lane = lane_id();
#pragma unroll
  for (int e = 0; e < LayoutC::kElements; e += 2)
    *reinterpret_cast<uint32_t*>(
        tile + Swizzle<T, kCols>::at(row + LayoutC::row(lane, e), col + LayoutC::col(lane, e))) =
        pack<T>(c.x[e], c.x[e + 1]);
}

// Sums of products of a warp: c[m][n] holds rows 16 m and columns 8 n.

// c += A B' for one depth of 16: A in registers, B[8 kN x 16] from tile `b` at (row_b, depth): rows times rows.
template <int kM, int kN, class T, int kCols>
__device__ __forceinline__ void multiply_rows_at(
    FragmentC<float> (&c)[kM][kN], const FragmentA<T> (&a)[kM], const TileReader<T, kCols>& reader, const T* b,
    int row_b, int depth) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    FragmentB<T> pair[2];
    reader.load_b(pair, b, row_b + 8 * n, depth);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      mma(c[m][n], a[m], pair[0]);
      mma(c[m][n + 1], a[m], pair[1]);
    }
  }
}

// The same over kDepth columns of both tiles, A[16 kM x kDepth] from tile `a` at row_a.
template <int kDepth, int kM, int kN, class T, int kCols>
__device__ __forceinline__ void multiply_rows(
    FragmentC<float> (&c)[kM][kN], const TileReader<T, kCols>& reader, const T* a, int row_a, const T* b, int row_b) {
#pragma unroll
  for (int depth = 0; depth < kDepth; depth += 16) {
    FragmentA<T> own[kM];
#pragma unroll
    for (int m = 0; m < kM; ++m) reader.load_a(own[m], a, row_a + 16 * m, depth);
    multiply_rows_at(c, own, reader, b, row_b, depth);
  }
}

// c += A B for one depth of 16: A in registers, B[16 x 8 kN] from tile `b` at (row_b, col_b): rows times columns.
template <int kM, int kN, class T, int kCols>
__device__ __forceinline__ void multiply_columns_at(
    FragmentC<float> (&c)[kM][kN], const FragmentA<T> (&a)[kM], const TileReader<T, kCols>& reader, const T* b,
    int row_b, int col_b = 0) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    FragmentB<T> pair[2];
    reader.load_b_trans(pair, b, row_b, col_b + 8 * n);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      mma(c[m][n], a[m], pair[0]);
      mma(c[m][n + 1], a[m], pair[1]);
    }
  }
}

}  // namespace pykern
