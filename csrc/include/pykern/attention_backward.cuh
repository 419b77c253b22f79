// The gradients of softmax attention on tensor cores (mma.sync, sm_80 and later), without atomics, in three kernels:
//
//   statistics    of each query: its log-sum-exp in base 2, and rowsum(dout ∘ out) - dlse
//   dkey, dvalue  a block owns a tile of keys of one key head and visits the queries that see them, of all heads that
//                 share the keys
//   dquery        a block owns a tile of queries and visits the keys that they see
//
// The last two are one kernel in which the sides change places. A block owns rows of two tensors, X and Y, and visits
// rows of two others: of (key, value) and (query, dout), or the reverse. From the keys' side that is, transposed,
//
//   P = weights(owned X · visited X')                      d(owned Y) += P · visited Y, of keys alone
//   dS = P ∘ (owned Y · visited Y' - statistic)            d(owned X) += dS · visited X
//
// A warp holds whole rows of what its block owns, so the accumulators of the products on the left are in registers the
// first operands of those on the right (to_a of mma.cuh): weights never pass through shared memory. Computing P and dS
// on both sides takes 7 products where 5 would do, but every gradient is summed by one block in one order.

#pragma once

#include "attention_tile.cuh"

#include "reduce.cuh"

namespace pykern {

struct AttentionGradientArgs {
  Band band;
  Heads query, key, value, dout;  // dout without data is zero
  Heads dquery, dkey, dvalue;     // without data: not wanted
  const float2* statistics;       // (batch, heads, queries): of each query the two numbers named above
  int heads, key_heads;
  int size, value_size;
  float scale;          // of the scores, and so of dquery and dkey
  float to_exponent;    // from product to score in base 2; with a softcap from product to the argument of tanh
  float softcap;        // in base 2
};

// What one launch computes.
enum class Gradient { query, key, value, key_and_value };

// How a block is cut: it has a warp for each `rows` of the tile that it owns, and the warp computes weights for
// `columns` of the visited tile at a time.
struct GradientTile {
  int owned, visited, rows, columns;
  bool holds = false;  // in registers what a warp owns, rather than read it again for each visited tile
};

// What binds is the bandwidth of shared memory: an operand that was loaded should serve many products, so a warp holds
// as many accumulators as registers allow. For heads of 64 elements these are 32 rows of both gradients, for 128 they
// are 16 rows, and for 256 16 rows of one gradient: there dkey and dvalue are launches of their own. The one gradient
// of queries leaves room, at 128, for the rows themselves, on which a quarter of all reads would be spent.
// Tiles are what fits with two stages of visited ones: 64 KiB for 64 elements, so that sm_80 holds two blocks, else
// 96 KiB, which a block can have on every GPU since sm_80.
__host__ __device__ constexpr GradientTile gradient_tile(int size, Gradient of) {
  if (size == 64) return {128, 64, 32, 32};
  if (size == 128) return {128, 32, 16, 32, of == Gradient::query};
  return of == Gradient::value ? GradientTile{64, 32, 16, 32} : GradientTile{64, 16, 16, 16};
}

// A launch's constants: dvalue alone needs no owned Y, and only keys have a gradient of it.
template <int kHeadSize, Gradient kOf>
struct GradientPlan {
  static constexpr int kSize = kHeadSize;
  static constexpr GradientTile kTile = gradient_tile(kSize, kOf);
  static constexpr int kThreads = kTile.owned / kTile.rows * kWarp;
  static constexpr int kTall = kTile.rows / 16, kWide = kTile.columns / 8;  // fragments of a warp's weights
  static constexpr bool kKeys = kOf != Gradient::query, kBoth = kOf == Gradient::key_and_value;
  static constexpr bool kOfX = kOf != Gradient::value, kOfY = kOf == Gradient::value || kBoth;
  // Of shared memory, in elements: owned X, owned Y, two stages of visited X, of visited Y, and of statistics.
  static constexpr int kOwned = kTile.owned * kSize, kVisited = kTile.visited * kSize;
  static constexpr int kOwnedY = kOfX ? kOwned : 0, kVisitedX = kOwnedY + kOwned, kVisitedY = kVisitedX + 2 * kVisited;
  static constexpr int kStatistics = kVisitedY + 2 * kVisited;
  static constexpr int kSharedBytes =
      2 * kStatistics + (kKeys ? 2 * kTile.visited * static_cast<int>(sizeof(float2)) : 0);
};

// The exponent of a weight but for the log-sum-exp, of a product; and the derivative of the softcap.
template <bool kSoftcap>
__device__ __forceinline__ float exponent(float product, const AttentionGradientArgs& args, float& derivative) {
  if constexpr (!kSoftcap) return product * args.to_exponent;
  const float capped = tanh_fast(product * args.to_exponent);
  derivative = fmaf(-capped, capped, 1.f);
  return capped * args.softcap;
}

constexpr int kStatisticsThreads = 256;
constexpr int kStatisticsLanes = 8;  // that share a row: 128 bytes a step
constexpr int kStatisticsRows = kStatisticsThreads / kStatisticsLanes;
// rowsum(dout ∘ out) is rowsum(P ∘ dP), but for the rounding of out to 16 bits. The more keys a query sees, the smaller
// is out beside the values, and the less that matters; for one that sees at most so many, the latter is computed. In a
// causal call these are the first few queries.
constexpr int kFewKeys = 16;

struct AttentionStatisticsArgs {
  AttentionGradientArgs call;  // but for its statistics
  Heads out;
  const float* dlse;  // (batch, heads, queries), as is lse; or null
  const float* lse;
  float2* statistics;
  int64_t rows;
};

// One lane's share of the product of two rows.
template <class T>
__device__ __forceinline__ float share_of_product(const T* a, const T* b, int size, int lane) {
  float sum = 0;
  for (int col = 8 * lane; col < size; col += 8 * kStatisticsLanes) {
    float of_a[8], of_b[8];
    load_floats(a + col, of_a);
    load_floats(b + col, of_b);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(of_a[i], of_b[i], sum);
  }
  return sum;
}

// The two numbers of `query`, which sees what `band` says, by the lanes of one row. `query_row` and `key_row` say where
// a query's row and that of a key it sees are in tensors; `row` is the query's place among the statistics.
template <class T, class QueryRow, class KeyRow>
__device__ __forceinline__ void reduce_statistics(
    const AttentionStatisticsArgs& args, bool exists, const Band& band, int query, int64_t row,
    const QueryRow& query_row, const KeyRow& key_row) {
  const AttentionGradientArgs& call = args.call;
  const int lane = static_cast<int>(threadIdx.x) % kStatisticsLanes;

  // A query that sees nothing has a log-sum-exp of -inf, and all scores are: with +inf its weights are zeros.
  float lse = exists ? args.lse[row] * kLog2e : 0.f, sum[1] = {};
  if (lse == -kInfinity) lse = kInfinity;
  const Range seen = band.keys_of(query);
  const int keys = exists && call.dout.data ? seen.end - seen.first : 0;
  if (keys > kFewKeys) sum[0] = share_of_product(query_row(call.dout), query_row(args.out), call.value_size, lane);
  const int few = keys > kFewKeys ? 0 : keys;
  for (int k = 0; __any_sync(kFullWarp, k < few); ++k) {
    float products[2] = {};
    if (k < few) {
      const int key = seen.first + k;
      products[0] = share_of_product(query_row(call.query), key_row(call.key, key), call.size, lane);
      products[1] = share_of_product(query_row(call.dout), key_row(call.value, key), call.value_size, lane);
    }
    sum_over_lanes(products, kStatisticsLanes);
    float derivative;
    const float score = call.softcap > 0 ? exponent<true>(products[0], call, derivative)
                                         : exponent<false>(products[0], call, derivative);
    if (k < few && lane == 0) sum[0] = fmaf(exp2_approx(score - lse), products[1], sum[0]);
  }
  sum_over_lanes(sum, kStatisticsLanes);
  if (!exists || lane > 0) return;
  const float dlse = args.dlse ? args.dlse[row] : 0.f;
  args.statistics[row] = make_float2(lse, lse == kInfinity ? 0.f : sum[0] - dlse);
}

template <class T>
__global__ void __launch_bounds__(kStatisticsThreads) attention_statistics(AttentionStatisticsArgs args) {
  const AttentionGradientArgs& call = args.call;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * kStatisticsRows + static_cast<int>(threadIdx.x) / kStatisticsLanes;
  const int64_t batch_head = row / call.band.queries, batch = batch_head / call.heads;
  const int query = static_cast<int>(row % call.band.queries), head = static_cast<int>(batch_head % call.heads);
  const int key_head = head / (call.heads / call.key_heads);
  const auto row_of = [&](const Heads& heads, int own_head, int own_row) {
    return static_cast<const T*>(heads.data) + batch * heads.batch + own_head * heads.head + own_row * heads.row;
  };
  reduce_statistics<T>(
      args, row < args.rows, call.band, query, row, [&](const Heads& heads) { return row_of(heads, head, query); },
      [&](const Heads& heads, int key) { return row_of(heads, key_head, key); });
}

// A block's tile of what it owns. Tiles of one head are neighbours, so that they find in L2 what they visit; those that
// see the most come first.
template <class Plan>
struct GradientPlace {
  int batch, head, first;  // the tile's first row

  __device__ __forceinline__ GradientPlace(const AttentionGradientArgs& args, int tiles) {
    const int index = opaque(static_cast<int>(blockIdx.x)), heads = Plan::kKeys ? args.key_heads : args.heads;
    batch = index / tiles / heads;
    head = index / tiles % heads;
    first = (Plan::kKeys ? index % tiles : tiles - 1 - index % tiles) * Plan::kTile.owned;
  }
};

// What a block owns and what it visits, in a band.
template <class Plan>
struct GradientBlock : GradientPlace<Plan> {
  int rows;          // that are owned by all blocks of the head
  int visited_head;  // the first
  int visited_heads;
  int visited_rows;  // of a head
  Range seen;        // of these

  __device__ __forceinline__ GradientBlock(
      const AttentionGradientArgs& args, const GradientPlace<Plan>& place, const Band& band)
      : GradientPlace<Plan>(place) {
    constexpr bool kKeys = Plan::kKeys;
    const int group = args.heads / args.key_heads;
    const Range owned = {place.first, place.first + Plan::kTile.owned};
    rows = kKeys ? band.keys : band.queries;
    visited_head = kKeys ? place.head * group : place.head / group;
    visited_heads = kKeys ? group : 1;
    visited_rows = kKeys ? band.queries : band.keys;
    seen = kKeys ? band.queries_of(owned) : band.keys_of(owned);
  }
};

// Where that is in dense tensors. attention_varlen_backward.cuh has the same of packed ones.
template <class Plan>
struct DenseGradient : GradientBlock<Plan> {
  using Args = AttentionGradientArgs;
  const Args& args;

  __device__ __forceinline__ explicit DenseGradient(const Args& a)
      : GradientBlock<Plan>(a, GradientPlace<Plan>(a, tiles(Plan::kKeys ? a.band.keys : a.band.queries)), a.band),
        args(a) {}

  static __device__ __forceinline__ int tiles(int rows) { return (rows + Plan::kTile.owned - 1) / Plan::kTile.owned; }

  // The same, said anew: what is only needed before and after the loop need not wait in registers.
  __device__ __forceinline__ const DenseGradient& again() const { return *this; }

  __device__ __forceinline__ const Band& band() const { return args.band; }
  template <class T>
  __device__ __forceinline__ HeadRows<T> owned(const Heads& heads, int size) const {
    return rows_of_head<T>(heads, this->batch, this->head, this->rows, size);
  }
  template <class T>
  __device__ __forceinline__ HeadRows<T> visited(const Heads& heads, int head, int size) const {
    return rows_of_head<T>(heads, this->batch, head, this->visited_rows, size);
  }
  // Of a head's first query.
  __device__ __forceinline__ const float2* statistics(int head) const {
    return args.statistics + (static_cast<int64_t>(this->batch) * args.heads + head) * args.band.queries;
  }
};

// The tiles that a block visits, one after another: while one is read, the next is copied to the other stage.
template <class T, class Plan, class Block>
class VisitedTiles {
 public:
  // Begins to copy the first.
  __device__ __forceinline__ VisitedTiles(T* shared, const Block& block)
      : shared_(shared), block_(block), head_(block.visited_head), next_row_(block.seen.first) {
    const int tiles = max(block.seen.end - block.seen.first + Plan::kTile.visited - 1, 0) / Plan::kTile.visited;
    left_ = tiles * block.visited_heads;
    if (left_ > 0) copy();
  }

  // Goes to the next one, if there is one: waits until all that was copied is there, the block's own tiles included.
  // After the barrier nobody reads the stage any more to which the one after it is copied.
  __device__ __forceinline__ bool next() {
    cp_async_wait_all();
    __syncthreads();
    if (left_ == 0) return false;
    row_ = next_row_;
    next_row_ += Plan::kTile.visited;
    if (next_row_ >= block_.seen.end) next_row_ = block_.seen.first, ++head_;
    stage_ = Plan::kTile.visited - stage_;
    if (--left_ > 0) copy();
    return true;
  }

  __device__ __forceinline__ int row() const { return row_; }  // its first
  __device__ __forceinline__ const T* x(int row) const {
    return shared_ + Plan::kVisitedX + (other_stage() + row) * Plan::kSize;
  }
  __device__ __forceinline__ const T* y(int row) const {
    return shared_ + Plan::kVisitedY + (other_stage() + row) * Plan::kSize;
  }
  __device__ __forceinline__ float2 statistic(int row) const { return statistics()[other_stage() + row]; }

 private:
  __device__ __forceinline__ int other_stage() const { return Plan::kTile.visited - stage_; }
  __device__ __forceinline__ float2* statistics() const {
    return reinterpret_cast<float2*>(shared_ + Plan::kStatistics);
  }

  __device__ __forceinline__ void copy() {
    const AttentionGradientArgs& args = block_.args;
    const Heads& x = Plan::kKeys ? args.query : args.key;
    const Heads& y = Plan::kKeys ? args.dout : args.value;
    load_rows<Plan::kTile.visited, Plan::kSize, Plan::kThreads>(
        shared_ + Plan::kVisitedX + stage_ * Plan::kSize, block_.template visited<T>(x, head_, args.size), next_row_);
    if (args.dout.data)
      load_rows<Plan::kTile.visited, Plan::kSize, Plan::kThreads>(
          shared_ + Plan::kVisitedY + stage_ * Plan::kSize, block_.template visited<T>(y, head_, args.value_size),
          next_row_);
    if (const int own = static_cast<int>(threadIdx.x); Plan::kKeys && own < Plan::kTile.visited) {
      const bool exists = next_row_ + own < block_.visited_rows;
      const float2* const from = exists ? block_.statistics(head_) + next_row_ + own : args.statistics;
      cp_async<8>(statistics() + stage_ + own, from, exists ? 8 : 0);
    }
    cp_async_commit();
  }

  T* shared_;
  const Block& block_;
  int head_, next_row_;  // what is copied next
  int row_ = 0, stage_ = 0, left_;  // the stage that is written next, in rows
};

// A warp's rows of an owned tile, the first operands of products with visited rows.
template <class T, class Plan>
class OwnRows {
 public:
  using Reader = TileReader<T, Plan::kSize>;

  __device__ __forceinline__ OwnRows(const Reader& reader, const T* tile) : reader_(reader), tile_(tile) {}

  // Once the tile is there.
  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int k = 0; k < kDeep; ++k)
#pragma unroll
      for (int i = 0; i < Plan::kTall; ++i) reader_.load_a(held_[k][i], tile_, 16 * i, 16 * k);
  }

  // products += own rows · visited rows'.
  __device__ __forceinline__ void multiply(
      FragmentC<float> (&products)[Plan::kTall][Plan::kWide], const T* visited) const {
    if constexpr (Plan::kTile.holds) {
#pragma unroll
      for (int k = 0; k < kDeep; ++k) multiply_rows_at(products, held_[k], reader_, visited, 0, 16 * k);
    } else {
      multiply_rows<Plan::kSize>(products, reader_, tile_, 0, visited, 0);
    }
  }

 private:
  static constexpr int kDeep = Plan::kTile.holds ? Plan::kSize / 16 : 1;
  const Reader& reader_;
  const T* tile_;
  FragmentA<T> held_[kDeep][Plan::kTall];
};

template <class Plan, class Change>
__device__ __forceinline__ void for_each_weight(const Change& change) {
#pragma unroll
  for (int i = 0; i < Plan::kTall; ++i)
#pragma unroll
    for (int j = 0; j < Plan::kWide; ++j)
#pragma unroll
      for (int e = 0; e < LayoutC::kElements; ++e) change(i, j, e);
}

enum class Sight { none, some, all };

// How many of the visited columns an owned row sees.
template <bool kKeys>
__device__ __forceinline__ Sight sight(const Band& band, Range rows, Range columns) {
  const Range seen = kKeys ? band.queries_of(rows) : band.keys_of(rows);
  if (seen.end <= columns.first || columns.end <= seen.first) return Sight::none;
  const bool all =
      kKeys ? columns.end <= band.queries && band.allows_all(columns, rows) : band.allows_all(rows, columns);
  return all ? Sight::all : Sight::some;
}

// Zeros where a row does not see a column.
template <bool kKeys, int kTall, int kWide>
__device__ __forceinline__ void clear_unseen(
    FragmentC<float> (&c)[kTall][kWide], const Band& band, int first_row, int first_column) {
#pragma unroll
  for (int i = 0; i < kTall; ++i)
#pragma unroll
    for (int e = 0; e < LayoutC::kElements; ++e) {
      const int row = first_row + 16 * i + LayoutC::row(lane_id(), e);
      const Range seen = kKeys ? band.queries_of(row) : band.keys_of(row);
      const int column = first_column + LayoutC::col(lane_id(), e);
#pragma unroll
      for (int j = 0; j < kWide; ++j)
        if (column + 8 * j < seen.first || column + 8 * j >= seen.end) c[i][j].x[e] = 0.f;
    }
}

// Weights, rounded, as the first operands of products with 16 rows each.
template <class T, int kTall, int kDeep>
using Operands = FragmentA<T>[kDeep][kTall];

template <class T, int kTall, int kWide>
__device__ __forceinline__ void to_operands(
    Operands<T, kTall, kWide / 2>& operands, const FragmentC<float> (&c)[kTall][kWide]) {
#pragma unroll
  for (int k = 0; k < kWide / 2; ++k)
#pragma unroll
    for (int i = 0; i < kTall; ++i) operands[k][i] = to_a<T>(c[i][2 * k], c[i][2 * k + 1]);
}

// sums += weights · rows of a tile.
template <int kTall, int kDeep, int kColumns, class T, int kSize>
__device__ __forceinline__ void accumulate(
    FragmentC<float> (&sums)[kTall][kColumns], const Operands<T, kTall, kDeep>& operands,
    const TileReader<T, kSize>& reader, const T* rows) {
#pragma unroll
  for (int k = 0; k < kDeep; ++k) multiply_columns_at(sums, operands[k], reader, rows, 16 * k);
}

template <class T, class Plan, bool kSoftcap, class Block>
__device__ __forceinline__ void sum_gradients(const Block& block) {
  const AttentionGradientArgs& args = block.args;
  const Band& band = block.band();
  constexpr GradientTile kTile = Plan::kTile;
  constexpr int kSize = Plan::kSize, kTall = Plan::kTall, kWide = Plan::kWide;
  constexpr bool kKeys = Plan::kKeys;
  const bool wants_x = Plan::kOfX && (!Plan::kBoth || args.dkey.data);
  const bool wants_y = Plan::kOfY && (!Plan::kBoth || args.dvalue.data);
  const bool has_dout = args.dout.data;

  T* const owned_x = dynamic_shared<T>();
  T* const owned_y = owned_x + Plan::kOwnedY;
  const auto owned = [&](const Heads& heads, int size) { return block.template owned<T>(heads, size); };
  load_rows<kTile.owned, kSize, Plan::kThreads>(owned_x, owned(kKeys ? args.key : args.query, args.size), block.first);
  if (Plan::kOfX && has_dout)
    load_rows<kTile.owned, kSize, Plan::kThreads>(
        owned_y, owned(kKeys ? args.value : args.dout, args.value_size), block.first);
  VisitedTiles<T, Plan, Block> visited(owned_x, block);

  const int lane = lane_id(), warp_row = static_cast<int>(threadIdx.x) / kWarp * kTile.rows;
  const Range rows = {block.first + warp_row, min(block.first + warp_row + kTile.rows, block.rows)};
  float2 own_statistics[kTall][2];  // of queries that are owned; of visited ones they are beside their tiles
  if constexpr (!kKeys) {
    const float2* const from = block.statistics(block.head);
#pragma unroll
    for (int i = 0; i < kTall; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = rows.first + 16 * i + LayoutC::row(lane, 2 * half);
        own_statistics[i][half] = row < rows.end ? from[row] : make_float2(0.f, 0.f);
      }
  }

  const TileReader<T, kSize> reader;
  OwnRows<T, Plan> own_x(reader, owned_x + warp_row * kSize), own_y(reader, owned_y + warp_row * kSize);
  if constexpr (kTile.holds) {
    cp_async_wait_all();
    __syncthreads();
    own_x.hold();
    if (has_dout) own_y.hold();
  }
  FragmentC<float> of_x[kTall][Plan::kOfX ? kSize / 8 : 1] = {}, of_y[kTall][Plan::kOfY ? kSize / 8 : 1] = {};
  while (visited.next()) {
#pragma unroll 1
    for (int column = 0; column < kTile.visited; column += kTile.columns) {
      const Range columns = {visited.row() + column, visited.row() + column + kTile.columns};
      const Sight seen = sight<kKeys>(band, rows, columns);
      if (seen == Sight::none) continue;
      const T* const x = visited.x(column);
      const T* const y = visited.y(column);
      const auto statistic = [&](int i, int j, int e) {
        if constexpr (kKeys) return visited.statistic(column + 8 * j + LayoutC::col(lane, e));
        else return own_statistics[i][e / 2];
      };

      FragmentC<float> p[kTall][kWide] = {}, dp[kTall][kWide];
      own_x.multiply(p, x);
      auto& derivative = dp;  // of the softcap, until dP is computed
      for_each_weight<Plan>([&](int i, int j, int e) {
        const float score = exponent<kSoftcap>(p[i][j].x[e], args, derivative[i][j].x[e]);
        p[i][j].x[e] = exp2_approx(score - statistic(i, j, e).x);
      });
      if (seen == Sight::some) clear_unseen<kKeys>(p, band, rows.first, columns.first);
      Operands<T, kTall, kWide / 2> operands;
      to_operands<T>(operands, p);
      for_each_weight<Plan>([&](int i, int j, int e) {
        if constexpr (kSoftcap) p[i][j].x[e] *= derivative[i][j].x[e];
        dp[i][j].x[e] = 0.f;
      });
      if constexpr (Plan::kOfY) {
        if (wants_y) accumulate(of_y, operands, reader, y);
      }
      if constexpr (Plan::kOfX) {
        if (!wants_x) continue;
        if (has_dout) own_y.multiply(dp, y);
        for_each_weight<Plan>([&](int i, int j, int e) { p[i][j].x[e] *= dp[i][j].x[e] - statistic(i, j, e).y; });
        // Zeros again, should dP not be finite.
        if (seen == Sight::some) clear_unseen<kKeys>(p, band, rows.first, columns.first);
        to_operands<T>(operands, p);
        accumulate(of_x, operands, reader, x);
      }
    }
  }

  // Nobody reads the owned tiles any more. They become those of the gradients.
  const auto round = [&](const auto& sums, T* tile, float factor) {
#pragma unroll
    for (int i = 0; i < kTall; ++i)
#pragma unroll
      for (int j = 0; j < kSize / 8; ++j) {
        FragmentC<float> scaled = sums[i][j];
#pragma unroll
        for (float& element : scaled.x) element *= factor;
        store_fragment<kSize>(tile, scaled, warp_row + 16 * i, 8 * j);
      }
  };
  if constexpr (Plan::kOfX) {
    if (wants_x) round(of_x, owned_x, args.scale);
  }
  if constexpr (Plan::kOfY) {
    if (wants_y) round(of_y, owned_y, 1.f);
  }
  __syncthreads();
  const Block& to = block.again();
  if (wants_x)
    store_rows<kTile.owned, kSize, Plan::kThreads>(
        to.template owned<T>(kKeys ? args.dkey : args.dquery, args.size), owned_x, to.first);
  if (wants_y)
    store_rows<kTile.owned, kSize, Plan::kThreads>(
        to.template owned<T>(args.dvalue, args.value_size), owned_y, to.first);
}

template <class T, int kSize, Gradient kOf, bool kSoftcap>
__global__ void __launch_bounds__(GradientPlan<kSize, kOf>::kThreads)
    attention_gradients(const AttentionGradientArgs args) {
  using Plan = GradientPlan<kSize, kOf>;
  const DenseGradient<Plan> block(args);
  sum_gradients<T, Plan, kSoftcap>(block);
}

}  // namespace pykern
