// What attention's forward and backward share: panels of query rows, blocks of keys, and the scores of one with the
// other.
//
// A tile of scores has a row for each key and a column for each query row: so each lane of a vector is a query row,
// maxima and sums over keys are lane by lane, and in every matrix product keys and values are the left matrix, read in
// place. Each kind of mask is a pass over a tile that is in cache.

#pragma once

#include "../attention.h"
#include "product.h"

namespace pykern {
namespace {

constexpr float kInfinity = __builtin_inff();

PYKERN_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }
PYKERN_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
PYKERN_INLINE int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Scratch memory, handed out piece by piece at multiples of a cache line.
struct Arena {
  float* at;
  PYKERN_INLINE float* take(int64_t floats) {
    float* const piece = at;
    at += round_up(floats, 16);
    return piece;
  }
};

constexpr int64_t kTile = kBlockKeys * kPanelRows;
// Products of a tile that not every row sees are made for so many keys at a time.
constexpr int kStripKeys = 16;

// Rows of one batch entry that share a key head.
struct Panel {
  int64_t batch;
  int rows, vectors;
  int64_t head[kPanelRows], row[kPanelRows];
  int64_t low[kPanelRows], high[kPanelRows];  // the keys that causality and window allow, which may lie outside
  int64_t first_key, end_key;                 // what some row may see
  int64_t first_open, end_open;               // what every row may see
};

PYKERN_INLINE void set_row(const AttentionCall& call, Panel& panel, int at, int64_t head, int64_t row) {
  panel.head[at] = head;
  panel.row[at] = row;
  panel.low[at] = row + call.offset - call.left;
  panel.high[at] = row + call.offset + call.right;
}

PYKERN_INLINE void set_keys(const AttentionCall& call, Panel& panel) {
  panel.vectors = (panel.rows + kLanes - 1) / kLanes;
  int64_t least_low = panel.low[0], most_low = least_low, least_high = panel.high[0], most_high = least_high;
  for (int i = 1; i < panel.rows; ++i) {
    least_low = smaller_of(least_low, panel.low[i]);
    most_low = larger_of(most_low, panel.low[i]);
    least_high = smaller_of(least_high, panel.high[i]);
    most_high = larger_of(most_high, panel.high[i]);
  }
  panel.first_key = larger_of(least_low, 0) / kStripKeys * kStripKeys;
  panel.end_key = smaller_of(most_high + 1, call.keys);
  panel.first_open = most_low;
  panel.end_open = least_high + 1;
  for (int i = panel.rows; i < kPanelRows; ++i) {
    panel.low[i] = panel.low[0];
    panel.high[i] = panel.high[0];
  }
}

// Rows from first_row on of one head.
PYKERN_INLINE void make_panel(
    const AttentionCall& call, int64_t batch, int64_t head, int64_t first_row, Panel& panel) {
  panel.batch = batch;
  panel.rows = static_cast<int>(smaller_of(kPanelRows, call.length - first_row));
  for (int i = 0; i < panel.rows; ++i) set_row(call, panel, i, head, first_row + i);
  set_keys(call, panel);
}

// A panel of a key head by its number.
PYKERN_INLINE void make_numbered_panel(
    const AttentionCall& call, int64_t batch, int64_t shared_head, int64_t number, Panel& panel) {
  const int64_t first_head = shared_head * call.group;
  if (call.panel_heads == 1) {
    const int64_t head = first_head + number / call.panels_a_head;
    return make_panel(call, batch, head, number % call.panels_a_head * kPanelRows, panel);
  }
  const int64_t begin = number * call.panel_heads, end = smaller_of(begin + call.panel_heads, call.group);
  panel.batch = batch;
  panel.rows = 0;
  for (int64_t head = begin; head < end; ++head)
    for (int64_t row = 0; row < call.length; ++row) set_row(call, panel, panel.rows++, first_head + head, row);
  set_keys(call, panel);
}

template <class Body>
PYKERN_INLINE void with_type(Element type, Body body) {
  switch (type) {
    case Element::f32: return body(float{});
    case Element::f16: return body(f16{});
    case Element::bf16: return body(bf16{});
    case Element::f64: return body(double{});
    case Element::boolean: return body(bool{});
  }
}

PYKERN_INLINE int64_t number_of(const RowNumbers& numbers, const Panel& panel, int row) {
  return numbers.first + panel.batch * numbers.batch + panel.head[row] * numbers.head + panel.row[row] * numbers.row;
}

PYKERN_INLINE int64_t lead_offset(const AttentionCall& call, const AttentionView& view, int64_t batch) {
  int64_t offset = 0;
  for (int d = call.lead_dims - 1; d >= 0; --d) {
    offset += batch % call.lead[d] * view.lead[d];
    batch /= call.lead[d];
  }
  return offset;
}

PYKERN_INLINE void row_offsets(
    const AttentionCall& call, const AttentionView& view, const Panel& panel, int64_t* offsets) {
  const int64_t base = lead_offset(call, view, panel.batch);
  for (int i = 0; i < panel.rows; ++i) offsets[i] = base + panel.row[i] * view.row + panel.head[i] * view.head;
}

template <class T>
PYKERN_INLINE float value_of(T x) {
  if constexpr (sizeof(T) == 2) return load(&x, 1)[0];
  else return static_cast<float>(x);
}

template <class T>
PYKERN_INLINE void set_value(T& x, float value) {
  if constexpr (sizeof(T) == 2) store(&x, splat(value), 1);
  else x = static_cast<T>(value);
}

// Some elements of a row, `step` apart; zero in the other lanes.
template <class T>
PYKERN_INLINE Vec load_apart(const T* from, int64_t step, int count) {
  if constexpr (sizeof(T) == 4 || sizeof(T) == 2)
    if (step == 1) return load(from, count);
  float values[kLanes] = {};
  for (int i = 0; i < count; ++i) values[i] = value_of(from[i * step]);
  return load(values);
}

template <class T>
PYKERN_INLINE void store_apart(T* to, int64_t step, Vec values, int count) {
  if constexpr (sizeof(T) == 4 || sizeof(T) == 2)
    if (step == 1) return store(to, values, count);
  for (int i = 0; i < count; ++i) set_value(to[i * step], values[i]);
}

// Rows of a tensor as rows of fp32, `stride` apart; columns up to whole vectors are zero.
__attribute__((noinline)) void load_rows(
    const AttentionView& view, const int64_t* offsets, int rows, int64_t columns, float* to, int64_t stride) {
  with_type(view.type, [&](auto type) PYKERN_LAMBDA {
    using T = decltype(type);
    for (int r = 0; r < rows; ++r) {
      const T* const from = static_cast<const T*>(view.data) + offsets[r];
      each(columns, [&](int64_t c, int count) PYKERN_LAMBDA {
        store(to + r * stride + c, load_apart(from + c * view.column, view.column, count));
      });
    }
  });
}

// The same transposed: a row for each of `columns` columns, each kPanelRows wide. What lies beyond `rows` in the last
// vector is zero.
__attribute__((noinline)) void load_transposed(
    const AttentionView& view, const int64_t* offsets, int rows, int64_t columns, float factor, float* to) {
  with_type(view.type, [&](auto type) PYKERN_LAMBDA {
    using T = decltype(type);
    const T* const data = static_cast<const T*>(view.data);
    for (int r = 0; r < rows; r += kLanes) {
      each(columns, [&](int64_t c, int count) PYKERN_LAMBDA {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = r + i < rows ? load_apart(data + offsets[r + i] + c * view.column, view.column, count) : Vec{};
        transpose(block);
        for (int i = 0; i < count; ++i) store(to + (c + i) * kPanelRows + r, block[i] * splat(factor));
      });
    }
  });
}

// The reverse, each query row multiplied by its own factor.
__attribute__((noinline)) void store_transposed(
    const AttentionView& view, const int64_t* offsets, int rows, int64_t columns, const float* factors,
    const float* from) {
  with_type(view.type, [&](auto type) PYKERN_LAMBDA {
    using T = decltype(type);
    T* const data = static_cast<T*>(view.data);
    for (int r = 0; r < rows; r += kLanes) {
      const Vec factor = load(factors + r);
      each(columns, [&](int64_t c, int count) PYKERN_LAMBDA {
        Vec block[kLanes];
        for (int i = 0; i < kLanes; ++i)
          block[i] = i < count ? load(from + (c + i) * kPanelRows + r) * factor : Vec{};
        transpose(block);
        for (int i = 0; i < kLanes; ++i) {
          if (r + i == rows) break;
          store_apart(data + offsets[r + i] + c * view.column, view.column, block[i], count);
        }
      });
    }
  });
}

// A value for each row of a panel.
PYKERN_INLINE void load_heads(
    const AttentionCall& call, const AttentionView& view, const Panel& panel, float* to) {
  int64_t offsets[kPanelRows];
  row_offsets(call, view, panel, offsets);
  with_type(view.type, [&](auto type) PYKERN_LAMBDA {
    const auto* const data = static_cast<const decltype(type)*>(view.data);
    for (int i = 0; i < kPanelRows; ++i)
      to[i] = i < panel.rows ? value_of(data[offsets[i]]) : 0;
  });
}

// Blocks of keys begin where any panel's do, so that a row's result does not depend on the rows that share its panel.
PYKERN_INLINE int64_t end_of_block(int64_t key) { return (key / kBlockKeys + 1) * kBlockKeys; }

// Keys `first` to first + count of one key head, as rows of fp32: in place, or in `own`.
struct Keys {
  int64_t first;
  int count;
  const float *key, *value;
  int64_t key_stride, value_stride;
};

PYKERN_INLINE const float* key_rows(
    const AttentionCall& call, const AttentionView& view, int64_t batch, int64_t head, int64_t first, int count,
    int64_t columns, float* own, int64_t& stride) {
  const Pages& pages = call.pages;
  const Heads in_pages = {view.data, view.lead[0], view.row, view.head};
  const int64_t base = head * view.head + (pages.table ? 0 : lead_offset(call, view, batch));
  const auto offset_of = [&](int64_t key) PYKERN_LAMBDA {
    return base + (pages.table ? pages.offset_of(in_pages, call.sequence, static_cast<int>(key)) : key * view.row);
  };
  const bool in_rows = !pages.table || pages.by_size.divide(static_cast<int>(first)) ==
          pages.by_size.divide(static_cast<int>(first + count - 1));
  if (in_rows && view.type == Element::f32 && (view.column == 1 || columns == 1)) {
    stride = view.row;
    return static_cast<const float*>(view.data) + offset_of(first);
  }
  int64_t offsets[kBlockKeys];
  for (int i = 0; i < count; ++i) offsets[i] = offset_of(first + i);
  stride = round_up(columns, kLanes);
  load_rows(view, offsets, count, columns, own, stride);
  return own;
}

// Floats of memory for the keys or values of a block.
PYKERN_INLINE int64_t keys_floats(int64_t columns) { return kBlockKeys * round_up(columns, kLanes); }

PYKERN_INLINE Keys load_keys(
    const AttentionCall& call, int64_t batch, int64_t head, int64_t first, int64_t end, float* own_key,
    float* own_value) {
  Keys keys;
  keys.first = first;
  keys.count = static_cast<int>(smaller_of(end_of_block(first), end) - first);
  keys.key = key_rows(call, call.key, batch, head, first, keys.count, call.size, own_key, keys.key_stride);
  keys.value =
      key_rows(call, call.value, batch, head, first, keys.count, call.value_size, own_value, keys.value_stride);
  return keys;
}

PYKERN_INLINE bool meet(const Panel& panel, const Keys& keys) {
  return keys.first < panel.end_key && keys.first + keys.count > panel.first_key;
}

// What scores need to know of a panel besides its place.
struct ScoreInputs {
  const float* query;      // (size, kPanelRows)
  float* slopes;           // one a row; null: none
  int64_t* mask_offsets;   // of each row
  float* mask;             // a tile for it
};

// What query · key is multiplied by before the softcap, or where there is none, for good.
PYKERN_INLINE float query_factor(const AttentionCall& call) {
  return call.softcap > 0 ? static_cast<float>(double{call.scale} / call.softcap) : call.scale;
}

// Whether the query is multiplied by that factor before the product: only where that rounds nothing, since products of 16
// bits are exact.
PYKERN_INLINE bool factor_in_query(float factor) {
  uint32_t bits;
  memcpy(&bits, &factor, sizeof bits);
  return (bits & 0x7fffff) == 0;
}

// body(key, column, place in the tile) for every vector of a tile.
template <class Body>
PYKERN_INLINE void each_score(const Panel& panel, int keys, Body body) {
  const int columns = panel.vectors * kLanes;
  for (int k = 0; k < keys; ++k)
    for (int column = 0; column < columns; column += kLanes) body(k, column, k * kPanelRows + column);
}

// x becomes softcap · tanh(x); `slopes`, where given, the derivative of that by x · softcap.
__attribute__((noinline)) void cap_scores(
    const AttentionCall& call, const Panel& panel, int keys, float* tile, float* slopes) {
  const Vec cap = splat(call.softcap);
  each_score(panel, keys, [&](int, int, int at) PYKERN_LAMBDA {
    Vec slope;
    store(tile + at, cap * tanh(load(tile + at), slope));
    if (slopes) store(slopes + at, slope);
  });
}

PYKERN_INLINE Vec absolute(Vec x) { return (Vec)((Bits)x & 0x7fffffff); }

// Each row's place, counted from the first of the keys.
PYKERN_INLINE void row_places(const AttentionCall& call, const Panel& panel, int64_t first_key, float* places) {
  for (int i = 0; i < kPanelRows; ++i)
    places[i] = i < panel.rows ? static_cast<float>(panel.row[i] + call.offset - first_key) : 0;
}

__attribute__((noinline)) void add_alibi(
    const AttentionCall& call, const Panel& panel, const Keys& keys, const float* slopes, float* tile) {
  float places[kPanelRows];
  row_places(call, panel, keys.first, places);
  each_score(panel, keys.count, [&](int k, int column, int at) PYKERN_LAMBDA {
    const Vec distance = absolute(load(places + column) - splat(static_cast<float>(k)));
    store(tile + at, load(tile + at) - load(slopes + column) * distance);
  });
}

__attribute__((noinline)) void apply_mask(
    const AttentionCall& call, const Panel& panel, const Keys& keys, const ScoreInputs& inputs, float* tile) {
  const int64_t shift = keys.first * call.mask.column;
  int64_t offsets[kPanelRows];
  for (int i = 0; i < panel.rows; ++i) offsets[i] = inputs.mask_offsets[i] + shift;
  const bool additive = call.mask.type != Element::boolean;
  // The mask is the one tensor that is as large as the scores: the next block of it is asked for in advance, row by row
  // it is too short for the processor to guess.
  const int64_t element = call.mask.type == Element::boolean ? 1 : call.mask.type == Element::f32 ? 4 : 2;
  if (call.mask.column == 1)
    for (int i = 0; i < panel.rows; ++i)
      for (int64_t byte = 0; byte < kBlockKeys * element; byte += 64)
        __builtin_prefetch(static_cast<char*>(call.mask.data) + (offsets[i] + kBlockKeys) * element + byte, 0, 2);
  load_transposed(call.mask, offsets, panel.rows, keys.count, 1, inputs.mask);
  each_score(panel, keys.count, [&](int, int, int at) PYKERN_LAMBDA {
    const Vec mask = load(inputs.mask + at), score = load(tile + at);
    store(tile + at, additive ? score + mask : mask != Vec{} ? score : splat(-kInfinity));
  });
}

// Hides what causality and window do not allow.
__attribute__((noinline)) void hide_scores(const Panel& panel, const Keys& keys, float* tile) {
  float low[kPanelRows], high[kPanelRows];  // counted from the first of the keys
  for (int i = 0; i < kPanelRows; ++i) {
    low[i] = static_cast<float>(larger_of(panel.low[i] - keys.first, 0));
    high[i] = static_cast<float>(larger_of(smaller_of(panel.high[i] - keys.first, kBlockKeys), -1));
  }
  each_score(panel, keys.count, [&](int k, int column, int at) PYKERN_LAMBDA {
    const Vec place = splat(static_cast<float>(k));
    const Vec above = place >= load(low + column) ? load(tile + at) : splat(-kInfinity);
    store(tile + at, place <= load(high + column) ? above : splat(-kInfinity));
  });
}

PYKERN_INLINE bool all_open(const Panel& panel, const Keys& keys) {
  return keys.first >= panel.first_open && keys.first + keys.count <= panel.end_open;
}

// body(first key, count, first vector, end vector) for strips of a tile and the vectors with a row that sees one of
// their keys: products leave out the rest.
template <class Body>
PYKERN_INLINE void each_strip(const Panel& panel, const Keys& keys, Body body) {
  if (all_open(panel, keys)) return body(0, keys.count, 0, panel.vectors);
  for (int k = 0; k < keys.count; k += kStripKeys) {
    const int count = static_cast<int>(smaller_of(kStripKeys, keys.count - k));
    const int64_t first = keys.first + k, last = first + count - 1;
    const auto sees = [&](int row) { return panel.low[row] <= last && panel.high[row] >= first; };
    int begin = 0, end = panel.rows;
    while (begin < end && !sees(begin)) ++begin;
    while (begin < end && !sees(end - 1)) --end;
    body(k, count, begin / kLanes, (end + kLanes - 1) / kLanes);
  }
}

// tile = left (keys, depth) · right (depth, rows), zero where each_strip leaves it out.
PYKERN_INLINE void multiply_tile(
    const Panel& panel, const Keys& keys, const float* left, int64_t left_stride, const float* right, int64_t depth,
    float* tile) {
  each_strip(panel, keys, [&](int k, int count, int begin, int end) PYKERN_LAMBDA {
    for (int row = k; row < k + count; ++row)
      for (int v = 0; v < panel.vectors; ++v)
        if (v < begin || v >= end) store(tile + row * kPanelRows + v * kLanes, Vec{});
    const int at = k * kPanelRows + begin * kLanes;
    if (begin < end)
      multiply<Along::depth>(
          {left + k * left_stride, left_stride, right + begin * kLanes, kPanelRows, tile + at, kPanelRows, depth},
          count, end - begin);
  });
}

// The scores of a panel with some keys, -inf where hidden. `cap_slopes` as in cap_scores.
PYKERN_INLINE void find_scores(
    const AttentionCall& call, const Panel& panel, const Keys& keys, const ScoreInputs& inputs, float* tile,
    float* cap_slopes) {
  multiply_tile(panel, keys, keys.key, keys.key_stride, inputs.query, call.size, tile);
  const float factor = query_factor(call);
  if (!factor_in_query(factor))
    each_score(panel, keys.count, [&](int, int, int at) PYKERN_LAMBDA {
      store(tile + at, load(tile + at) * splat(factor));
    });
  if (call.softcap > 0) cap_scores(call, panel, keys.count, tile, cap_slopes);
  if (inputs.slopes) add_alibi(call, panel, keys, inputs.slopes, tile);
  if (call.mask.data) apply_mask(call, panel, keys, inputs, tile);
  if (!all_open(panel, keys)) hide_scores(panel, keys, tile);
}

// Floats that load_inputs takes.
PYKERN_INLINE int64_t inputs_floats(const AttentionCall& call) { return (call.size + 3) * kPanelRows; }

// The mask's tile is the caller's: it is one for all panels.
PYKERN_INLINE ScoreInputs load_inputs(const AttentionCall& call, const Panel& panel, float* mask, Arena& arena) {
  ScoreInputs inputs = {};
  float* const query = arena.take(call.size * kPanelRows);
  int64_t offsets[kPanelRows];
  row_offsets(call, call.query, panel, offsets);
  const float factor = query_factor(call);
  load_transposed(call.query, offsets, panel.rows, call.size, factor_in_query(factor) ? factor : 1, query);
  inputs.query = query;
  if (call.slopes.data) {
    inputs.slopes = arena.take(kPanelRows);
    load_heads(call, call.slopes, panel, inputs.slopes);
  }
  if (call.mask.data) {
    inputs.mask_offsets = reinterpret_cast<int64_t*>(arena.take(2 * kPanelRows));
    row_offsets(call, call.mask, panel, inputs.mask_offsets);
    inputs.mask = mask;
  }
  return inputs;
}

// What each weight is multiplied by: zero where it is dropped.
__attribute__((noinline)) void dropout_factors(
    const AttentionCall& call, const Panel& panel, const Keys& keys, float* tile) {
  const uint64_t seed = call.rng[0], offset = call.rng[1];
  uint32_t low[kPanelRows] = {}, high[kPanelRows] = {};
  const int64_t first_group = keys.first / 4, end = keys.first + keys.count;
  for (int i = 0; i < panel.rows; ++i) {
    const uint64_t row = number_of(call.random_rows, panel, i), counter = row * call.random_fours + first_group;
    low[i] = static_cast<uint32_t>(counter);
    high[i] = static_cast<uint32_t>(counter >> 32);
  }
  for (int v = 0; v < panel.vectors; ++v) {
    Bits first_low, first_high;
    memcpy(&first_low, low + v * kLanes, sizeof first_low);
    memcpy(&first_high, high + v * kLanes, sizeof first_high);
    for (int64_t group = first_group; group * 4 < end; ++group) {
      const Bits sum = first_low + static_cast<uint32_t>(group - first_group);
      const Bits carry = sum < first_low ? Bits{} + 1 : Bits{};
      Bits words[4] = {sum, first_high + carry, Bits{} + static_cast<uint32_t>(offset),
                       Bits{} + static_cast<uint32_t>(offset >> 32)};
      philox(words, seed);
      for (int i = 0; i < 4; ++i) {
        const int64_t k = group * 4 + i - keys.first;
        if (k < 0 || k >= keys.count) continue;
        store(tile + k * kPanelRows + v * kLanes, words[i] >= call.threshold ? splat(call.kept) : Vec{});
      }
    }
  }
}

}  // namespace
}  // namespace pykern
