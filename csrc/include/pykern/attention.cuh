// Softmax attention, forward, on tensor cores with mma.sync (sm_80 and later), fp16 and bf16; attention_backward.cuh
// has the gradients.
//
//   out = softmax(scale · query key' + band) value, lse = log Σ exp(score)
//
// A block of threads owns a tile of queries of one head and passes once over the keys that these may see, a block of
// keys at a time: no score is ever in memory, and K and V are read once for each tile of queries (Dao,
// arXiv:2307.08691). A warp owns whole rows: their scores, maximum, sum and output stay in its registers, and the
// weights become operands of the second product where they are. K and V pass in turn through a ring of slots in shared
// memory, filled by cp.async while earlier ones are used. Key blocks outside the band are not visited, warps skip those
// that only others need, and only what the band cuts is masked. Exponentials are of base 2, with log2 e folded into the
// scale.

#pragma once

#include "attention_tile.cuh"

namespace pykern {

struct AttentionForwardArgs {
  Heads query, key, value, out;
  float* lse;  // (batch, heads, queries)
  Band band;
  int heads, group;  // query heads, and how many share a key head
  int size, value_size;
  int all_heads;  // of all batch entries
  // A product of rows becomes a score by `inner`, the softcap's tanh if there is one, and `outer`, which is positive
  // and ends in units of log2; `natural` brings these to those of lse. Without softcap `inner` is 1 or -1.
  float inner, outer, natural;
  const float* slopes;  // ALiBi's, one for each head of all batch entries or one for each head; or null
  bool slopes_of_batch;
  const float* sinks;  // (heads,), or null
};

// How a call is cut, by padded head size. A warp with 32 rows reads each fragment of K and V once for two products;
// with 16 rows shared memory, not the tensor cores, would set the pace. At 256 the output of 32 rows alone would fill
// the registers. 64 keys are 64 registers of scores; more would spill. Queries are held in registers where these
// suffice, else read from shared memory in each turn. Shared memory stays below 99 KiB (sm_86, sm_89) and, up to 128,
// below half of sm_80's 164 KiB: two blocks a multiprocessor, as registers allow.
struct ForwardTile {
  int queries, keys;
  int warps;
  int slots;  // of K or V, the one in use included
  bool holds_query;

  __host__ __device__ constexpr int threads() const { return warps * kWarp; }
  __host__ __device__ constexpr int shared_bytes(int size) const { return 2 * size * (queries + slots * keys); }
};

__host__ __device__ constexpr ForwardTile forward_tile(int size) {
  if (size <= 64) return {.queries = 128, .keys = 64, .warps = 4, .slots = 3, .holds_query = true};
  if (size <= 128) return {.queries = 128, .keys = 64, .warps = 4, .slots = 3, .holds_query = false};
  return {.queries = 128, .keys = 32, .warps = 8, .slots = 2, .holds_query = false};
}

// What a block works on: a tile of the queries of a head. Causal tiles take the longer the later their queries are, so
// the last come first and short ones fill the gaps; but no more heads at a time than the cache holds K and V of.
// Grid: (heads at a time, tiles, times).
struct ForwardPlace {
  int of_all_heads, batch, head;

  __device__ __forceinline__ explicit ForwardPlace(const AttentionForwardArgs& a)
      : of_all_heads(opaque(static_cast<int>(blockIdx.z * gridDim.x + blockIdx.x))),
        batch(of_all_heads / a.heads),
        head(of_all_heads % a.heads) {}
};

// Where that is in dense tensors. attention_varlen.cuh has the same of packed ones.
struct DenseForward : ForwardPlace {
  using Args = AttentionForwardArgs;
  const Args& a;

  __device__ __forceinline__ explicit DenseForward(const Args& args) : ForwardPlace(args), a(args) {}

  __device__ __forceinline__ const Band& band() const { return a.band; }
  template <class T>
  __device__ __forceinline__ HeadRows<T> query() const {
    return rows_of_head<T>(a.query, batch, head, a.band.queries, a.size);
  }
  template <class T>
  __device__ __forceinline__ HeadRows<T> key() const {
    return rows_of_head<T>(a.key, batch, head / a.group, a.band.keys, a.size);
  }
  template <class T>
  __device__ __forceinline__ HeadRows<T> value() const {
    return rows_of_head<T>(a.value, batch, head / a.group, a.band.keys, a.value_size);
  }
  template <class T>
  __device__ __forceinline__ HeadRows<T> out() const {
    return rows_of_head<T>(a.out, batch, head, a.band.queries, a.value_size);
  }
  __device__ __forceinline__ float* lse() const {
    return a.lse + static_cast<int64_t>(of_all_heads) * a.band.queries;
  }
};

__device__ __forceinline__ int forward_first_row(ForwardTile tile) {
  return static_cast<int>(gridDim.y - 1 - blockIdx.y) * tile.queries;
}

// A warp's first row in the tile.
__device__ __forceinline__ int forward_warp_row(ForwardTile tile) {
  return opaque(static_cast<int>(threadIdx.x)) / kWarp * (tile.queries / tile.warps);
}

// K and V, blocks of kTile.keys rows in turn: K of the first block, V of the first, K of the second, …
template <class T, int kSize, ForwardTile kTile, class Rows>
class KeyValueRing {
 public:
  __device__ __forceinline__ KeyValueRing(T* slots, const Rows& keys, const Rows& values, int first_key)
      : slots_(slots), keys_(keys, first_key), values_(values, first_key) {}

  // Begins as many copies as there may be under way; there is a first block.
  __device__ __forceinline__ void begin() {
    load<false>(true, 0);
    if constexpr (kSlots > 2) load<true>(true, 1);
    static_assert(kSlots == 2 || kSlots == 3);
  }

  // The next tile, of V if kValues, and whether another block comes after this one. All threads come here between their
  // last use of the tile before and their first of this one; the slot of the tile before is filled again.
  template <bool kValues>
  __device__ __forceinline__ const T* next(bool another) {
    cp_async_wait<kSlots - 2>();
    __syncthreads();
    const int slot = kSlots == 2 ? kValues : slot_;
    slot_ = slot + 1 == kSlots ? 0 : slot + 1;
    constexpr bool kLoadsValues = kValues == (kSlots % 2 == 1), kOfThisBlock = kSlots == 2 && kLoadsValues;
    load<kLoadsValues>(kOfThisBlock || another, slot == 0 ? kSlots - 1 : slot - 1);
    return slots_ + slot * kSlotSize;
  }

 private:
  static constexpr int kSlots = kTile.slots, kSlotSize = kTile.keys * kSize;
  using Loader = TileLoader<Rows, kTile.keys, kSize, kTile.threads()>;

  // A group is committed even where there is nothing left, so that waits count right.
  template <bool kValues>
  __device__ __forceinline__ void load(bool there, int slot) {
    if (there) (kValues ? values_ : keys_).load(slots_ + slot * kSlotSize);
    cp_async_commit();
  }

  T* slots_;
  Loader keys_, values_;
  int slot_ = 0;
};

// The softmax of rows whose scores come a block of keys at a time. A lane has two rows of each fragment.
template <int kM>
struct OnlineSoftmax {
  float top[kM][2];  // the largest score so far, times `outer`
  float sum[kM][2];  // of exponentials relative to it, this lane's share

  __device__ __forceinline__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kM; ++m) top[m][0] = top[m][1] = -kInfinity, sum[m][0] = sum[m][1] = 0;
  }

  // Scores become weights relative to the new maximum; what has been summed up before is brought to it.
  template <int kN, int kV>
  __device__ __forceinline__ void weigh(
      FragmentC<float> (&scores)[kM][kN], FragmentC<float> (&out)[kM][kV], float outer) {
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = -kInfinity;
#pragma unroll
        for (int n = 0; n < kN; ++n)
          highest = fmaxf(highest, fmaxf(scores[m][n].x[2 * half], scores[m][n].x[2 * half + 1]));
        highest = fmaxf(top[m][half], max_over_quad(highest) * outer);
        const float shift = highest == -kInfinity ? 0.f : highest;  // where nothing is allowed yet, weights are zero
        const float rescale = exp2_approx(top[m][half] - shift);
        top[m][half] = highest;
        float added = 0;
#pragma unroll
        for (int n = 0; n < kN; ++n)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            scores[m][n].x[e] = exp2_approx(fmaf(scores[m][n].x[e], outer, -shift));
            added += scores[m][n].x[e];
          }
        sum[m][half] = fmaf(sum[m][half], rescale, added);
#pragma unroll
        for (int v = 0; v < kV; ++v) {
          out[m][v].x[2 * half] *= rescale;
          out[m][v].x[2 * half + 1] *= rescale;
        }
      }
  }
};

template <int kM, int kN, class Change>
__device__ __forceinline__ void for_each(FragmentC<float> (&c)[kM][kN], const Change& change) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < LayoutC::kElements; ++e) c[m][n].x[e] = change(c[m][n].x[e]);
}

// Scores in units of log2 less ALiBi's slope times the distance.
template <int kM, int kN>
__device__ __forceinline__ void add_alibi(
    FragmentC<float> (&scores)[kM][kN], const AttentionForwardArgs& a, int position, int first_key) {
  const ForwardPlace place(a);
  const float slope = -kLog2e * a.slopes[a.slopes_of_batch ? place.of_all_heads : place.head];
  const int distance = position + lane_id() / 4 - first_key - lane_id() % 4 * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < LayoutC::kElements; ++e) {
        const int steps = abs(distance + 16 * m + 8 * (e / 2) - 8 * n - e % 2);
        scores[m][n].x[e] = fmaf(slope, static_cast<float>(steps), scores[m][n].x[e] * a.outer);
      }
}

// -inf for keys that a query does not see.
template <int kM, int kN>
__device__ __forceinline__ void mask(
    FragmentC<float> (&scores)[kM][kN], const Band& band, int first_row, int first_key) {
  const int row = first_row + lane_id() / 4, key = first_key + lane_id() % 4 * 2;
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range seen = band.keys_of(row + 16 * m + 8 * half);
#pragma unroll
      for (int n = 0; n < kN; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (key + 8 * n + e < seen.first || key + 8 * n + e >= seen.end) scores[m][n].x[2 * half + e] = -kInfinity;
    }
}

template <int kM, int kN>
__device__ __forceinline__ void add(FragmentC<float> (&sum)[kM][kN], const FragmentC<float> (&part)[kM][kN]) {
#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < LayoutC::kElements; ++e) sum[m][n].x[e] += part[m][n].x[e];
}

// A warp's rows of queries, from the block's tile on: in registers or, if kHeld is not, where they are.
template <class T, int kSize, int kM, bool kHeld>
class QueryRows {
 public:
  __device__ __forceinline__ explicit QueryRows(const T* rows) : rows_(rows) {}

  __device__ __forceinline__ void hold(const TileReader<T, kSize>& reader) {
#pragma unroll
    for (int depth = 0; depth < kSize; depth += 16)
#pragma unroll
      for (int m = 0; m < kM; ++m) reader.load_a(held_[depth / 16][m], rows_, 16 * m, depth);
  }

  template <int kN>
  __device__ __forceinline__ void multiply(
      FragmentC<float> (&scores)[kM][kN], const TileReader<T, kSize>& reader, const T* keys) const {
    if constexpr (kHeld) {
#pragma unroll
      for (int depth = 0; depth < kSize; depth += 16)
        multiply_rows_at(scores, held_[depth / 16], reader, keys, 0, depth);
    } else {
      // What fp32 loses grows with the length of a chain of sums: several are added up where registers allow.
      constexpr int kChain = kSize <= 128 ? kSize : 64;
      multiply_rows<kChain>(scores, reader, rows_, 0, keys, 0);
#pragma unroll
      for (int depth = kChain; depth < kSize; depth += kChain) {
        FragmentC<float> part[kM][kN] = {};
        multiply_rows<kChain>(part, reader, rows_ + depth, 0, keys + depth, 0);
        add(scores, part);
      }
    }
  }

 private:
  const T* rows_;
  FragmentA<T> held_[kHeld ? kSize / 16 : 1][kM];
};

// Divides by the sums and stores, through the warp's own rows of the tile of queries.
template <class T, int kSize, class Place, int kM>
__device__ __forceinline__ void store_output(
    const typename Place::Args& a, T* tile, FragmentC<float> (&out)[kM][kSize / 8],
    const OnlineSoftmax<kM>& softmax) {
  const Place place(a);
  const int warp_row = forward_warp_row(forward_tile(kSize)), row = forward_first_row(forward_tile(kSize)) + warp_row;
  T* const rows = tile + warp_row * kSize;
  float* const lse = place.lse();
  __syncwarp();
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sum_over_quad(softmax.sum[m][half]), top = softmax.top[m][half], scale = 1;
      if (a.sinks) {
        const float sink = a.sinks[place.head] * kLog2e, highest = fmaxf(top, sink);
        const float shift = highest == -kInfinity ? 0.f : highest;
        scale = exp2_approx(top - shift);
        sum = fmaf(sum, scale, exp2_approx(sink - shift));
        top = highest;
      }
      scale = sum == 0 ? 0.f : __fdividef(scale, sum);
#pragma unroll
      for (int v = 0; v < kSize / 8; ++v) {
        out[m][v].x[2 * half] *= scale;
        out[m][v].x[2 * half + 1] *= scale;
      }
      const int own = row + 16 * m + 8 * half + lane_id() / 4;
      if (lane_id() % 4 == 0 && own < place.band().queries)
        lse[own] = sum == 0 ? -kInfinity : fmaf(top, a.natural, logf(sum));
    }
#pragma unroll
    for (int v = 0; v < kSize / 8; ++v) store_fragment<kSize>(rows, out[m][v], 16 * m, 8 * v);
  }
  __syncwarp();
  store_rows<16 * kM, kSize, kWarp>(place.template out<T>(), rows, row);
}

template <class T, int kSize, bool kSoftcap, class Place>
__device__ __forceinline__ void attend_tile(const Place& place) {
  constexpr ForwardTile kTile = forward_tile(kSize);
  constexpr int kM = kTile.queries / kTile.warps / 16, kN = kTile.keys / 8;
  const typename Place::Args& a = place.a;
  const Band& band = place.band();
  const int first_row = forward_first_row(kTile);
  const Range seen = band.keys_of({first_row, first_row + kTile.queries});
  const int first = seen.first / kTile.keys, end = (max(seen.end, 0) + kTile.keys - 1) / kTile.keys;

  T* const query_tile = dynamic_shared<T>();
  using KeyRows = decltype(place.template key<T>());
  KeyValueRing<T, kSize, kTile, KeyRows> ring(
      query_tile + kTile.queries * kSize, place.template key<T>(), place.template value<T>(), first * kTile.keys);
  const TileReader<T, kSize> lane;
  QueryRows<T, kSize, kM, kTile.holds_query> queries(query_tile + forward_warp_row(kTile) * kSize);
  OnlineSoftmax<kM> softmax;
  FragmentC<float> out[kM][kSize / 8] = {};

  if (first < end) {
    load_rows<kTile.queries, kSize, kTile.threads()>(query_tile, place.template query<T>(), first_row);
    cp_async_commit();
    ring.begin();
    if constexpr (kTile.holds_query) {
      cp_async_wait<kTile.slots - 1>();
      __syncthreads();
      queries.hold(lane);
    }
  }
  for (int block = first; block < end; ++block) {
    const TileReader<T, kSize> reader = lane.again();
    const int own_row = first_row + forward_warp_row(kTile), first_key = block * kTile.keys;
    const Range rows = {own_row, own_row + 16 * kM}, columns = {first_key, first_key + kTile.keys};
    const bool sees = band.allows_any(rows, columns);  // if not, the block is there for other warps
    FragmentA<T> weights[kN / 2][kM];
    const T* const keys = ring.template next<false>(block + 1 < end);
    if (sees) {
      FragmentC<float> scores[kM][kN] = {};
      queries.multiply(scores, reader, keys);
      if constexpr (kSoftcap) for_each(scores, [&](float x) { return tanh_fast(x * a.inner); });
      else if (a.inner < 0) for_each(scores, [](float x) { return -x; });
      if (a.slopes) add_alibi(scores, a, own_row + band.offset, first_key);
      if (!band.allows_all(rows, columns)) mask(scores, band, own_row, first_key);
      softmax.weigh(scores, out, a.slopes ? 1.f : a.outer);
#pragma unroll
      for (int n = 0; n < kN; n += 2)
#pragma unroll
        for (int m = 0; m < kM; ++m) weights[n / 2][m] = to_a<T>(scores[m][n], scores[m][n + 1]);
    }
    // Not before: the scores have given back half of their registers, which the addresses of copies need.
    const T* const values = ring.template next<true>(block + 1 < end);
    if (sees) {
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) multiply_columns_at(out, weights[n], reader, values, 16 * n);
    }
  }
  store_output<T, kSize, Place>(a, query_tile, out, softmax);
}

template <class T, int kSize, bool kSoftcap>
__global__ void __launch_bounds__(forward_tile(kSize).threads()) attention_forward(const AttentionForwardArgs a) {
  const DenseForward place(a);
  if (place.of_all_heads < a.all_heads) attend_tile<T, kSize, kSoftcap>(place);
}

}  // namespace pykern
