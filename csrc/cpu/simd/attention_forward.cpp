// Attention's forward on the CPU: a panel of query rows keeps its maxima, sums and outputs while it meets the blocks of
// keys that it may see, in order.

#include "attention_tile.h"

namespace pykern {
namespace {

// What a panel carries from block to block: for each row the largest score so far, the sum of the weights over e to the
// power of that, and the output so, transposed.
struct Running {
  Panel panel;
  ScoreInputs inputs;
  float *top, *sum, *out;
};

int64_t scratch(const AttentionCall& call, int64_t panels) {
  const int64_t carried = inputs_floats(call) + (2 + call.value_size) * kPanelRows;
  const int64_t masks = call.mask.data ? kTile : 0, dropped = call.rng ? kTile : 0;
  return smaller_of(panels, kPanelsTogether) * carried + keys_floats(call.size) + keys_floats(call.value_size) +
      kTile + masks + dropped;
}

void start(const AttentionCall& call, Running& running, float* mask, Arena& arena) {
  running.inputs = load_inputs(call, running.panel, mask, arena);
  running.top = arena.take(kPanelRows);
  running.sum = arena.take(kPanelRows);
  running.out = arena.take(call.value_size * kPanelRows);
  // A sink is a key without a value.
  if (call.sinks.data) load_heads(call, call.sinks, running.panel, running.top);
  for (int i = 0; i < kPanelRows; ++i) {
    if (!call.sinks.data) running.top[i] = -kInfinity;
    running.sum[i] = running.top[i] == -kInfinity ? 0 : 1;
  }
  memset(running.out, 0, call.value_size * kPanelRows * sizeof(float));
}

// Scores become weights over e^top; gives what earlier sums and outputs are to be multiplied by.
PYKERN_INLINE void weigh(Running& running, int keys, float* tile, float* correction) {
  for (int column = 0; column < running.panel.vectors * kLanes; column += kLanes) {
    const Vec before = load(running.top + column);
    Vec top = before;
    for (int k = 0; k < keys; ++k) {
      const Vec score = load(tile + k * kPanelRows + column);
      top = score > top ? score : top;
    }
    const Vec base = top == splat(-kInfinity) ? Vec{} : top;
    Vec sum = {};
    for (int k = 0; k < keys; ++k) {
      const Vec weight = exp(load(tile + k * kPanelRows + column) - base);
      store(tile + k * kPanelRows + column, weight);
      sum += weight;
    }
    const Vec factor = exp(before - base);
    store(running.sum + column, fma(load(running.sum + column), factor, sum));
    store(running.top + column, top);
    store(correction + column, factor);
  }
}

void finish(const AttentionCall& call, const Running& running) {
  const Panel& panel = running.panel;
  float factors[kPanelRows];
  for (int i = 0; i < panel.vectors * kLanes; ++i) {
    const float sum = running.sum[i];
    factors[i] = sum == 0 ? 0 : 1 / sum;
    if (i >= panel.rows) continue;
    const int64_t at = number_of(call.numbers, panel, i);
    // Rounded once: what is computed from lse has no more digits than it.
    call.lse[at] = sum == 0 ? -kInfinity : static_cast<float>(running.top[i] + __builtin_log(double{sum}));
  }
  int64_t offsets[kPanelRows];
  row_offsets(call, call.out, panel, offsets);
  store_transposed(call.out, offsets, panel.rows, call.value_size, factors, running.out);
}

void run(const AttentionCall& call, const AttentionTask& task, float* memory) {
  Running running[kPanelsTogether];
  for (int64_t first = task.first_panel; first < task.end_panel; first += kPanelsTogether) {
    const int count = static_cast<int>(smaller_of(kPanelsTogether, task.end_panel - first));
    Arena arena = {memory};
    float* const own_key = arena.take(keys_floats(call.size));
    float* const own_value = arena.take(keys_floats(call.value_size));
    float* const tile = arena.take(kTile);
    float* const mask = call.mask.data ? arena.take(kTile) : nullptr;
    float* const kept = call.rng ? arena.take(kTile) : nullptr;
    int64_t first_key = call.keys, end_key = 0;
    for (int i = 0; i < count; ++i) {
      make_numbered_panel(call, task.batch, task.shared_head, first + i, running[i].panel);
      start(call, running[i], mask, arena);
      first_key = smaller_of(first_key, running[i].panel.first_key);
      end_key = larger_of(end_key, running[i].panel.end_key);
    }
    for (int64_t k = first_key; k < end_key; k = end_of_block(k)) {
      const Keys keys = load_keys(call, task.batch, task.shared_head, k, end_key, own_key, own_value);
      for (int i = 0; i < count; ++i) {
        Running& now = running[i];
        if (!meet(now.panel, keys)) continue;
        find_scores(call, now.panel, keys, now.inputs, tile, nullptr);
        float correction[kPanelRows];
        weigh(now, keys.count, tile, correction);
        if (kept) {
          dropout_factors(call, now.panel, keys, kept);
          each_score(now.panel, keys.count, [&](int, int, int at) PYKERN_LAMBDA {
            store(tile + at, load(tile + at) * load(kept + at));
          });
        }
        multiply<Along::rows>(
            {keys.value, keys.value_stride, tile, kPanelRows, now.out, kPanelRows, keys.count, Start::scale,
             correction},
            call.value_size, now.panel.vectors);
      }
    }
    for (int i = 0; i < count; ++i) finish(call, running[i]);
  }
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::AttentionForwardKernels PYKERN_TABLE(attention_forward) = {pykern::scratch, pykern::run};
