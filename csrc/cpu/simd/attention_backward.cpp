// Attention's backward on the CPU. With P the weights, P' what dropout leaves of them, and all tiles transposed as in
// the forward:
//   dvalue = P' · dout,   dP = dout · value' where kept,   dS = P ∘ (dP - delta),
//   dkey = scale · dS' · query,   dquery = scale · dS · key,
// dS through the derivative of the softcap for the latter two.
//
// delta is the sum of P ∘ dP over keys, less the gradient of lse. It equals the sum of dout ∘ out, but out was rounded,
// in 16 bits by far too much. So a panel of query rows goes through its keys twice: first for P and dP, whose tiles are
// kept, then for the gradients. The sum of P is found on the way and divides out what lse was rounded by.

#include "attention_tile.h"

namespace pykern {
namespace {

// What fp32 loses in a sum grows with the length of its chain of additions: sums over keys are added up in parts.
constexpr int kChain = 8;

// What a panel brings and collects; of numbers a row, of matrices kPanelRows columns but for the first two.
struct Meeting {
  Panel panel;
  ScoreInputs inputs;
  float *query, *dout;  // rows of whole vectors
  float *dout_transposed, *dquery;
  float *shift, *norm, *delta, *slope_sums;  // the weights e^(score - shift) are to be multiplied by norm
};

// For each block of keys of a panel a tile.
struct Tiles {
  float *weights, *gradient, *cap_slopes, *kept;
};

PYKERN_INLINE int64_t padded(int64_t columns) { return round_up(columns, kLanes); }

int64_t meeting_floats(const AttentionCall& call) {
  const int64_t columns = padded(call.size) + padded(call.value_size) + call.value_size + call.size;
  return inputs_floats(call) + (columns + 4) * kPanelRows;
}

int64_t tiles_floats(const AttentionCall& call, int64_t blocks) {
  return (2 + (call.softcap > 0) + (call.rng != nullptr)) * blocks * kTile;
}

Tiles take_tiles(const AttentionCall& call, int64_t blocks, Arena& arena) {
  return {
      arena.take(blocks * kTile), arena.take(blocks * kTile), call.softcap > 0 ? arena.take(blocks * kTile) : nullptr,
      call.rng ? arena.take(blocks * kTile) : nullptr};
}

Tiles tiles_of_block(const Tiles& tiles, int64_t block) {
  const auto shifted = [&](float* tile) PYKERN_LAMBDA { return tile ? tile + block * kTile : nullptr; };
  return {shifted(tiles.weights), shifted(tiles.gradient), shifted(tiles.cap_slopes), shifted(tiles.kept)};
}

// Memory for a block of keys and a mask's tile.
struct Common {
  float *key, *value, *mask;
};

int64_t common_floats(const AttentionCall& call) {
  return keys_floats(call.size) + keys_floats(call.value_size) + kTile;
}

Common take_common(const AttentionCall& call, Arena& arena) {
  return {arena.take(keys_floats(call.size)), arena.take(keys_floats(call.value_size)), arena.take(kTile)};
}

int64_t scratch(const AttentionCall& call, int64_t panel_keys, int64_t task_keys) {
  return common_floats(call) + meeting_floats(call) + tiles_floats(call, (panel_keys + kBlockKeys - 1) / kBlockKeys) +
      task_keys * (padded(call.size) + padded(call.value_size));
}

int64_t mask_scratch(const AttentionCall& call, int64_t task_keys) {
  return common_floats(call) + meeting_floats(call) + tiles_floats(call, 1) + task_keys * kPanelRows;
}

// At least one, whether masks allow it or not.
float keys_seen(const AttentionCall& call, const Panel& panel, int row) {
  const int64_t first = larger_of(panel.low[row], 0), last = smaller_of(panel.high[row], call.keys - 1);
  return static_cast<float>(larger_of(last - first + 1, 1));
}

void prepare(
    const AttentionCall& call, const AttentionGradients& gradients, const Common& common, Meeting& m, Arena& arena) {
  m.inputs = load_inputs(call, m.panel, common.mask, arena);
  m.query = arena.take(padded(call.size) * kPanelRows);
  m.dout = arena.take(padded(call.value_size) * kPanelRows);
  m.dout_transposed = arena.take(call.value_size * kPanelRows);
  m.dquery = arena.take(call.size * kPanelRows);
  m.shift = arena.take(kPanelRows);
  m.norm = arena.take(kPanelRows);
  m.delta = arena.take(kPanelRows);
  m.slope_sums = arena.take(kPanelRows);
  int64_t offsets[kPanelRows];
  row_offsets(call, call.query, m.panel, offsets);
  load_rows(call.query, offsets, m.panel.rows, call.size, m.query, padded(call.size));
  if (gradients.dout.data) {
    row_offsets(call, gradients.dout, m.panel, offsets);
    load_rows(gradients.dout, offsets, m.panel.rows, call.value_size, m.dout, padded(call.value_size));
    load_transposed(gradients.dout, offsets, m.panel.rows, call.value_size, 1, m.dout_transposed);
  }
  memset(m.dquery, 0, call.size * kPanelRows * sizeof(float));
  memset(m.slope_sums, 0, kPanelRows * sizeof(float));
  for (int i = 0; i < kPanelRows; ++i) {
    // +inf makes the weights zero: of rows in which nothing is allowed, and of those that fill up the panel. Else any
    // shift will do, as the sum of the weights divides it out again; but an exponent near zero is rounded least, and
    // weights that count are near e^lse over the number of keys.
    const float lse = i < m.panel.rows ? call.lse[number_of(call.numbers, m.panel, i)] : -kInfinity;
    m.shift[i] = lse == -kInfinity ? kInfinity : lse - __builtin_logf(keys_seen(call, m.panel, i));
  }
}

// Scores, in the weights' tile; dP; what dropout multiplies both by.
void find_products(
    const AttentionCall& call, const AttentionGradients& gradients, const Meeting& m, const Keys& keys,
    const Tiles& tiles) {
  find_scores(call, m.panel, keys, m.inputs, tiles.weights, tiles.cap_slopes);
  if (tiles.kept) dropout_factors(call, m.panel, keys, tiles.kept);
  if (!gradients.of_scores) return;
  if (!gradients.dout.data) {
    memset(tiles.gradient, 0, keys.count * kPanelRows * sizeof(float));
    return;
  }
  multiply_tile(m.panel, keys, keys.value, keys.value_stride, m.dout_transposed, call.value_size, tiles.gradient);
  if (!tiles.kept) return;
  each_score(m.panel, keys.count, [&](int, int, int at) PYKERN_LAMBDA {
    store(tiles.gradient + at, load(tiles.gradient + at) * load(tiles.kept + at));
  });
}

// Scores become e^(score - shift), whose sum over keys is added to `weights`, that of their products with dP to `products`.
template <bool with_gradient>
PYKERN_INLINE void weigh(const Meeting& m, int keys, const Tiles& tiles, float* weights, float* products) {
  for (int column = 0; column < m.panel.vectors * kLanes; column += kLanes) {
    const Vec shift = load(m.shift + column);
    Vec sum = {}, product = {};
    for (int first = 0; first < keys; first += kChain) {
      Vec part = {}, product_part = {};
      for (int k = first; k < smaller_of(first + kChain, keys); ++k) {
        const int at = k * kPanelRows + column;
        const Vec weight = exp(load(tiles.weights + at) - shift);
        store(tiles.weights + at, weight);
        part += weight;
        if constexpr (with_gradient) product_part = fma(weight, load(tiles.gradient + at), product_part);
      }
      sum += part;
      product += product_part;
    }
    store(weights + column, load(weights + column) + sum);
    store(products + column, load(products + column) + product);
  }
}

void first_pass(
    const AttentionCall& call, const AttentionGradients& gradients, const Meeting& m, const Keys& keys,
    const Tiles& tiles, float* weights, float* products) {
  find_products(call, gradients, m, keys, tiles);
  if (gradients.of_scores) weigh<true>(m, keys.count, tiles, weights, products);
  else weigh<false>(m, keys.count, tiles, weights, products);
}

// norm and delta from their sums; what each row adds to the gradient of its sink.
void finish_sums(const AttentionCall& call, const AttentionGradients& gradients, const Meeting& m) {
  float sinks[kPanelRows], dlse[kPanelRows];
  if (call.sinks.data) load_heads(call, call.sinks, m.panel, sinks);
  if (gradients.dlse.data) load_heads(call, gradients.dlse, m.panel, dlse);
  for (int column = 0; column < m.panel.vectors * kLanes; column += kLanes) {
    const Vec sink = call.sinks.data ? exp(load(sinks + column) - load(m.shift + column)) : Vec{};
    const Vec total = load(m.norm + column) + sink;
    const Vec norm = total == Vec{} ? Vec{} : 1.f / total;
    Vec delta = load(m.delta + column) * norm;
    if (gradients.dlse.data) delta -= load(dlse + column);
    store(m.norm + column, norm);
    store(m.delta + column, delta);
    store(sinks + column, -sink * norm * delta);
  }
  for (int i = 0; i < m.panel.rows; ++i) {
    const int64_t at = number_of(call.numbers, m.panel, i);
    gradients.norm[at] = m.norm[i];
    gradients.delta[at] = m.delta[i];
    if (gradients.sink_rows) gradients.sink_rows[at] = sinks[i];
  }
}

// norm and delta as an earlier task found them.
void load_sums(const AttentionCall& call, const AttentionGradients& gradients, const Meeting& m) {
  for (int i = 0; i < kPanelRows; ++i) {
    const int64_t at = number_of(call.numbers, m.panel, i < m.panel.rows ? i : 0);
    m.norm[i] = gradients.norm[at];
    m.delta[i] = gradients.delta[at];
  }
}

// dP becomes dS with respect to the scores as they enter the softmax, and the weights what dropout leaves of them.
void find_gradient(const Meeting& m, int keys, const Tiles& tiles, bool with_gradient) {
  each_score(m.panel, keys, [&](int, int column, int at) PYKERN_LAMBDA {
    const Vec weight = load(tiles.weights + at) * load(m.norm + column);
    if (with_gradient) store(tiles.gradient + at, weight * (load(tiles.gradient + at) - load(m.delta + column)));
    store(tiles.weights + at, tiles.kept ? weight * load(tiles.kept + at) : weight);
  });
}

void add_slopes(const AttentionCall& call, const Meeting& m, const Keys& keys, const float* gradient) {
  float places[kPanelRows];
  row_places(call, m.panel, keys.first, places);
  for (int column = 0; column < m.panel.vectors * kLanes; column += kLanes) {
    Vec total = {};
    for (int first = 0; first < keys.count; first += kChain) {
      Vec part = {};
      for (int k = first; k < smaller_of(first + kChain, keys.count); ++k) {
        const Vec distance = absolute(load(places + column) - splat(static_cast<float>(k)));
        part = fma(load(gradient + k * kPanelRows + column), distance, part);
      }
      total += part;
    }
    store(m.slope_sums + column, load(m.slope_sums + column) - total);
  }
}

void through_cap(const Meeting& m, int keys, const Tiles& tiles) {
  if (!tiles.cap_slopes) return;
  each_score(m.panel, keys, [&](int, int, int at) PYKERN_LAMBDA {
    store(tiles.gradient + at, load(tiles.gradient + at) * load(tiles.cap_slopes + at));
  });
}

// sums (keys, columns) += tile (keys, rows) · rows (rows, columns).
void add_to_keys(
    const Meeting& m, const Keys& keys, const float* tile, const float* rows, int64_t columns, float* sums) {
  const int64_t stride = padded(columns);
  each_strip(m.panel, keys, [&](int k, int count, int begin, int end) PYKERN_LAMBDA {
    const int64_t first = begin * kLanes, depth = smaller_of(end * kLanes, m.panel.rows) - first;
    if (depth <= 0) return;
    multiply<Along::depth>(
        {tile + k * kPanelRows + first, kPanelRows, rows + first * stride, stride, sums + k * stride, stride, depth,
         Start::add},
        count, stride / kLanes);
  });
}

void finish_rows(const AttentionCall& call, const AttentionGradients& gradients, const Meeting& m) {
  if (gradients.slope_rows)
    for (int i = 0; i < m.panel.rows; ++i) gradients.slope_rows[number_of(call.numbers, m.panel, i)] = m.slope_sums[i];
  if (!gradients.dquery.data) return;
  float factors[kPanelRows];
  for (int i = 0; i < kPanelRows; ++i) factors[i] = call.scale;
  int64_t offsets[kPanelRows];
  row_offsets(call, gradients.dquery, m.panel, offsets);
  store_transposed(gradients.dquery, offsets, m.panel.rows, call.size, factors, m.dquery);
}

// The gradients of keys or values, one row each, from their sums.
void finish_keys(
    const AttentionCall& call, const AttentionView& view, const AttentionTask& task, int64_t columns, float factor,
    const float* sums) {
  if (!view.data) return;
  const int64_t base = lead_offset(call, view, task.batch) + task.shared_head * view.head;
  with_type(view.type, [&](auto type) PYKERN_LAMBDA {
    for (int64_t k = task.first_key; k < task.end_key; ++k, sums += padded(columns)) {
      auto* const to = static_cast<decltype(type)*>(view.data) + base + k * view.row;
      each(columns, [&](int64_t c, int count) PYKERN_LAMBDA {
        store_apart(to + c * view.column, view.column, load(sums + c) * splat(factor), count);
      });
    }
  });
}

void run(
    const AttentionCall& call, const AttentionGradients& gradients, const AttentionTask& task, AttentionSides sides,
    int64_t panel_keys, float* memory) {
  const bool wants_dquery = sides.rows && gradients.dquery.data, wants_slopes = sides.rows && gradients.slope_rows;
  const bool wants_dkey = sides.keys && gradients.dkey.data;
  const bool wants_dvalue = sides.keys && gradients.dvalue.data && gradients.dout.data;

  Arena arena = {memory};
  const Common common = take_common(call, arena);
  const Tiles tiles = take_tiles(call, (panel_keys + kBlockKeys - 1) / kBlockKeys, arena);
  const int64_t sums = sides.keys ? task.end_key - task.first_key : 0;
  const int64_t key_columns = padded(call.size), value_columns = padded(call.value_size);
  float* const dkey = arena.take(sums * key_columns);
  float* const dvalue = arena.take(sums * value_columns);
  memset(dkey, 0, sums * key_columns * sizeof(float));
  memset(dvalue, 0, sums * value_columns * sizeof(float));

  for (int64_t number = task.first_panel; number < task.end_panel; ++number) {
    Meeting m;
    make_numbered_panel(call, task.batch, task.shared_head, number, m.panel);
    const int64_t first_key = larger_of(m.panel.first_key, task.first_key);
    const int64_t end_key = smaller_of(m.panel.end_key, task.end_key);
    if (!sides.rows && first_key >= end_key) continue;
    Arena rest = arena;
    prepare(call, gradients, common, m, rest);
    if (sides.rows) {
      memset(m.norm, 0, kPanelRows * sizeof(float));
      memset(m.delta, 0, kPanelRows * sizeof(float));
      for (int64_t k = first_key; k < end_key; k = end_of_block(k)) {
        const Keys keys = load_keys(call, task.batch, task.shared_head, k, end_key, common.key, common.value);
        const Tiles block = tiles_of_block(tiles, k / kBlockKeys - first_key / kBlockKeys);
        first_pass(call, gradients, m, keys, block, m.norm, m.delta);
      }
      finish_sums(call, gradients, m);
    } else {
      load_sums(call, gradients, m);
    }
    if (wants_dquery || wants_slopes || wants_dkey || wants_dvalue) {
      for (int64_t k = first_key; k < end_key; k = end_of_block(k)) {
        const Keys keys = load_keys(call, task.batch, task.shared_head, k, end_key, common.key, common.value);
        const Tiles block = tiles_of_block(tiles, sides.rows ? k / kBlockKeys - first_key / kBlockKeys : 0);
        float unused[2][kPanelRows] = {};
        if (!sides.rows) first_pass(call, gradients, m, keys, block, unused[0], unused[1]);
        find_gradient(m, keys.count, block, gradients.of_scores);
        const int64_t at = k - task.first_key;
        if (wants_dvalue)
          add_to_keys(m, keys, block.weights, m.dout, call.value_size, dvalue + at * value_columns);
        if (wants_slopes) add_slopes(call, m, keys, block.gradient);
        if (wants_dquery || wants_dkey) through_cap(m, keys.count, block);
        if (wants_dkey) add_to_keys(m, keys, block.gradient, m.query, call.size, dkey + at * key_columns);
        if (wants_dquery)
          multiply<Along::rows>(
              {keys.key, keys.key_stride, block.gradient, kPanelRows, m.dquery, kPanelRows, keys.count, Start::add},
              call.size, m.panel.vectors);
      }
    }
    if (sides.rows) finish_rows(call, gradients, m);
  }
  if (!sides.keys) return;
  finish_keys(call, gradients.dkey, task, call.size, call.scale, dkey);
  finish_keys(call, gradients.dvalue, task, call.value_size, 1, dvalue);
}

// Adds dS of one block to the sums of a mask's part, a row of kPanelRows for each key. Where the mask is broadcast over
// rows or keys, the first column or row has their sum.
void add_to_mask(const AttentionView& dmask, const Meeting& m, int keys, const float* gradient, float* sums) {
  for (int column = 0; column < m.panel.vectors * kLanes; column += kLanes) {
    const int rows = m.panel.rows - column < kLanes ? m.panel.rows - column : kLanes;
    Vec over_keys = {};
    for (int k = 0; k < keys; ++k) {
      const Vec value = first(load(gradient + k * kPanelRows + column), rows);
      float* const row = sums + k * kPanelRows;
      if (dmask.column == 0) over_keys += value;
      else if (dmask.row == 0) row[0] += sum(value);
      else store(row + column, load(row + column) + value);
    }
    if (dmask.column != 0) continue;
    if (dmask.row == 0) sums[0] += sum(over_keys);
    else store(sums + column, load(sums + column) + over_keys);
  }
}

void mask(
    const AttentionCall& call, const AttentionGradients& gradients, const AttentionMaskTask& task, float* memory) {
  const AttentionView& dmask = gradients.dmask;
  Arena arena = {memory};
  const Common common = take_common(call, arena);
  const Tiles tiles = take_tiles(call, 1, arena);
  const int64_t keys_of_part = dmask.column == 0 ? 1 : task.end_key - task.first_key;
  float* const sums = arena.take(keys_of_part * kPanelRows);
  memset(sums, 0, keys_of_part * kPanelRows * sizeof(float));

  const int64_t part = lead_offset(call, dmask, task.batch);
  const int64_t end_head = dmask.head == 0 ? call.heads : task.head + 1;
  for (int64_t batch = task.batch; batch < call.batches; ++batch) {
    if (lead_offset(call, dmask, batch) != part) continue;
    for (int64_t head = task.head; head < end_head; ++head) {
      for (int64_t row = task.first_row; row < task.end_row; row += kPanelRows) {
        Meeting m;
        make_panel(call, batch, head, row, m.panel);
        const int64_t first_key = larger_of(m.panel.first_key, task.first_key);
        const int64_t end_key = smaller_of(m.panel.end_key, task.end_key);
        if (first_key >= end_key) continue;
        Arena rest = arena;
        prepare(call, gradients, common, m, rest);
        load_sums(call, gradients, m);
        for (int64_t k = first_key; k < end_key; k = end_of_block(k)) {
          const Keys keys = load_keys(call, batch, head / call.group, k, end_key, common.key, common.value);
          float unused[2][kPanelRows] = {};
          first_pass(call, gradients, m, keys, tiles, unused[0], unused[1]);
          find_gradient(m, keys.count, tiles, true);
          const int64_t at = dmask.column == 0 ? 0 : k - task.first_key;
          add_to_mask(dmask, m, keys.count, tiles.gradient, sums + at * kPanelRows);
        }
      }
    }
  }

  float ones[kPanelRows];
  int64_t offsets[kPanelRows];
  const int rows = dmask.row == 0 ? 1 : static_cast<int>(task.end_row - task.first_row);
  const int64_t base = part + task.head * dmask.head + task.first_key * dmask.column;
  for (int i = 0; i < kPanelRows; ++i) {
    ones[i] = 1;
    offsets[i] = base + (task.first_row + i) * dmask.row;
  }
  store_transposed(dmask, offsets, rows, keys_of_part, ones, sums);
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::AttentionBackwardKernels PYKERN_TABLE(attention_backward) = {
    pykern::scratch, pykern::run, pykern::mask_scratch, pykern::mask};
