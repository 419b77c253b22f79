// What csrc/cpu/moe_route.cpp asks of csrc/cpu/simd/moe_route.cpp.

#pragma once

#include "../include/pykern/moe_route.h"
#include "../include/pykern/rows.h"
#include "isa.h"

namespace pykern {

struct RouteForward {
  Router router;
  Rows logits;
  const float* bias;  // (experts,), or null
  ExpertIds replay;   // data is null where experts are to be chosen
  float* weights;     // (tokens, top_k)
  int64_t* ids;       // (tokens, top_k)
};

struct RouteBackward {
  Router router;
  Rows logits;
  const float* dweights;  // (tokens, top_k)
  ExpertIds ids;
  void* dlogits;  // (tokens, experts)
};

// One function per DType of logits.
struct RouteKernels {
  void (*forward[kDTypes])(const RouteForward&, int64_t first_token, int64_t end_token);
  void (*backward[kDTypes])(const RouteBackward&, int64_t first_token, int64_t end_token);
};

}  // namespace pykern

PYKERN_DECLARE_TABLES(pykern::RouteKernels, moe_route)
