// What the attention kernels of every device are told of a call, as plain data: tensors of heads, and which keys a
// query may see. Compiled for every instruction set, like rows.h.

#pragma once

#include "rows.h"

#define PYKERN_INLINE PYKERN_ANYWHERE inline __attribute__((always_inline))

namespace pykern {

// A tensor (batch, length, heads, size) whose elements of a head are contiguous; strides are in elements.
struct Heads {
  void* data;
  int64_t batch, row, head;
};

// Lengths, and how far "unlimited" reaches: positions, differences of positions and a tile more stay within int.
constexpr int kMostPositions = 1 << 29;
constexpr int kUnlimited = 1 << 30;

// From the first to before the end; nothing if that is not later.
struct Range {
  int first, end;
};

// The band of the scores (queries, keys) that causality and window allow: query i is at key position i + offset, and
// sees the keys from `left` before to `right` after that.
struct Band {
  int queries, keys;
  int offset, left, right;

  PYKERN_INLINE bool allows(int query, int key) const {
    const int distance = query + offset - key;
    return distance <= left && -distance <= right;
  }

  // The keys that a query sees.
  PYKERN_INLINE Range keys_of(int query) const {
    const int position = query + offset;
    return {position - left > 0 ? position - left : 0, position + right < keys ? position + right + 1 : keys};
  }

  // The queries that see a key.
  PYKERN_INLINE Range queries_of(int key) const {
    const int row = key - offset;
    return {row - right > 0 ? row - right : 0, row + left < queries ? row + left + 1 : queries};
  }

  // The keys that any of the queries [first, end) sees; some query must be there.
  PYKERN_INLINE Range keys_of(Range rows) const {
    const int last = (rows.end < queries ? rows.end : queries) - 1;
    return {keys_of(rows.first).first, keys_of(last).end};
  }

  // The queries that see any of the keys [first, end).
  PYKERN_INLINE Range queries_of(Range columns) const {
    const int last = (columns.end < keys ? columns.end : keys) - 1;
    return {queries_of(columns.first).first, queries_of(last).end};
  }

  // Whether any of the queries [first, end) sees any of the keys [first, end).
  PYKERN_INLINE bool allows_any(Range rows, Range columns) const {
    if (rows.first >= queries) return false;
    const Range seen = keys_of(rows);
    return columns.first < seen.end && seen.first < columns.end;
  }

  // Whether all keys [first, end) exist and each of the queries that exist among [first, end) sees them all.
  PYKERN_INLINE bool allows_all(Range rows, Range columns) const {
    const int last = (rows.end < queries ? rows.end : queries) - 1;
    return columns.end <= keys && allows(rows.first, columns.end - 1) && allows(last, columns.first);
  }
};

}  // namespace pykern
