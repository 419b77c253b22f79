// A product per group of rows on tensor cores with mma.sync (sm_80 and later), fp16 and bf16: out = A B[g] + bias[g],
// and the gradient of the groups' matrices, B'[g] = A[g]' C[g]. The gradient of A is the first product with matrices
// transposed, which is a matter of strides. How groups lie in the rows stands in grouped_rows.cuh.
//
// A block of four warps owns a tile and passes along what is summed through a ring of slots in shared memory. Rows are
// gathered as they are copied there and scattered as they are stored, so no permuted copy of them is ever made. No sum
// is split: one warp adds it up, always in the same order.

#pragma once

#include "device.cuh"

#include "attention_tile.cuh"
#include "grouped_rows.cuh"
#include "linear_tile.cuh"

namespace pykern {

struct GroupedArgs {
  const void* a;  // rows of `depth` elements, 16-byte aligned; which of them is row i says `source`
  int64_t a_stride;
  RowIndex source;
  const void* b;  // (groups, depth, columns), rows or columns of adjacent elements, 16-byte aligned
  int64_t b_group, b_stride;
  GroupOffsets offsets;
  int columns, depth;
  int tiles;         // of rows, at the most
  const void* bias;  // (groups or 1, columns), of the elements' type or fp32; or null
  int64_t bias_group;
  bool wide_bias;  // fp32
  void* out;       // (rows, columns), contiguous; where row i goes says `target`
  DType out_type;
  RowIndex target;
};

constexpr int kGroupedThreads = kLinearThreads, kGroupedWarps = kLinearWarps;
constexpr int kGroupedColumns = 128;  // of a tile

// Results.

// A warp's part of a tile. Four warps share 128 columns and as many rows as two by two, so that each reads the least of
// both operands from shared memory; of fewer rows each warp has all.
template <int kRows>
struct WarpPart {
  static constexpr int kTall = kRows > 64 ? 64 : kRows, kWide = kRows > 64 ? 64 : 32;
  static constexpr int kM = kTall / 16, kN = kWide / 8;
  using Sums = FragmentC<float>[kM][kN];

  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int row = warp / (kGroupedColumns / kWide) * kTall, column = warp % (kGroupedColumns / kWide) * kWide;
};

// Sums of a tile in shared memory on their way to whole rows; the gap between rows keeps lanes off each other's banks.
constexpr int kStagedColumns = kGroupedColumns + 8;
constexpr int staged_bytes(int rows) { return rows * kStagedColumns * static_cast<int>(sizeof(float)); }

constexpr int kStoredColumns = 4;  // of a lane, as a warp takes a row
static_assert(kWarp * kStoredColumns == kGroupedColumns);

__device__ __forceinline__ int stored_column() { return kStoredColumns * lane_id(); }

// Puts the sums where the ring's slots were.
template <int kRows>
__device__ __forceinline__ void stage(const typename WarpPart<kRows>::Sums& sums) {
  const WarpPart<kRows> part;
  const int lane = lane_id();
  float* const staged = dynamic_shared<float>();
  __syncthreads();  // nobody reads the slots any more
#pragma unroll
  for (int m = 0; m < WarpPart<kRows>::kM; ++m)
#pragma unroll
    for (int n = 0; n < WarpPart<kRows>::kN; ++n)
#pragma unroll
      for (int e = 0; e < LayoutC::kElements; e += 2) {
        const int row = part.row + 16 * m + LayoutC::row(lane, e), column = part.column + 8 * n + LayoutC::col(lane, e);
        *reinterpret_cast<float2*>(staged + row * kStagedColumns + column) =
            make_float2(sums[m][n].x[e], sums[m][n].x[e + 1]);
      }
  __syncthreads();
}

// store(row, numbers) for each of the first `rows` rows that were staged.
template <class Store>
__device__ __forceinline__ void for_each_staged_row(int rows, const Store& store) {
#pragma unroll 4
  for (int row = static_cast<int>(threadIdx.x) / kWarp; row < rows; row += kGroupedWarps) {
    float numbers[kStoredColumns];
    load_floats(dynamic_shared<float>() + row * kStagedColumns + stored_column(), numbers);
    store(row, numbers);
  }
}

// `left` of the numbers exist. Whole: all of them, in rows that are aligned to four.
template <class T>
__device__ __forceinline__ void store_numbers(T* to, const float (&numbers)[kStoredColumns], int left, bool whole) {
  if (whole) {
    if constexpr (sizeof(T) == 4) {
      store_floats(to, numbers);
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(
          Element<T>::narrow_pair(numbers[0], numbers[1]), Element<T>::narrow_pair(numbers[2], numbers[3]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kStoredColumns; ++i)
    if (i < left) to[i] = Element<T>::narrow(numbers[i]);
}

// Operands.

template <class T, int kCols>
struct SwizzledChunks {
  static constexpr int kChunks = kCols / kFullWidth<T>;
  __host__ __device__ static constexpr int at(int row, int chunk) {
    return Swizzle<T, kCols>::at(row, chunk * kFullWidth<T>) / kFullWidth<T>;
  }
};

// Begins to copy the tiles of kRows rows of a that follow one another along the depth. Each thread has a column and
// some rows, of which it keeps the addresses.
template <class T, int kRows, int kDepth>
class GatheredRows {
 public:
  static constexpr int kBytes = kRows * kDepth * static_cast<int>(sizeof(T));

  __device__ __forceinline__ GatheredRows(const GroupedArgs& args, const RowTile& tile)
      : bytes_((args.depth - own_.col) * static_cast<int>(sizeof(T))) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int row = tile.first + own_.row + i * Chunks::kStep;
      const int source = row < tile.end ? args.source.of(row) : RowIndex::kNowhere;
      there_[i] = source != RowIndex::kNowhere;
      from_[i] = static_cast<const T*>(args.a) + (there_[i] ? source : 0) * args.a_stride + own_.col;
    }
  }

  __device__ __forceinline__ void load(char* slot) {
    T* const tile = reinterpret_cast<T*>(slot);
    const int filled = max(min(bytes_, 16), 0);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      cp_async<16>(tile + own_.at(i * Chunks::kStep), from_[i], there_[i] ? filled : 0);
      from_[i] += kDepth;
    }
    bytes_ -= kDepth * static_cast<int>(sizeof(T));
  }

 private:
  using Chunks = TileChunks<T, kRows, kDepth, kGroupedThreads>;
  static constexpr int kOwn = kRows / Chunks::kStep;

  Chunks own_;
  const T* from_[kOwn];
  bool there_[kOwn];
  int bytes_;
};

// Tiles of a group's matrix: rows along the depth, or columns along the depth where those have adjacent elements.
template <class T, int kDepth, bool kAlong>
class MatrixTiles {
  using Layout = SwizzledChunks<T, kAlong ? kDepth : kGroupedColumns>;
  using Loader = ChunkLoader<Layout, kAlong ? kGroupedColumns : kDepth>;

 public:
  static constexpr int kBytes = Loader::kBytes;

  __device__ __forceinline__ MatrixTiles(const GroupedArgs& args, int group, int column)
      : loader_(
            static_cast<const T*>(args.b) + group * args.b_group + column * (kAlong ? args.b_stride : int64_t{1}),
            args.b_stride * static_cast<int64_t>(sizeof(T)), kAlong ? args.columns - column : args.depth,
            (kAlong ? args.depth : args.columns - column) * static_cast<int64_t>(sizeof(T))) {}

  __device__ __forceinline__ void load(char* slot) {
    loader_.load(slot);
    if constexpr (kAlong) loader_.advance_bytes(kDepth * static_cast<int>(sizeof(T)));
    else loader_.advance_rows(kDepth);
  }

 private:
  Loader loader_;
};

// The product.

// Steps of 128 bytes along the depth, lines of memory. With 128 rows, where products take longer than copies, half of
// that, so that two blocks with four slots each fit a multiprocessor of sm_80. With fewer rows memory sets the pace,
// and the 72 KiB of a block's slots keep it busy.
template <class T, int kRows, bool kAlong>
struct ProductPlan {
  static constexpr int kDepth = kRows > 64 ? 32 : 64;
  using Rows = GatheredRows<T, kRows, kDepth>;
  using Matrix = MatrixTiles<T, kDepth, kAlong>;
  static constexpr int kSlotBytes = Rows::kBytes + Matrix::kBytes, kStages = kRows == 64 ? 3 : 4;
  static constexpr int kRing = kStages * kSlotBytes, kStaged = staged_bytes(kRows);
  static constexpr int kSharedBytes = kRing > kStaged ? kRing : kStaged;
};

// Blocks beside each other share columns of a matrix among this many tiles of rows, which often are one group's; then
// come the next columns, with the same rows. Both then are found in the second-level cache.
constexpr int kTilesInBand = 8;

struct TileNumber {
  int rows, columns;

  __device__ __forceinline__ TileNumber(int block, int tiles, int panels) {
    const int band = block / (kTilesInBand * panels), in_band = block - band * kTilesInBand * panels;
    const int height = min(kTilesInBand, tiles - band * kTilesInBand);
    rows = band * kTilesInBand + in_band % height;
    columns = in_band / height;
  }
};

// c += A B over a block's tiles of both.
template <class T, int kRows, bool kAlong>
__device__ __forceinline__ void multiply_tiles(
    typename WarpPart<kRows>::Sums& c, const GroupedArgs& args, const RowTile& own, int column) {
  using Plan = ProductPlan<T, kRows, kAlong>;
  constexpr int kM = WarpPart<kRows>::kM;
  typename Plan::Rows rows(args, own);
  typename Plan::Matrix matrix(args, own.group, column);
  const WarpPart<kRows> part;
  const TileReader<T, Plan::kDepth> left;
  const TileReader<T, kAlong ? Plan::kDepth : kGroupedColumns> right;
  const auto load = [&](char* slot) {
    rows.load(slot);
    matrix.load(slot + Plan::Rows::kBytes);
  };
  const auto multiply = [&](const char* slot, int) {
    const T* const a = reinterpret_cast<const T*>(slot);
    const T* const b = reinterpret_cast<const T*>(slot + Plan::Rows::kBytes);
#pragma unroll
    for (int depth = 0; depth < Plan::kDepth; depth += 16) {
      FragmentA<T> of_rows[kM];
#pragma unroll
      for (int m = 0; m < kM; ++m) left.load_a(of_rows[m], a, part.row + 16 * m, depth);
      if constexpr (kAlong) multiply_rows_at(c, of_rows, right, b, part.column, depth);
      else multiply_columns_at(c, of_rows, right, b, depth, part.column);
    }
  };
  const int steps = (args.depth + Plan::kDepth - 1) / Plan::kDepth;
  pass_through_ring<Plan::kStages>(dynamic_shared<char>(), Plan::kSlotBytes, steps, load, multiply);
}

// Grid: tiles of rows times panels of columns. kAlong: b's elements along the depth are adjacent, else those of a row.
template <class T, int kRows, bool kAlong>
__global__ void __launch_bounds__(kGroupedThreads) grouped_product(const GroupedArgs args) {
  const int panels = (args.columns + kGroupedColumns - 1) / kGroupedColumns;
  const TileNumber number(static_cast<int>(blockIdx.x), args.tiles, panels);
  const RowTile own = find_tile<kRows>(args.offsets, number.rows);
  const int groups = args.offsets.groups;
  if (own.group > groups) return;
  const int first_column = number.columns * kGroupedColumns;
  typename WarpPart<kRows>::Sums c = {};
  if (own.group < groups) multiply_tiles<T, kRows, kAlong>(c, args, own, first_column);

  stage<kRows>(c);
  const int column = first_column + stored_column(), left = args.columns - column;
  if (left <= 0) return;
  const bool whole = args.columns % kStoredColumns == 0;
  float bias[kStoredColumns];
  const bool biased = args.bias && own.group < groups;
  const int64_t bias_bytes = own.group * args.bias_group * static_cast<int64_t>(args.wide_bias ? 4 : sizeof(T));
  load_of_columns<T>(
      biased ? static_cast<const char*>(args.bias) + bias_bytes : nullptr, args.wide_bias, column, args.columns, 0.f,
      bias);
  for_each_staged_row(min(kRows, own.end - own.first), [&](int row, float (&numbers)[kStoredColumns]) {
    const int target = args.target.of(own.first + row);
    if (target == RowIndex::kNowhere) return;
#pragma unroll
    for (int i = 0; i < kStoredColumns; ++i) numbers[i] += bias[i];
    const int64_t at = int64_t{target} * args.columns + column;
    if (args.out_type == DType::f32) store_numbers(static_cast<float*>(args.out) + at, numbers, left, whole);
    else if (args.out_type == DType::f16) store_numbers(static_cast<__half*>(args.out) + at, numbers, left, whole);
    else store_numbers(static_cast<__nv_bfloat16*>(args.out) + at, numbers, left, whole);
  });
}

// The gradient of the groups' matrices.

struct GroupedGradientArgs {
  const void* a;  // rows of `inner` elements
  int a_row_bytes;
  RowIndex a_rows;
  const void* grad;  // rows of `columns` elements; both 16-byte aligned
  int grad_row_bytes;
  RowIndex grad_rows;
  GroupOffsets offsets;
  int inner, columns;
  void* out;  // (groups, inner, columns), contiguous, of the operands' type
};

// Begins to copy tiles of 32 of a group's rows, after each other, 128 columns wide. Which rows they are is read a tile
// ahead; each lane finds one for all of its warp.
template <class T>
class FollowingRows {
  static constexpr int kRows = kWarp;

 public:
  static constexpr int kBytes = kRows * kGroupedColumns * static_cast<int>(sizeof(T));

  __device__ __forceinline__ FollowingRows(
      const void* matrix, int row_bytes, const RowIndex& index, const GroupRows& group, int column, int columns)
      : from_(reinterpret_cast<const char*>(static_cast<const T*>(matrix) + column + own_.col)),
        row_bytes_(row_bytes),
        index_(index),
        row_(group.first + lane_id()),
        end_(group.end),
        filled_(max(min((columns - column - own_.col) * static_cast<int>(sizeof(T)), 16), 0)) {
    find();
  }

  __device__ __forceinline__ void load(char* slot) {
    T* const tile = reinterpret_cast<T*>(slot);
#pragma unroll
    for (int step = 0; step < kRows; step += Chunks::kStep) {
      const int source = __shfl_sync(kFullWarp, source_, own_.row + step);
      const bool there = source != RowIndex::kNowhere;
      const int64_t offset = int64_t{there ? source : 0} * row_bytes_;
      cp_async<16>(tile + own_.at(step), from_ + offset, there ? filled_ : 0);
    }
    row_ += kRows;
    find();
  }

 private:
  using Chunks = TileChunks<T, kRows, kGroupedColumns, kGroupedThreads>;

  __device__ __forceinline__ void find() { source_ = row_ < end_ ? index_.of(row_) : RowIndex::kNowhere; }

  Chunks own_;
  const char* from_;
  int row_bytes_;
  const RowIndex& index_;
  int row_, end_, filled_, source_;
};

// Steps of 32 rows: experts with few of them waste little, and two blocks fit a multiprocessor of sm_80.
template <class T>
struct MatrixGradientPlan {
  static constexpr int kRows = 128, kDepth = kWarp, kStages = 4;  // kRows of the result: of `inner`
  using Tiles = FollowingRows<T>;
  static constexpr int kSlotBytes = 2 * Tiles::kBytes, kRing = kStages * kSlotBytes, kStaged = staged_bytes(kRows);
  static constexpr int kSharedBytes = kRing > kStaged ? kRing : kStaged;
};

// Grid: groups times tiles of `inner` times panels of columns. An empty group's gradient is zeros.
template <class T>
__global__ void __launch_bounds__(kGroupedThreads) grouped_matrix_gradient(const GroupedGradientArgs args) {
  using Plan = MatrixGradientPlan<T>;
  using Part = WarpPart<Plan::kRows>;
  const int panels = (args.columns + kGroupedColumns - 1) / kGroupedColumns;
  const int tiles = (args.inner + Plan::kRows - 1) / Plan::kRows;
  const int block = static_cast<int>(blockIdx.x), group = block / (tiles * panels), in_group = block % (tiles * panels);
  const int first_row = in_group / panels * Plan::kRows, first_column = in_group % panels * kGroupedColumns;
  const GroupRows rows = rows_of_group(args.offsets, group);
  typename Plan::Tiles a(args.a, args.a_row_bytes, args.a_rows, rows, first_row, args.inner);
  typename Plan::Tiles grad(args.grad, args.grad_row_bytes, args.grad_rows, rows, first_column, args.columns);

  const Part part;
  const TileReader<T, kGroupedColumns> reader;
  typename Part::Sums c = {};
  const auto load = [&](char* slot) {
    a.load(slot);
    grad.load(slot + Plan::Tiles::kBytes);
  };
  const auto multiply = [&](const char* slot, int) {
    const T* const left = reinterpret_cast<const T*>(slot);
    const T* const right = reinterpret_cast<const T*>(slot + Plan::Tiles::kBytes);
#pragma unroll
    for (int depth = 0; depth < Plan::kDepth; depth += 16) {
      FragmentA<T> of_rows[Part::kM];
#pragma unroll
      for (int m = 0; m < Part::kM; ++m) reader.load_a_trans(of_rows[m], left, depth, part.row + 16 * m);
      multiply_columns_at(c, of_rows, reader, right, depth, part.column);
    }
  };
  const int steps = (rows.end - rows.first + Plan::kDepth - 1) / Plan::kDepth;
  pass_through_ring<Plan::kStages>(dynamic_shared<char>(), Plan::kSlotBytes, steps, load, multiply);

  stage<Plan::kRows>(c);
  const int column = first_column + stored_column(), left = args.columns - column;
  if (left <= 0) return;
  const bool whole = args.columns % kStoredColumns == 0;
  for_each_staged_row(min(Plan::kRows, args.inner - first_row), [&](int row, const float (&numbers)[kStoredColumns]) {
    const int64_t at = (int64_t{group} * args.inner + first_row + row) * args.columns + column;
    store_numbers(static_cast<T*>(args.out) + at, numbers, left, whole);
  });
}

}  // namespace pykern
