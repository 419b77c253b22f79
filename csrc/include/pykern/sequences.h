// Sequences of any lengths in one tensor, as the attention kernels of every device are told of them: which rows of
// query and key are whose, and where a key is that lies in a page. Lengths and page ids are read where kernels run and
// not trusted: whatever they say, rows are inside the tensors. Compiled for every instruction set, like rows.h.

#pragma once

#include "heads.h"

namespace pykern {

PYKERN_INLINE int clamped(int x, int least, int most) { return x < least ? least : x > most ? most : x; }

// Division by a number that is the same for a whole call: a product and a shift instead of some twenty instructions.
struct Divisor {
  uint32_t factor;
  int shift;

  static PYKERN_INLINE Divisor of(int divisor) {  // at least 1
    int bits = 0;
    while (int64_t{1} << bits < divisor) ++bits;
    return {static_cast<uint32_t>((uint64_t{1} << (31 + bits)) / divisor + 1), 31 + bits};
  }

  // x / divisor of an x that is not negative. The factor is too large by at most 2^(shift - 31) / 2^shift of itself,
  // which no x below 2^31 lets reach the next whole number.
  PYKERN_INLINE int divide(int x) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(x)) * factor >> shift);
  }
};

// A cache (blocks, size, heads, …) whose blocks are pages: those of sequence b are table[b] in order. Without a table
// block b is sequence b's only page.
struct Pages {
  const int* table;  // (sequences, width), or null
  int width, size, blocks;
  Divisor by_size;

  // How many keys a sequence can have; none if there is no page to clamp a page's id to.
  PYKERN_INLINE int64_t capacity() const {
    return blocks > 0 ? (table ? static_cast<int64_t>(width) * size : size) : 0;
  }

  // The block in which a sequence has its key, which must be below the capacity.
  PYKERN_INLINE int block_of(int sequence, int key) const {
    if (!table) return sequence;
    return clamped(table[static_cast<int64_t>(sequence) * width + by_size.divide(key)], 0, blocks - 1);
  }

  // Where that key is: its offset in elements from heads.data, of a tensor whose `batch` are the blocks.
  PYKERN_INLINE int64_t offset_of(const Heads& heads, int sequence, int key) const {
    const int row = table ? key - by_size.divide(key) * size : key;
    return block_of(sequence, key) * heads.batch + row * heads.row;
  }
};

struct Sequences {
  const int *query_starts, *key_starts;  // (count + 1,): the first rows, and the end of the last sequence
  const int* used;                       // (count,): how many keys are present; or null
  Pages pages;                           // without a table keys are in the rows that key_starts says
  int count;
  int query_rows, key_rows;        // of the tensors; key_rows not of pages
  int most_queries, most_keys;     // of a sequence: what is beyond is cut; at most the rows, or the pages' capacity
  int left, right;                 // of the band

  // The rows of query that are sequence b's.
  PYKERN_INLINE Range queries_of(int b) const { return rows_of(query_starts, b, query_rows, most_queries); }

  // The rows of key that are sequence b's and present. Of pages: from 0 to how many there are.
  PYKERN_INLINE Range keys_of(int b) const {
    if (!pages.table) {
      const Range rows = rows_of(key_starts, b, key_rows, most_keys);
      const int present = used ? clamped(used[b], 0, rows.end - rows.first) : rows.end - rows.first;
      return {rows.first, rows.first + present};
    }
    if (used) return {0, clamped(used[b], 0, most_keys)};
    const int64_t length = static_cast<int64_t>(key_starts[b + 1]) - key_starts[b];
    return {0, length < 0 ? 0 : length < most_keys ? static_cast<int>(length) : most_keys};
  }

  // The rows of no sequence between b - 1 and b, for b from 0 to count: with the sequences' own these are all rows,
  // each once if starts do not decrease, and at least once if they do.
  PYKERN_INLINE Range queries_before(int b) const {
    return {b > 0 ? queries_of(b - 1).end : 0, b < count ? clamped(query_starts[b], 0, query_rows) : query_rows};
  }

  // The same of keys that are not in pages.
  PYKERN_INLINE Range keys_before(int b) const {
    return {b > 0 ? keys_of(b - 1).end : 0, b < count ? clamped(key_starts[b], 0, key_rows) : key_rows};
  }

  // The band of a sequence with these rows: its last query is at its last key.
  PYKERN_INLINE Band band_of(Range queries, Range keys) const {
    const int length = queries.end - queries.first, present = keys.end - keys.first;
    return {length, present, present - length, left, right};
  }

 private:
  static PYKERN_INLINE Range rows_of(const int* starts, int b, int rows, int most) {
    const int first = clamped(starts[b], 0, rows), end = clamped(starts[b + 1], first, rows);
    return {first, end - first < most ? end : first + most};
  }
};

}  // namespace pykern
