// Slots sorted by expert: a stable counting sort, one launch for the slots of one tile, else two.
//
// A span of slots belongs to a block. moe_sort_count counts each span's slots by expert. In moe_sort_place each block
// adds up all spans' counts, which tells where every expert begins and how much of it comes before this span; a scan in
// a launch of its own would take longer. Then it puts its slots into place, tile by tile: a warp has some slots in a
// row, 32 at a turn, and finds how many of the same expert come before each in its lanes and in its turns before; what
// the warps before have is added to that.
//
// There is a bin for each expert and a last one for dropped slots. Sums are of integers: atomics that add them leave no
// trace of their order, and no slot's place comes from one.

#pragma once

#include <cstdint>
#include <type_traits>

#include "device.cuh"

namespace pykern {

constexpr int kSortThreads = 512, kSortWarps = kSortThreads / kWarp;
// Slots that a thread has of a tile: so many that the warps' counters, 16 for each bin, are few beside the slots, and
// no more than registers hold with ease.
constexpr int kSortTurns = 16;
constexpr int kSortTile = kSortThreads * kSortTurns;
// Shared memory that a block of moe_sort_place has for a bin: two integers, and a counter for each warp.
constexpr int kSortBinBytes = 2 * sizeof(int) + kSortWarps * sizeof(uint16_t);

struct SortArgs {
  const void* ids;
  int64_t slots, span;
  int experts;
  int* counts;  // (blocks, experts + 1), or null: one block, one tile
  int64_t* order;
  int64_t* inverse;
  int* offs;
};

__device__ __forceinline__ void clear(void* words, int bytes) {
  for (int i = threadIdx.x; i < bytes / 4; i += kSortThreads) static_cast<int*>(words)[i] = 0;
}

// Where a block's slots end.
__device__ __forceinline__ int64_t span_end(const SortArgs& a) {
  return min((blockIdx.x + int64_t{1}) * a.span, a.slots);
}

// A lane's slots of a tile: of its warp's, which lie in a row, every 32nd.
template <class Id>
class LaneSlots {
 public:
  // All are loaded before the first is used, or the kernel would wait for memory at every turn.
  __device__ __forceinline__ LaneSlots(const SortArgs& a, int64_t tile, int64_t end) {
    const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    turns_ = static_cast<int>((min(end - tile, int64_t{kSortTile}) + kSortThreads - 1) / kSortThreads);
    first_ = tile + warp * turns_ * kWarp + lane;
    using Unsigned = std::make_unsigned_t<Id>;  // in which no negative id is below `experts`
    const Unsigned experts = static_cast<Unsigned>(a.experts);
    const Unsigned* const ids = static_cast<const Unsigned*>(a.ids);
#pragma unroll
    for (int t = 0; t < kSortTurns; ++t) {
      const int64_t slot = first_ + t * kWarp;
      bin_[t] = -1;
      if (t < turns_ && slot < end) bin_[t] = static_cast<int>(min(ids[slot], experts));
    }
  }

  // body(t, bin) for each turn; the bin is -1 behind the last slot. All lanes of a warp come along.
  template <class Body>
  __device__ __forceinline__ void each_turn(const Body& body) const {
#pragma unroll
    for (int t = 0; t < kSortTurns; ++t) {
      if (t >= turns_) break;
      body(t, bin_[t]);
    }
  }

  __device__ __forceinline__ int64_t slot(int t) const { return first_ + t * kWarp; }

 private:
  int turns_;
  int64_t first_;
  int bin_[kSortTurns];
};

// Grid: a block for each span.
template <class Id>
__global__ void __launch_bounds__(kSortThreads, 2) moe_sort_count(const SortArgs a) {
  int* const counts = dynamic_shared<int>();
  const int bins = a.experts + 1;
  clear(counts, bins * sizeof(int));
  __syncthreads();
  const int64_t end = span_end(a);
  for (int64_t tile = blockIdx.x * a.span; tile < end; tile += kSortTile) {
    LaneSlots<Id>(a, tile, end).each_turn([&](int, int bin) {
      if (bin >= 0) atomicAdd(&counts[bin], 1);
    });
  }
  __syncthreads();
  int* const to = a.counts + blockIdx.x * bins;
  for (int bin = threadIdx.x; bin < bins; bin += kSortThreads) to[bin] = counts[bin];
}

// Adds up all spans' counts by bin, and in `before` those of the spans before this one.
__device__ __forceinline__ void add_spans(const SortArgs& a, int bins, int* totals, int* before) {
  constexpr int kBatch = 8;
  const int all = gridDim.x * bins, earlier = blockIdx.x * bins;
  for (int first = threadIdx.x; first < all; first += kBatch * kSortThreads) {
    int batch[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kSortThreads;
      batch[b] = i < all ? a.counts[i] : 0;
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int i = first + b * kSortThreads;
      if (batch[b] == 0) continue;
      atomicAdd(&totals[i % bins], batch[b]);
      if (i < earlier) atomicAdd(&before[i % bins], batch[b]);
    }
  }
}

// Adds to each bin's `next` the totals of the bins before it. One block writes where experts end.
__device__ __forceinline__ void add_bins_before(const SortArgs& a, int bins, const int* totals, int* next) {
  PYKERN_SHARED(sums, int[kSortWarps]);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int each = (bins + kSortThreads - 1) / kSortThreads;
  const int first = min(thread * each, bins), end = min(first + each, bins);
  int own = 0;
  for (int bin = first; bin < end; ++bin) own += totals[bin];
  int through = own;  // and including this lane
#pragma unroll
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const int other = __shfl_up_sync(kFullWarp, through, distance);
    if (lane >= distance) through += other;
  }
  if (lane == kWarp - 1) sums[warp] = through;
  __syncthreads();
  int before = through - own;
  for (int w = 0; w < warp; ++w) before += sums[w];
  for (int bin = first; bin < end; ++bin) {
    next[bin] += before;
    before += totals[bin];
    if (blockIdx.x == 0 && bin < a.experts) a.offs[bin] = before;
  }
}

// Counts a warp's slots into its own counters, zero before; by turn, how many of the same bin come before a slot.
template <class Id>
__device__ __forceinline__ void count_warp(const LaneSlots<Id>& slots, uint16_t* counters, int (&rank)[kSortTurns]) {
  const unsigned lanes_before = (1u << threadIdx.x % kWarp) - 1;
  slots.each_turn([&](int t, int bin) {
    const unsigned same = __match_any_sync(kFullWarp, bin);
    const int before = bin < 0 ? 0 : counters[bin];
    rank[t] = before + __popc(same & lanes_before);
    __syncwarp();
    if (bin >= 0 && !(same & lanes_before)) counters[bin] = static_cast<uint16_t>(before + __popc(same));
    __syncwarp();
  });
}

// Grid: a block for each span.
template <class Id>
__global__ void __launch_bounds__(kSortThreads, 2) moe_sort_place(const SortArgs a) {
  const int bins = a.experts + 1;
  int* const next = dynamic_shared<int>();  // where a bin's slots of the tile go
  int* const totals = next + bins;          // of all slots, then of a tile's
  uint16_t* const counters = reinterpret_cast<uint16_t*>(totals + bins);  // (warps, bins)
  uint16_t* const own = counters + threadIdx.x / kWarp * bins;
  clear(next, bins * kSortBinBytes);
  __syncthreads();
  if (a.counts) {
    add_spans(a, bins, totals, next);
    __syncthreads();
    add_bins_before(a, bins, totals, next);
    __syncthreads();
  }

  const int64_t end = span_end(a);
  for (int64_t tile = blockIdx.x * a.span; tile < end; tile += kSortTile) {
    const LaneSlots<Id> slots(a, tile, end);
    int rank[kSortTurns];
    count_warp(slots, own, rank);
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += kSortThreads) {
      int before = 0;
      for (int w = 0; w < kSortWarps; ++w) {
        uint16_t& counter = counters[w * bins + bin];
        const int here = counter;
        counter = static_cast<uint16_t>(before);
        before += here;
      }
      totals[bin] = before;
    }
    __syncthreads();
    if (!a.counts) {
      add_bins_before(a, bins, totals, next);
      __syncthreads();
    }
    slots.each_turn([&](int t, int bin) {
      if (bin < 0) return;
      const int place = next[bin] + own[bin] + rank[t];
      a.order[place] = slots.slot(t);
      a.inverse[slots.slot(t)] = place;
    });
    __syncthreads();
    for (int bin = threadIdx.x; bin < bins; bin += kSortThreads) next[bin] += totals[bin];
    clear(counters, bins * kSortWarps * sizeof(uint16_t));
    __syncthreads();
  }
}

}  // namespace pykern
