// Softmax attention, forward, inside each of many sequences that lie end to end; the arithmetic is attention.cuh's.
//
// What differs is where a tile is. A block finds its sequence's rows of query and key in the tensors of their starts,
// which only the device reads: the grid has tiles for the longest sequence, and blocks past the end of a shorter one
// leave at once. Keys are rows that follow each other, as in dense attention, or are looked up in pages row by row.
//
// Rows of no sequence are written by the blocks of the sequence that follows them, those after the last one by blocks
// of a sequence that is none: so nothing has to fill the output before.

#pragma once

#include "attention.cuh"
#include "sequences.h"

namespace pykern {

// Strides from one sequence to the next are not used, but those from a page to the next; lse is (heads, rows of query).
// The band's lengths and offset are those of no sequence. all_heads counts one sequence more than there are.
struct PackedForwardArgs : AttentionForwardArgs {
  Sequences sequences;
};

// The rows of one head of a sequence whose keys are in pages. T is the elements'.
template <class T>
struct PagedRows {
  const Heads& heads;
  const Pages& pages;
  int sequence, head, rows, size;
};

// As few registers as possible last from tile to tile: what can be read from the kernel's arguments is computed again.
template <class T, int kRows, int kCols, int kThreads>
class TileLoader<PagedRows<T>, kRows, kCols, kThreads> {
 public:
  __device__ __forceinline__ TileLoader(const PagedRows<T>& from, int first)
      : from_(from), key_(first + own_.row), end_(own_.col < from.size ? from.rows : 0) {}

  __device__ __forceinline__ void load(T* tile) {
    const T* const head = rows_of_head<const T>(from_.heads, 0, opaque(from_.head), 0, 0).data + own_.col;
    // More look-ups at a time would need registers that the output has.
#pragma unroll 4
    for (int step = 0; step < kRows; step += Chunks::kStep) {
      const int key = key_ + step;
      const bool there = key < end_;
      const int64_t offset = there ? from_.pages.offset_of(from_.heads, from_.sequence, key) : 0;
      cp_async<16>(tile + own_.at(step), head + offset, there ? 16 : 0);
    }
    key_ += kRows;
  }

 private:
  using Chunks = TileChunks<T, kRows, kCols, kThreads>;

  Chunks own_;
  PagedRows<T> from_;
  int key_, end_;
};

// The rows of one head of a sequence that follow each other.
template <class T>
__device__ __forceinline__ HeadRows<T> rows_of_sequence(const Heads& heads, int head, Range rows, int size) {
  HeadRows<T> found = rows_of_head<T>(heads, 0, head, rows.end - rows.first, size);
  found.data += rows.first * heads.row;
  return found;
}

// Where a tile of a sequence is.
template <bool kPaged>
class PackedForward : public ForwardPlace {
 public:
  using Args = PackedForwardArgs;
  const Args& a;

  __device__ __forceinline__ explicit PackedForward(const Args& args)
      : ForwardPlace(args),
        a(args),
        queries_(a.sequences.queries_of(batch)),
        keys_(a.sequences.keys_of(batch)),
        band_(a.sequences.band_of(queries_, keys_)) {}

  __device__ __forceinline__ const Band& band() const { return band_; }
  template <class T>
  __device__ __forceinline__ HeadRows<T> query() const {
    return rows_of_sequence<T>(a.query, head, queries_, a.size);
  }
  template <class T>
  __device__ __forceinline__ auto key() const {
    return key_rows<T>(a.key, a.size);
  }
  template <class T>
  __device__ __forceinline__ auto value() const {
    return key_rows<T>(a.value, a.value_size);
  }
  template <class T>
  __device__ __forceinline__ HeadRows<T> out() const {
    return rows_of_sequence<T>(a.out, head, queries_, a.value_size);
  }
  __device__ __forceinline__ float* lse() const {
    return a.lse + static_cast<int64_t>(head) * a.sequences.query_rows + queries_.first;
  }

 private:
  template <class T>
  __device__ __forceinline__ auto key_rows(const Heads& heads, int size) const {
    if constexpr (kPaged) return PagedRows<T>{heads, a.sequences.pages, batch, head / a.group, band_.keys, size};
    else return rows_of_sequence<T>(heads, head / a.group, keys_, size);
  }

  Range queries_, keys_;
  Band band_;
};

// Zeros, and a log-sum-exp of -inf, in the tile's share of the rows of no sequence before this one.
template <class T, int kSize>
__device__ __forceinline__ void clear_rows_before(const PackedForwardArgs& a, const ForwardPlace& place) {
  constexpr ForwardTile kTile = forward_tile(kSize);
  const Range rows = a.sequences.queries_before(place.batch);
  const int step = static_cast<int>(gridDim.y) * kTile.queries;
  for (int first = rows.first + forward_first_row(kTile); first < rows.end; first += step) {
    HeadRows<T> out = rows_of_head<T>(a.out, 0, place.head, rows.end, a.value_size);
    clear_rows<kTile.queries, kSize, kTile.threads()>(out, first);
    const int own = static_cast<int>(threadIdx.x), row = first + own;
    if (own < kTile.queries && row < rows.end)
      a.lse[static_cast<int64_t>(place.head) * a.sequences.query_rows + row] = -kInfinity;
  }
}

template <class T, int kSize, bool kSoftcap, bool kPaged>
__global__ void __launch_bounds__(forward_tile(kSize).threads())
    attention_varlen_forward(const PackedForwardArgs a) {
  constexpr ForwardTile kTile = forward_tile(kSize);
  static_assert(kTile.threads() >= kTile.queries);
  const ForwardPlace own(a);
  if (own.of_all_heads >= a.all_heads) return;
  clear_rows_before<T, kSize>(a, own);
  if (own.batch == a.sequences.count) return;
  const PackedForward<kPaged> place(a);
  if (forward_first_row(kTile) < place.band().queries) attend_tile<T, kSize, kSoftcap>(place);
}

}  // namespace pykern
