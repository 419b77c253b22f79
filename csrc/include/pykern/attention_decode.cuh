// Softmax attention of a few new tokens against a cache, by mma.sync on tensor cores (sm_80 and later), fp16 and bf16.
//
// Little is computed for each byte of the cache, so all is done to read it once and without a pause. All tokens of all
// query heads that share a key head are the rows of one tile. The keys that a sequence's tokens see are divided evenly
// among blocks of threads (splits), enough to fill the device; each streams its keys and values through a ring in
// shared memory by copies of 16 bytes, straight from the pages they lie in. Where a tile has fewer rows than the block
// has warps, several warps take the same rows with different keys. What they and the splits have found are parts of a
// softmax, merged in a fixed order (flash-decoding: https://pytorch.org/blog/flash-decoding; the merge of partial
// softmaxes: Dao, arXiv:2307.08691): by the block's own threads where there is one split, else by a second kernel.

#pragma once

#include "attention_varlen.cuh"
#include "reduce.cuh"

namespace pykern {

// What a softmax over some keys has come to: numbers of all parts give those of all keys.
struct SoftmaxPart {
  float top = -kInfinity;  // the largest score, in units of log2
  float sum = 0;           // of exponentials relative to it

  // All tops first, then the sums. The weight is that of the part's own values.
  __device__ __forceinline__ void merge_top(const SoftmaxPart& part) { top = fmaxf(top, part.top); }
  __device__ __forceinline__ float weight_of(const SoftmaxPart& part) const {
    return exp2_approx(part.top - (top == -kInfinity ? 0.f : top));
  }
  __device__ __forceinline__ float merge_sum(const SoftmaxPart& part) {
    const float weight = weight_of(part);
    sum = fmaf(part.sum, weight, sum);
    return weight;
  }
};

// What becomes of a row once all its keys have been seen.
struct SoftmaxEnd {
  float scale;  // of the sum of weighted values
  float lse;

  __device__ __forceinline__ SoftmaxEnd(SoftmaxPart all, const float* sinks, int head, float natural) {
    scale = 1;
    if (sinks) {
      const SoftmaxPart keys = all, sink = {sinks[head] * kLog2e, 1};
      all = {};
      all.merge_top(keys), all.merge_top(sink);
      scale = all.merge_sum(keys), all.merge_sum(sink);
    }
    scale = all.sum == 0 ? 0.f : __fdividef(scale, all.sum);
    lse = all.sum == 0 ? -kInfinity : fmaf(all.top, natural, logf(all.sum));
  }
};

// Of caches `batch` are the blocks, and lse is (batch, heads, tokens). The band's keys and offset are those of no
// sequence.
struct AttentionDecodeArgs : AttentionForwardArgs {
  const int* lengths;  // of sequences in the cache, the tokens' own keys included
  Pages pages;
  int capacity;  // the most keys a sequence can have
  int key_heads;
  bool softcap;
  // Of several splits, which are numbered fastest, for each row of lse.
  int splits;
  SoftmaxPart* parts;
  float* part_outs;  // value_size each, where the part's sum is not zero

  // What the tokens of a sequence see.
  __device__ __forceinline__ Band band_of(int sequence) const {
    Band own = band;
    own.keys = clamped(lengths[sequence], 0, capacity);
    own.offset = own.keys - own.queries;
    return own;
  }
};

// How a block is cut, by padded head size and rows of its tile. Slots have 16 KiB or, at 32, eight: two under way while
// a third is used keep a multiprocessor's share of the memory busy with two blocks, and three fit into 99 KiB (sm_86,
// sm_89) beside the queries. Warps beyond one for each 16 rows share rows and divide the keys.
__host__ __device__ constexpr ForwardTile decode_tile(int size, int rows) {
  return {
      .queries = rows, .keys = size <= 64 ? 128 : 8192 / size, .warps = rows <= 64 ? 4 : rows / 16, .slots = 3,
      .holds_query = size <= 128};
}

__host__ __device__ constexpr int warps_of_row(ForwardTile tile) { return tile.warps * 16 / tile.queries; }

// Eight floats more than a row has keep the rows of a fragment in different banks.
__host__ __device__ constexpr int part_stride(int size) { return size + 8; }

__host__ __device__ constexpr int decode_shared_bytes(ForwardTile tile, int size) {
  const int parts = static_cast<int>(sizeof(float)) * part_stride(size) * 16 * tile.warps;
  return parts > tile.shared_bytes(size) ? parts : tile.shared_bytes(size);
}

// The rows of a tile: all tokens of the query heads that share a key head. The heads of a token are neighbours, as they
// are in memory.
struct DecodeRows {
  int sequence, key_head;
  int first, count;  // the tile's first row, and how many there are of this key head

  __device__ __forceinline__ explicit DecodeRows(const AttentionDecodeArgs& a, int tile_rows)
      : sequence(static_cast<int>(blockIdx.x) / a.key_heads),
        key_head(static_cast<int>(blockIdx.x) % a.key_heads),
        first(static_cast<int>(blockIdx.z) * tile_rows),
        count(a.band.queries * a.group) {}

  __device__ __forceinline__ int token(const AttentionDecodeArgs& a, int row) const { return (first + row) / a.group; }
  __device__ __forceinline__ int head(const AttentionDecodeArgs& a, int row) const {
    return key_head * a.group + (first + row) % a.group;
  }
  __device__ __forceinline__ bool there(int row) const { return first + row < count; }
};

// The share of a split, in whole steps of 16 keys: so even few keys occupy many splits, and of many each gets as many
// but for one step.
__device__ __forceinline__ Range split_of(Range keys, int split, int splits) {
  const int64_t steps = keys.end > keys.first ? (keys.end - keys.first + 15) / 16 : 0;
  const int first = keys.first + static_cast<int>(steps * split / splits) * 16;
  return {first, min(keys.first + static_cast<int>(steps * (split + 1) / splits) * 16, keys.end)};
}

// Begins to copy the tile's queries; zeros where there is no row or column.
template <class T, int kSize, int kRows>
__device__ __forceinline__ void load_queries(T* tile, const AttentionDecodeArgs& a, const DecodeRows& rows) {
  using Chunks = TileChunks<T, kRows, kSize, decode_tile(kSize, kRows).threads()>;
  const Chunks own;
  const T* const column = static_cast<const T*>(a.query.data) + rows.sequence * a.query.batch + own.col;
#pragma unroll 1
  for (int step = 0; step < kRows; step += Chunks::kStep) {
    const int row = own.row + step;
    const bool there = rows.there(row) && own.col < a.size;
    const int64_t offset = rows.token(a, row) * a.query.row + rows.head(a, row) * a.query.head;
    cp_async<16>(tile + own.at(step), column + (there ? offset : 0), there ? 16 : 0);
  }
}

// What a lane must know of its two rows of a fragment.
struct DecodeLane {
  int position[2];  // of the token among the keys
  float slope[2];   // of ALiBi, in units of log2

  __device__ __forceinline__ DecodeLane(
      const AttentionDecodeArgs& a, const DecodeRows& rows, int offset, int warp_row) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows that are not there do as the last one does, and are not stored.
      const int row = min(warp_row + 8 * half + lane_id() / 4, rows.count - 1 - rows.first);
      const int token = rows.token(a, row), head = rows.head(a, row);
      position[half] = token + offset;
      if (a.slopes) slope[half] = -kLog2e * a.slopes[a.slopes_of_batch ? rows.sequence * a.heads + head : head];
    }
  }

  // Scores in units of log2 less ALiBi's slope times the distance.
  template <int kN>
  __device__ __forceinline__ void add_alibi(FragmentC<float> (&scores)[1][kN], float outer, int first_key) const {
    const int key = first_key + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < LayoutC::kElements; ++e) {
        const int steps = abs(position[e / 2] - key - 8 * n - e % 2);
        scores[0][n].x[e] = fmaf(slope[e / 2], static_cast<float>(steps), scores[0][n].x[e] * outer);
      }
  }

  // -inf for keys that a row does not see, and from `end` on.
  template <int kN>
  __device__ __forceinline__ void mask(FragmentC<float> (&scores)[1][kN], int first_key, int left, int end) const {
    const int key = first_key + lane_id() % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int e = 0; e < LayoutC::kElements; ++e) {
        const int own = key + 8 * n + e % 2, distance = position[e / 2] - own;
        if (distance < 0 || distance > left || own >= end) scores[0][n].x[e] = -kInfinity;
      }
  }
};

// Merges the parts that a block's warps have of its rows, and stores what comes of them: the end where there is one
// split, else this split's part.
template <class T, int kSize, int kRows>
__device__ __forceinline__ void store_parts(
    const AttentionDecodeArgs& a, const DecodeRows& rows, const FragmentC<float> (&out)[1][kSize / 8],
    const OnlineSoftmax<1>& softmax) {
  constexpr ForwardTile kTile = decode_tile(kSize, kRows);
  constexpr int kStride = part_stride(kSize), kChunks = kSize / 8, kSharing = warps_of_row(kTile);
  PYKERN_SHARED(parts, SoftmaxPart[kTile.warps][16]);
  float* const outs = dynamic_shared<float>();  // (warps, 16, kStride)
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_id();
  __syncthreads();  // the ring is not used any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = sum_over_quad(softmax.sum[0][half]);
    if (lane % 4 == 0) parts[warp][lane / 4 + 8 * half] = {softmax.top[0][half], sum};
  }
#pragma unroll
  for (int v = 0; v < kChunks; ++v)
#pragma unroll
    for (int e = 0; e < LayoutC::kElements; e += 2)
      *reinterpret_cast<float2*>(
          outs + (warp * 16 + LayoutC::row(lane, e)) * kStride + 8 * v + LayoutC::col(lane, e)) =
          make_float2(out[0][v].x[e], out[0][v].x[e + 1]);
  __syncthreads();

#pragma unroll 1
  for (int chunk = threadIdx.x; chunk < kRows * kChunks; chunk += kTile.threads()) {
    const int row = chunk / kChunks, col = chunk % kChunks * 8;
    if (!rows.there(row)) continue;
    const int first_warp = row / 16 * kSharing;
    SoftmaxPart all;
#pragma unroll
    for (int w = 0; w < kSharing; ++w) all.merge_top(parts[first_warp + w][row % 16]);
    float values[8] = {};
#pragma unroll
    for (int w = 0; w < kSharing; ++w) {
      const float weight = all.merge_sum(parts[first_warp + w][row % 16]);
      float own[8];
      load_floats(outs + ((first_warp + w) * 16 + row % 16) * kStride + col, own);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = fmaf(weight, own[i], values[i]);
    }
    const int token = rows.token(a, row), head = rows.head(a, row);
    const int64_t of_all = (static_cast<int64_t>(rows.sequence) * a.heads + head) * a.band.queries + token;
    if (a.splits > 1) {
      const int64_t part = of_all * a.splits + blockIdx.y;
      if (col == 0) a.parts[part] = all;
      if (all.sum != 0 && col < a.value_size) store_floats(a.part_outs + part * a.value_size + col, values);
    } else {
      const SoftmaxEnd end(all, a.sinks, head, a.natural);
      if (col == 0) a.lse[of_all] = end.lse;
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] *= end.scale;
      T* const to = static_cast<T*>(a.out.data) + rows.sequence * a.out.batch + token * a.out.row + head * a.out.head;
      if (col < a.value_size) store_floats(to + col, values);
    }
  }
}

// Grid: (key heads of all sequences, splits, tiles of rows).
template <class T, int kSize, int kRows>
__global__ void __launch_bounds__(decode_tile(kSize, kRows).threads()) attention_decode(const AttentionDecodeArgs a) {
  constexpr ForwardTile kTile = decode_tile(kSize, kRows);
  constexpr int kSharing = warps_of_row(kTile), kWarpKeys = kTile.keys / kSharing, kN = kWarpKeys / 8;
  const DecodeRows rows(a, kTile.queries);
  const Band band = a.band_of(rows.sequence);
  // Tokens see the more the later they are, and begin the later.
  const int first_token = rows.token(a, 0), last_token = (min(rows.first + kTile.queries, rows.count) - 1) / a.group;
  const Range keys = split_of(band.keys_of(Range{first_token, last_token + 1}), blockIdx.y, a.splits);
  const Range by_all = {band.keys_of(last_token).first, min(band.keys_of(first_token).end, keys.end)};

  T* const query_tile = dynamic_shared<T>();
  KeyValueRing<T, kSize, kTile, PagedRows<T>> ring(
      query_tile + kTile.queries * kSize, {a.key, a.pages, rows.sequence, rows.key_head, keys.end, a.size},
      {a.value, a.pages, rows.sequence, rows.key_head, keys.end, a.value_size}, keys.first);
  const int warp = opaque(static_cast<int>(threadIdx.x)) / kWarp;
  const int warp_row = warp / kSharing * 16, warp_key = warp % kSharing * kWarpKeys;
  const TileReader<T, kSize> lane;
  const DecodeLane own(a, rows, band.offset, warp_row);
  QueryRows<T, kSize, 1, kTile.holds_query> queries(query_tile + warp_row * kSize);
  OnlineSoftmax<1> softmax;
  FragmentC<float> out[1][kSize / 8] = {};

  if (keys.first < keys.end) {
    load_queries<T, kSize, kRows>(query_tile, a, rows);
    cp_async_commit();
    ring.begin();
    if constexpr (kTile.holds_query) {
      cp_async_wait<kTile.slots - 1>();
      __syncthreads();
      queries.hold(lane);
    }
  }
  for (int block = keys.first; block < keys.end; block += kTile.keys) {
    const TileReader<T, kSize> reader = lane.again();
    const int first_key = block + warp_key;
    const bool works = first_key < keys.end && rows.there(warp_row);
    const bool another = block + kTile.keys < keys.end;
    FragmentA<T> weights[kN / 2][1];
    const T* const key_tile = ring.template next<false>(another) + warp_key * kSize;
    if (works) {
      FragmentC<float> scores[1][kN] = {};
      queries.multiply(scores, reader, key_tile);
      if (a.softcap) for_each(scores, [&](float x) { return tanh_fast(x * a.inner); });
      else if (a.inner < 0) for_each(scores, [](float x) { return -x; });
      if (a.slopes) own.add_alibi(scores, a.outer, first_key);
      if (first_key < by_all.first || first_key + kWarpKeys > by_all.end)
        own.mask(scores, first_key, band.left, keys.end);
      softmax.weigh(scores, out, a.slopes ? 1.f : a.outer);
#pragma unroll
      for (int n = 0; n < kN; n += 2) weights[n / 2][0] = to_a<T>(scores[0][n], scores[0][n + 1]);
    }
    const T* const value_tile = ring.template next<true>(another) + warp_key * kSize;
    if (works) {
#pragma unroll
      for (int n = 0; n < kN / 2; ++n) multiply_columns_at(out, weights[n], reader, value_tile, 16 * n);
    }
  }
  store_parts<T, kSize, kRows>(a, rows, out, softmax);
}

// Merges the parts of all splits of a row, a block each: lanes have four columns each, and as many teams of them as
// there are divide the splits. Parts without keys are not read.
constexpr int kCombineThreads = 128;

template <class T>
__global__ void __launch_bounds__(kCombineThreads) attention_decode_combine(const AttentionDecodeArgs a) {
  PYKERN_SHARED(sums, float4[kCombineThreads]);
  const int64_t row = blockIdx.x;
  const SoftmaxPart* const parts = a.parts + row * a.splits;
  // Each warp finds the same.
  SoftmaxPart all;
  for (int split = lane_id(); split < a.splits; split += kWarp) all.merge_top(parts[split]);
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    all.top = fmaxf(all.top, __shfl_xor_sync(kFullWarp, all.top, distance));
  for (int split = lane_id(); split < a.splits; split += kWarp) all.merge_sum(parts[split]);
  float sum[1] = {all.sum};
  sum_over_lanes(sum, kWarp);
  all.sum = sum[0];

  const int lanes = max(a.value_size / 4, 1), teams = kCombineThreads / lanes;
  const int thread = threadIdx.x, team = thread / lanes, col = thread % lanes * 4;
  float4 own = {};
  if (team < teams && col < a.value_size) {
    const float* const outs = a.part_outs + row * a.splits * a.value_size + col;
#pragma unroll 4
    for (int split = team; split < a.splits; split += teams) {
      SoftmaxPart part = parts[split];
      if (part.sum == 0) continue;
      const float weight = all.weight_of(part);
      const float4 x = *reinterpret_cast<const float4*>(outs + static_cast<int64_t>(split) * a.value_size);
      own.x = fmaf(weight, x.x, own.x), own.y = fmaf(weight, x.y, own.y);
      own.z = fmaf(weight, x.z, own.z), own.w = fmaf(weight, x.w, own.w);
    }
  }
  sums[thread] = own;
  __syncthreads();
  if (team > 0) return;
  for (int other = 1; other < teams; ++other) {
    const float4 x = sums[other * lanes + thread];
    own.x += x.x, own.y += x.y, own.z += x.z, own.w += x.w;
  }
  const int token = static_cast<int>(row % a.band.queries), head = static_cast<int>(row / a.band.queries % a.heads);
  const int64_t sequence = row / a.band.queries / a.heads;
  const SoftmaxEnd end(all, a.sinks, head, a.natural);
  if (thread == 0) a.lse[row] = end.lse;
  T* const to = static_cast<T*>(a.out.data) + sequence * a.out.batch + token * a.out.row + head * a.out.head;
  if (col < a.value_size)
    *reinterpret_cast<uint2*>(to + col) =
        make_uint2(pack<T>(own.x * end.scale, own.y * end.scale), pack<T>(own.z * end.scale, own.w * end.scale));
}

}  // namespace pykern
