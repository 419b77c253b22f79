// Rows of floats in fp32, with their factors and dropout.

#pragma once

#include "../linear.h"
#include "functions.h"

namespace pykern {
namespace {

// Columns that one vector of counters decides.
constexpr int64_t kDropped = 4 * kLanes;

// The first, or the last, two of every four lanes of a and b, those of a at even places.
template <bool last>
PYKERN_INLINE Vec interleave(Vec a, Vec b) {
  Bits place;
  for (int i = 0; i < kLanes; ++i) place[i] = i / 4 * 4 + (last ? 2 : 0) + i % 4 / 2 + (i & 1 ? kLanes : 0);
  return __builtin_shuffle(a, b, place);
}

// The first, or the last, pair of every two of a and b.
template <bool last>
PYKERN_INLINE Vec interleave_pairs(Vec a, Vec b) {
  Bits place;
  for (int i = 0; i < kLanes; ++i) place[i] = i / 4 * 4 + (last ? 2 : 0) + i % 2 + (i & 2 ? kLanes : 0);
  return __builtin_shuffle(a, b, place);
}

// Elements [first, first + count) of a row, in place; first is a multiple of kDropped.
inline void drop(const Dropout& dropout, int64_t row, int64_t first, int64_t count, float* x) {
  // Four words of a lane are neighbours. Interleaved, those of lane 4 i + j come out as quarter i of vector j.
  Bits lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i % 4 * (kLanes / 4) + i / 4;
  for (int64_t c = 0; c < count; c += kDropped) {
    const uint64_t index = static_cast<uint64_t>(row * dropout.groups + (first + c) / 4);
    const uint32_t low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
    const Bits begin = Bits{} + low, counter = begin + lane;
    Bits words[4] = {
        counter, (counter < begin ? Bits{} + 1 : Bits{}) + high, Bits{} + static_cast<uint32_t>(dropout.offset),
        Bits{} + static_cast<uint32_t>(dropout.offset >> 32)};
    philox(words, dropout.seed);
    Vec kept[4];
    for (int i = 0; i < 4; ++i) kept[i] = (Vec)(words[i] > dropout.last_dropped ? ~Bits{} : Bits{});
    const Vec even[2] = {interleave<false>(kept[0], kept[1]), interleave<true>(kept[0], kept[1])};
    const Vec odd[2] = {interleave<false>(kept[2], kept[3]), interleave<true>(kept[2], kept[3])};
    const Vec masks[4] = {
        interleave_pairs<false>(even[0], odd[0]), interleave_pairs<true>(even[0], odd[0]),
        interleave_pairs<false>(even[1], odd[1]), interleave_pairs<true>(even[1], odd[1])};
    for (int j = 0; j < 4; ++j) {
      const int64_t at = c + j * kLanes;
      if (at >= count) break;
      const int lanes = static_cast<int>(count - at < kLanes ? count - at : kLanes);
      const Vec product = load(x + at, lanes) * dropout.kept;
      store(x + at, (Vec)((Bits)product & (Bits)masks[j]), lanes);
    }
  }
}

// Of a row that need not exist.
inline void prefetch_row(const FloatRows& m, int64_t row, int64_t first, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t size = m.dtype == DType::f32 ? 4 : 2;
  const char* const from =
      static_cast<const char*>(m.rows.data) + (row_offset(m.rows, row) + first) * size;
  for (int64_t at = 0; at < count * size; at += kLine) __builtin_prefetch(from + at, 0, 2);
}

template <class T>
PYKERN_INLINE void widen_row(const void* data, int64_t offset, int64_t count, float* to) {
  const T* const from = static_cast<const T*>(data) + offset;
  each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA { store(to + i, load(from + i, lanes), lanes); });
}

// Elements [first, first + count) of a row; with dropout, first is a multiple of kDropped.
inline void load_row(const FloatRows& m, int64_t row, int64_t first, int64_t count, float* to) {
  if (m.order) row = m.order[row];
  const int64_t offset = row_offset(m.rows, row) + first;
  if (m.dtype == DType::f32) widen_row<float>(m.rows.data, offset, count, to);
  else if (m.dtype == DType::f16) widen_row<f16>(m.rows.data, offset, count, to);
  else widen_row<bf16>(m.rows.data, offset, count, to);
  if (m.factor)
    each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA {
      store(to + i, load(to + i, lanes) * load(m.factor + first + i, lanes), lanes);
    });
  if (m.scale != 1)
    each(count, [&](int64_t i, int lanes) PYKERN_LAMBDA { store(to + i, load(to + i, lanes) * m.scale, lanes); });
  if (m.dropout) drop(*m.dropout, row, first, count, to);
}

}  // namespace
}  // namespace pykern
