// What attention.cpp and attention_packed.cpp ask of simd/attention_forward.cpp and attention_backward.cpp. Plain data:
// this header is compiled for every instruction set.
//
// Query rows that share a key head are numbered head by head and cut into panels: up to kPanelRows rows of one head, or
// several whole heads where they are short. A panel is the unit of work.

#pragma once

#include <cstdint>

#include "../include/pykern/sequences.h"
#include "isa.h"

namespace pykern {

enum class Element { f32, f16, bf16, f64, boolean };

constexpr int kPanelRows = 64;
// With a panel these make a tile of scores that stays in the first-level cache beside the keys.
constexpr int kBlockKeys = 64;
// Panels for which a block of keys is read once, so that converting 16 bits to fp32 costs little.
constexpr int kPanelsTogether = 4;
constexpr int kMaxLead = 61;  // torch has 64 dimensions

// A tensor (…, length, heads, columns), though stored in any order; strides are in elements, zero where broadcast. Keys
// in pages have lead[0] from page to page.
struct AttentionView {
  void* data;  // null: not given, or for a gradient not wanted
  Element type;
  int64_t lead[kMaxLead], row, head, column;
};

// The number of a query row: first + batch · … + head · … + row · …
struct RowNumbers {
  int64_t first, batch, head, row;
};

// Of packed sequences each is a call of its own, a batch of one: its tensors begin at its rows.
struct AttentionCall {
  AttentionView query, key, value, mask, slopes, sinks, out;
  float* lse;
  RowNumbers numbers;  // of rows in lse and whatever else has one number a row
  int lead_dims;
  int64_t lead[kMaxLead];
  int64_t batches, length, keys, heads, group, size, value_size;
  int64_t panel_heads, panels_a_head, panels;  // the last of one key head
  int64_t left, right, offset;                 // limits so large that nothing overflows stand for none
  float scale, softcap;                        // softcap is zero for none
  Pages pages;                                 // without a table keys are in rows
  int sequence;                                // whose pages they are
  const int64_t* rng;                          // null: no dropout
  RowNumbers random_rows;                      // each has random words of its own,
  int64_t random_fours;                        // this many times four
  uint32_t threshold;                          // a weight is kept where its random word is at least this,
  float kept;                                  // and then multiplied by this
};

// Consecutive panels and keys of one key head.
struct AttentionTask {
  int64_t batch, shared_head, first_panel, end_panel, first_key, end_key;
};

struct AttentionGradients {
  AttentionView dout, dlse;
  AttentionView dquery, dkey, dvalue, dmask;
  // Of each query row, by its number: what its weights are to be multiplied by, the sum of its weights times their
  // gradients, and what it adds to the gradients of slopes and sinks; the latter are null where not wanted.
  float *norm, *delta, *slope_rows, *sink_rows;
  bool of_scores;  // whether more is wanted than dvalue
};

// Which of the gradients a task gives: of its panels' rows, for which it must have all keys, and of its keys, for which
// it must have all panels. Keys alone need norm and delta, which come with the rows.
struct AttentionSides {
  bool rows, keys;
};

// A part of the mask: rows and keys for the batches and heads that read the same mask as these.
struct AttentionMaskTask {
  int64_t batch, head, first_row, end_row, first_key, end_key;
};

// Each takes scratch memory, of as many floats as its companion says.
struct AttentionForwardKernels {
  int64_t (*scratch)(const AttentionCall&, int64_t panels);
  void (*run)(const AttentionCall&, const AttentionTask&, float* scratch);
};

struct AttentionBackwardKernels {
  // panel_keys is the most keys that a panel of a task with rows sees; without, one block.
  int64_t (*scratch)(const AttentionCall&, int64_t panel_keys, int64_t task_keys);
  void (*run)(
      const AttentionCall&, const AttentionGradients&, const AttentionTask&, AttentionSides, int64_t panel_keys,
      float* scratch);
  int64_t (*mask_scratch)(const AttentionCall&, int64_t task_keys);
  void (*mask)(const AttentionCall&, const AttentionGradients&, const AttentionMaskTask&, float* scratch);
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::AttentionForwardKernels, attention_forward)
PYKERN_DECLARE_TABLES(pykern::AttentionBackwardKernels, attention_backward)
