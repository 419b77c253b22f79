// The gradients of attention inside each of many sequences that lie end to end; the arithmetic is
// attention_backward.cuh's.
//
// What differs is where tiles are: as in the forward, attention_varlen.cuh, blocks find the rows of their sequence on
// the device, the grid has tiles for the longest one, and rows of no sequence get their zeros from the blocks of the
// sequence that follows them.

#pragma once

#include "attention_backward.cuh"
#include "attention_varlen.cuh"

namespace pykern {

// Strides from one sequence to the next are not used. Statistics are (heads, rows of query). The band's lengths and
// offset are those of no sequence.
struct PackedGradientArgs : AttentionGradientArgs {
  Sequences sequences;
  int tiles;  // of what blocks own in the longest sequence; at least one
};

// The same of a launch whose rows are those of one head of the longest sequence after another.
struct PackedStatisticsArgs : AttentionStatisticsArgs {
  Sequences sequences;
  int tiles;
};

// Two blocks a multiprocessor would do; for three the compiler spills.
template <class T>
__global__ void __launch_bounds__(kStatisticsThreads, 2) attention_varlen_statistics(const PackedStatisticsArgs args) {
  const AttentionGradientArgs& call = args.call;
  const int index = static_cast<int>(blockIdx.x), head = index / args.tiles % call.heads;
  const int sequence = index / args.tiles / call.heads, first = index % args.tiles * kStatisticsRows;
  const Range queries = args.sequences.queries_of(sequence), keys = args.sequences.keys_of(sequence);
  const Band band = args.sequences.band_of(queries, keys);
  if (first >= band.queries) return;
  const int query = first + static_cast<int>(threadIdx.x) / kStatisticsLanes;
  const int key_head = head / (call.heads / call.key_heads);
  const auto row_of = [](const Heads& heads, int own_head, int own_row) {
    return static_cast<const T*>(heads.data) + own_head * heads.head + own_row * heads.row;
  };
  reduce_statistics<T>(
      args, query < band.queries, band, query,
      static_cast<int64_t>(head) * args.sequences.query_rows + queries.first + query,
      [&](const Heads& heads) { return row_of(heads, head, queries.first + query); },
      [&](const Heads& heads, int key) { return row_of(heads, key_head, keys.first + key); });
}

// Where a tile of a sequence is.
template <class Plan>
class PackedGradient : public GradientBlock<Plan> {
 public:
  const PackedGradientArgs& args;

  __device__ __forceinline__ PackedGradient(const PackedGradientArgs& a, const GradientPlace<Plan>& place)
      : PackedGradient(a, place, a.sequences.queries_of(place.batch), a.sequences.keys_of(place.batch)) {}

  __device__ __forceinline__ PackedGradient again() const { return {args, GradientPlace<Plan>(args, args.tiles)}; }

  __device__ __forceinline__ const Band& band() const { return band_; }
  template <class T>
  __device__ __forceinline__ HeadRows<T> owned(const Heads& heads, int size) const {
    return rows_of_sequence<T>(heads, this->head, Plan::kKeys ? keys_ : queries_, size);
  }
  template <class T>
  __device__ __forceinline__ HeadRows<T> visited(const Heads& heads, int head, int size) const {
    return rows_of_sequence<T>(heads, head, Plan::kKeys ? queries_ : keys_, size);
  }
  __device__ __forceinline__ const float2* statistics(int head) const {
    return args.statistics + static_cast<int64_t>(head) * args.sequences.query_rows + queries_.first;
  }

 private:
  __device__ __forceinline__ PackedGradient(
      const PackedGradientArgs& a, const GradientPlace<Plan>& place, Range queries, Range keys)
      : PackedGradient(a, place, queries, keys, a.sequences.band_of(queries, keys)) {}
  __device__ __forceinline__ PackedGradient(
      const PackedGradientArgs& a, const GradientPlace<Plan>& place, Range queries, Range keys, const Band& band)
      : GradientBlock<Plan>(a, place, band), args(a), queries_(queries), keys_(keys), band_(band) {}

  Range queries_, keys_;
  Band band_;
};

// Zeros in the tile's share of the rows of no sequence before this one.
template <class T, class Plan>
__device__ __forceinline__ void clear_gradients_before(
    const PackedGradientArgs& args, const GradientPlace<Plan>& place) {
  constexpr int kOwned = Plan::kTile.owned;
  const Sequences& sequences = args.sequences;
  const Range rows =
      Plan::kKeys ? sequences.keys_before(place.batch) : sequences.queries_before(place.batch);
  const auto clear = [&](const Heads& heads, int size, int first) {
    clear_rows<kOwned, Plan::kSize, Plan::kThreads>(rows_of_head<T>(heads, 0, place.head, rows.end, size), first);
  };
  for (int first = rows.first + place.first; first < rows.end; first += args.tiles * kOwned) {
    if (const Heads& of_x = Plan::kKeys ? args.dkey : args.dquery; Plan::kOfX && of_x.data)
      clear(of_x, args.size, first);
    if (Plan::kOfY && args.dvalue.data) clear(args.dvalue, args.value_size, first);
  }
}

template <class T, int kSize, Gradient kOf, bool kSoftcap>
__global__ void __launch_bounds__(GradientPlan<kSize, kOf>::kThreads)
    attention_varlen_gradients(const PackedGradientArgs args) {
  using Plan = GradientPlan<kSize, kOf>;
  const GradientPlace<Plan> place(args, args.tiles);
  clear_gradients_before<T>(args, place);
  if (place.batch == args.sequences.count) return;
  const PackedGradient<Plan> block(args, place);
  if (block.first < block.rows) sum_gradients<T, Plan, kSoftcap>(block);
}

}  // namespace pykern
