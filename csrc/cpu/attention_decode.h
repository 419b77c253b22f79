// What csrc/cpu/attention_decode.cpp asks of simd/attention_decode.cpp. Plain data: this header is compiled for every
// instruction set.
//
// The keys that a sequence's tokens see are cut into parts of kPartKeys: a rule that knows neither threads nor other
// sequences, so that results do not depend on them. Each part leaves a state for each key head; the states of a
// sequence are combined in order.

#pragma once

#include "../include/pykern/sequences.h"
#include "isa.h"

namespace pykern {

constexpr int kPartKeys = 256;

// A tensor (batch, length, heads, size) stored in any order.
struct Strided {
  Heads heads;
  int64_t column;
};

struct DecodeCall {
  DType dtype;               // of query, caches and out
  Strided query, key, value;
  void* out;                 // (batch, tokens, heads, value_size)
  float* lse;                // (batch, heads, tokens)
  const float* slopes;       // (heads,), or with slopes_batch = heads (batch, heads); null: none
  const float* sinks;        // (heads,); null: none
  int64_t slopes_batch;
  Pages pages;
  int tokens, heads, group, size, value_size;
  float scale, softcap;      // softcap is zero for none
};

// A part of a sequence's keys, met by the rows of some key heads.
struct DecodeTask {
  int sequence;
  Band band;
  Range keys, heads;
  float* states;  // of these heads; null: there is no other part
};

struct DecodeKernels {
  // Floats of what a part leaves for one key head, and of the memory that run() takes.
  int64_t (*state)(const DecodeCall&);
  int64_t (*scratch)(const DecodeCall&, int heads_a_task);
  // Where a sequence has one part, its results are written; else its states.
  void (*run)(const DecodeCall&, const DecodeTask* first, const DecodeTask* end, float* scratch);
  // The results of one key head from the states of all parts, which are `stride` apart.
  void (*combine)(const DecodeCall&, int sequence, int head, const float* states, int64_t stride, int64_t parts);
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::DecodeKernels, attention_decode)
