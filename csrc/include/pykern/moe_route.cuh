// The router: a token's best experts and their weights, and the gradient of its logits. Each is one launch.
//
// A team of lanes has a token, a lane every kLanes-th expert, in registers. The best expert is taken out top_k times:
// the largest key of the team, then the lowest id that has it. Only integers are compared, the bits of a float ordered
// as floats are, with NaN above them all; so the order is total, and ids are valid and distinct whatever the logits.
// The maximum and the minimum over a warp are one instruction each. Where 16-bit logits decide, key and id fit into one
// integer, and a round is one maximum.
//
// Nothing is added up between tokens, and within one in an order that its experts' ids alone decide: a token's bits do
// not depend on its place.

#pragma once

#include "device.cuh"

#include "moe_route.h"
#include "vector.cuh"

namespace pykern {

constexpr int kRouteThreads = 128;

// Logits of all tokens; strides are in elements.
struct Logits {
  const void* data;
  int64_t token_stride, expert_stride;
};

struct RouteArgs {
  Router router;
  Logits logits;
  int64_t tokens;
  const void* bias;  // (experts,), or null
  DType bias_type;
  int group_lanes;   // that share a group: a power of two
  ExpertIds replay;  // data is null where experts are to be chosen
  float* weights;    // (tokens, top_k)
  int64_t* ids;      // (tokens, top_k)
};

struct RouteBackwardArgs {
  Router router;
  Logits logits;
  int64_t tokens;
  const float* dweights;  // (tokens, top_k)
  ExpertIds ids;
  void* dlogits;  // (tokens, experts)
};

// Keys: integers in the order of the floats, in which the zeros are equal.
constexpr int kFirst = 0x7fffffff;  // of NaN
constexpr int kLowest = static_cast<int>(0x807fffffu);  // of -∞
constexpr int kBelow = static_cast<int>(0x80400000u);  // of no float: under -∞ even where ids are packed in
constexpr int kNone = static_cast<int>(0x80000000u);  // of experts that do not exist or are taken

__device__ __forceinline__ int key_of(float value) {
  const int bits = __float_as_int(value + 0.f);  // -0 becomes +0
  return value == value ? bits ^ (bits >> 31 & kFirst) : kFirst;
}

__device__ __forceinline__ float value_of(int key) { return __int_as_float(key ^ (key >> 31 & kFirst)); }

// A key of a 16-bit float leaves this many low bits of its 32 unused, which an id fits into; lower ids are larger.
constexpr int kIdMask = kMostExperts - 1;

__device__ __forceinline__ int packed_key(int key, int id) { return (key & ~kIdMask) | (kIdMask - id); }
__device__ __forceinline__ int packed_id(int key) { return kIdMask - (key & kIdMask); }

// The lanes of a warp that have a token together, and what they do together. All of a warp's lanes come along, those
// without a token too. kLanes, a power of two, is no less than top_k: lane j has the token's slot j.
template <int lanes, int each>
class TokenTeam {
 public:
  static constexpr int kLanes = lanes, kEach = each;
  static constexpr int kTeams = kRouteThreads / kLanes;  // of a block
  static constexpr int kExperts = kLanes * kEach;
  using Values = float[kEach];
  using Keys = int[kEach];

  __device__ __forceinline__ TokenTeam()
      : lane(threadIdx.x % kLanes), index(threadIdx.x / kLanes), token(int64_t{blockIdx.x} * kTeams + index) {}

  __device__ __forceinline__ int expert(int i) const { return i * kLanes + lane; }

  static __device__ __forceinline__ int largest(int value) {
    if constexpr (kLanes == kWarp) {
      return __reduce_max_sync(kFullWarp, value);
    } else {
#pragma unroll
      for (int distance = kLanes / 2; distance > 0; distance /= 2)
        value = max(value, __shfl_xor_sync(kFullWarp, value, distance));
      return value;
    }
  }
  static __device__ __forceinline__ int smallest(int value) { return ~largest(~value); }
  static __device__ __forceinline__ float largest(float value) { return value_of(largest(key_of(value))); }

  // Every lane ends with the same bits: both lanes of a pair add the same two numbers. A plain sum could be fused with
  // the product that one of them comes from.
  static __device__ __forceinline__ float sum(float value) {
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2)
      value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, distance));
    return value;
  }

  // The token's logits, -∞ for experts that do not exist. Returns whether one of them is NaN.
  template <class T>
  __device__ __forceinline__ bool load(const Logits& logits, int experts, Values& x) const {
    const T* const row = static_cast<const T*>(logits.data) + token * logits.token_stride;
    int nan = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      x[i] = expert(i) < experts ? Element<T>::widen(row[expert(i) * logits.expert_stride]) : -INFINITY;
      nan |= x[i] != x[i];
    }
    return largest(nan) != 0;
  }

  const int lane;
  const int index;  // of the team in its block
  const int64_t token;
};

// Scores.

// e^(x - top) for x <= top, where the order of experts hangs on it: the rounding of a difference far below zero would
// cost many ulps, so it is taken along.
__device__ __forceinline__ float exp_difference(float x, float top) {
  const float d = x - top, back = d - x;
  const float rest = (x - (d - back)) - (top + back);
  const float power = expf(d);
  return rest == rest ? fmaf(power, rest, power) : power;
}

// σ(x), and σ(-x), neither of which loses digits.
__device__ __forceinline__ float sigmoid(float x, float& opposite) {
  const float tail = expf(-fabsf(x)), sum = 1.f + tail;
  const float small = __fdiv_rn(tail, sum), large = __fdiv_rn(1.f, sum);
  opposite = x < 0.f ? large : small;
  return x < 0.f ? small : large;
}

__device__ __forceinline__ float sigmoid(float x) {
  const float tail = expf(-fabsf(x));
  return __fdiv_rn(x < 0.f ? tail : 1.f, 1.f + tail);
}

// The softmax's maximum and denominator over all experts, of a row without NaN.
struct Softmax {
  float top, sum;
};

template <class Team>
__device__ __forceinline__ float largest_logit(const Team& team, const typename Team::Values& x) {
  float top = x[0];
#pragma unroll
  for (int i = 1; i < Team::kEach; ++i) top = fmaxf(top, x[i]);
  return team.largest(top);
}

template <class Team>
__device__ __forceinline__ Softmax softmax_of(const Team& team, const typename Team::Values& x) {
  const float top = largest_logit(team, x);
  // With the rounding error of each step carried along: the sum's error is in every weight.
  float sum = 0, lost = 0;
#pragma unroll
  for (int i = 0; i < Team::kEach; ++i) {
    const float term = expf(x[i] - top) - lost, next = sum + term;
    lost = (next - sum) - term;
    sum = next;
  }
  return {top, team.sum(sum)};
}

// The renormalised score of each lane's chosen logit; -∞ stands for a dropped slot.
template <class Team>
__device__ __forceinline__ float renormalized(const Team& team, Score score, float x) {
  const float top = team.largest(x);
  float share;
  if (score == Score::softmax) {
    share = expf(x - top);
  } else {
    // σ(x) = eˣ · σ(-x); where all are small, the largest exponential is taken out, which leaves the quotient.
    float opposite;
    share = sigmoid(x, opposite);
    if (top < 0.f) share = expf(x - top) * opposite;
  }
  return __fdiv_rn(share, team.sum(share));  // exactly 1 where there is but one
}

// The choice.

__device__ __forceinline__ float load_bias(const RouteArgs& a, int expert) {
  if (a.bias_type == DType::f32) return static_cast<const float*>(a.bias)[expert];
  if (a.bias_type == DType::f16) return Element<__half>::widen(static_cast<const __half*>(a.bias)[expert]);
  return Element<__nv_bfloat16>::widen(static_cast<const __nv_bfloat16*>(a.bias)[expert]);
}

template <class Team>
__device__ __forceinline__ void biased_keys(
    const RouteArgs& a, const Team& team, const typename Team::Values& x, typename Team::Keys& keys) {
  const bool softmax = a.router.score == Score::softmax;
  Softmax all = {};
  if (softmax) all = softmax_of(team, x);
#pragma unroll
  for (int i = 0; i < Team::kEach; ++i) {
    keys[i] = kNone;
    if (team.expert(i) >= a.router.experts) continue;
    const float score = softmax ? __fdiv_rn(exp_difference(x[i], all.top), all.sum) : sigmoid(x[i]);
    keys[i] = key_of(score + load_bias(a, team.expert(i)));
  }
}

// The two largest keys.
struct BestTwo {
  int first = kNone, second = kNone;

  __device__ __forceinline__ void add(int key) {
    second = max(second, min(first, key));
    first = max(first, key);
  }
};

// Gives the experts of groups that are not among the best the key `masked`. Keys are those of scores, or without a bias
// of logits, of which `top` is the largest. `board` holds an integer for each expert.
template <class Team>
__device__ __forceinline__ void mask_groups(
    const RouteArgs& a, const Team& team, float top, int masked, typename Team::Keys& keys, int* board) {
  const Router& router = a.router;
  const int groups = router.groups, size = router.experts / groups;
  const int share = a.group_lanes;
#pragma unroll
  for (int i = 0; i < Team::kEach; ++i)
    if (team.expert(i) < router.experts) board[team.expert(i)] = keys[i];
  __syncwarp();

  // What a group is worth comes to stand where its first expert's key was.
  const auto score = [&](int key) {
    const float value = value_of(key);
    return a.bias ? value : router.score == Score::sigmoid ? sigmoid(value) : exp_difference(value, top);
  };
  const int part = team.lane % share, turns = (size + share - 1) / share;
  for (int first = 0; first < groups; first += Team::kLanes / share) {
    const int group = first + team.lane / share;
    int* const own = board + group * size;
    BestTwo best;
    if (group < groups) {
      // Groups begin at different turns: in step, they would often ask for the same bank.
      for (int n = 0, turn = group % turns; n < turns; ++n) {
        const int e = turn * share + part;
        if (e < size) best.add(own[e]);
        if (++turn == turns) turn = 0;
      }
    }
    for (int distance = share / 2; distance > 0; distance /= 2) {
      const int second = __shfl_xor_sync(kFullWarp, best.second, distance);
      best.add(__shfl_xor_sync(kFullWarp, best.first, distance));
      best.add(second);
    }
    __syncwarp();
    if (part > 0 || group >= groups) continue;
    const bool alone = size == 1 || router.group_score == GroupScore::max;
    own[0] = alone ? best.first : key_of(score(best.first) + score(best.second));
  }
  __syncwarp();

  unsigned chosen = 0;  // a bit for each group that this lane ranks
  for (int n = 0, group = team.lane; group < groups; ++n, group += Team::kLanes) {
    const int worth = board[group * size];
    int before = 0;
    for (int other = 0; other < groups; ++other) {
      const int theirs = board[other * size];
      before += theirs > worth || (theirs == worth && other < group);
    }
    chosen |= static_cast<unsigned>(before < router.top_groups) << n;
  }
  __syncwarp();
  for (int group = team.lane; group < groups; group += Team::kLanes, chosen >>= 1) board[group * size] = chosen & 1u;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Team::kEach; ++i) {
    const int e = team.expert(i);
    if (e < router.experts && !board[e / size * size]) keys[i] = masked;
  }
  __syncwarp();
}

// Takes the best expert out of the keys and returns its id.
template <bool kPacked, class Team>
__device__ __forceinline__ int take_best(const Team& team, typename Team::Keys& keys) {
  int best = keys[0];
#pragma unroll
  for (int i = 1; i < Team::kEach; ++i) best = max(best, keys[i]);
  best = team.largest(best);
  int id = Team::kExperts;
  if constexpr (kPacked) {
    id = packed_id(best);
  } else {
#pragma unroll
    for (int i = Team::kEach - 1; i >= 0; --i)
      if (keys[i] == best) id = team.expert(i);
    id = team.smallest(id);
  }
#pragma unroll
  for (int i = 0; i < Team::kEach; ++i)
    if (kPacked ? keys[i] == best : team.expert(i) == id) keys[i] = kNone;
  return id;
}

// Lane j's is the j-th best expert.
template <bool kPacked, class Team>
__device__ __forceinline__ int take_all(const Team& team, int top_k, typename Team::Keys& keys) {
  int mine = -1;
  for (int j = 0; j < top_k; ++j) {
    const int id = take_best<kPacked>(team, keys);
    if (j == team.lane) mine = id;
  }
  return mine;
}

// The id that this lane's slot gets. Without a bias the logits order the experts as their scores do, and exactly.
template <class T, class Team>
__device__ __forceinline__ int choose_expert(
    const RouteArgs& a, const Team& team, const typename Team::Values& x, bool nan, int* board) {
  const Router& router = a.router;
  typename Team::Keys keys;
  if (a.bias) {
    biased_keys(a, team, x, keys);
    if (router.groups > 1) mask_groups(a, team, 0.f, kLowest, keys, board);
    return take_all<false>(team, router.top_k, keys);
  }
#pragma unroll
  for (int i = 0; i < Team::kEach; ++i) keys[i] = team.expert(i) < router.experts ? key_of(x[i]) : kNone;
  if (router.groups > 1) {
    const float top = largest_logit(team, x);
    if (router.score == Score::softmax && (nan || fabsf(top) == INFINITY)) {  // all scores are NaN
#pragma unroll
      for (int i = 0; i < Team::kEach; ++i)
        if (team.expert(i) < router.experts) keys[i] = kFirst;
    }
    // A logit of -∞ is a score of 0, and so above the experts of the other groups.
    mask_groups(a, team, top, kBelow, keys, board);
  }
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < Team::kEach; ++i)
      if (team.expert(i) < router.experts) keys[i] = packed_key(keys[i], team.expert(i));
    return take_all<true>(team, router.top_k, keys);
  } else {
    return take_all<false>(team, router.top_k, keys);
  }
}

// Puts a token's logits where every lane finds those of any expert.
template <class Team>
__device__ __forceinline__ void store_row(const Team& team, const typename Team::Values& x, float* row) {
#pragma unroll
  for (int i = 0; i < Team::kEach; ++i) row[team.expert(i)] = x[i];
  __syncwarp();
}

// Grid: as many blocks as hold a team for each token. One block a multiprocessor is said to be enough, or the compiler
// spills to fit more.
template <class T, int kLanes, int kEach>
__global__ void __launch_bounds__(kRouteThreads, 1) moe_route(const RouteArgs a) {
  using Team = TokenTeam<kLanes, kEach>;
  PYKERN_SHARED(boards, int[Team::kTeams][Team::kExperts]);
  PYKERN_SHARED(rows, float[Team::kTeams][Team::kExperts]);
  const Team team;
  const Router& router = a.router;
  const bool live = team.token < a.tokens, has_slot = live && team.lane < router.top_k;
  const int64_t slot = team.token * router.top_k + team.lane;
  typename Team::Values x;
  const bool nan = team.template load<T>(a.logits, live ? router.experts : 0, x);
  float* const row = rows[team.index];
  store_row(team, x, row);

  int id = -1;
  int64_t recorded = -1;
  if (a.replay.data) {
    if (has_slot) recorded = id_at(a.replay, slot);
    if (recorded >= 0 && recorded < router.experts) id = static_cast<int>(recorded);
  } else {
    id = choose_expert<T>(a, team, x, nan, boards[team.index]);
    recorded = id;
  }

  const float chosen = id < 0 ? -INFINITY : row[id];
  float weight;
  if (router.renormalize) {
    weight = renormalized(team, router.score, chosen);
  } else if (router.score == Score::softmax) {
    // Read again, so that the logits take no registers beside the keys.
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] = row[team.expert(i)];
    const Softmax all = softmax_of(team, x);
    weight = __fdiv_rn(expf(chosen - all.top), all.sum);
  } else {
    weight = sigmoid(chosen);
  }
  weight = id < 0 ? 0.f : weight * router.scale;
  if (!has_slot) return;
  a.weights[slot] = nan ? __int_as_float(kFirst) : weight;
  a.ids[slot] = recorded;
}

// For weights w = scale · p, p the renormalised scores of the chosen, σ those of softmax or sigmoid:
//   softmax:  dx = p · (dp - Σ p · dp), over the chosen, or without renormalisation over all experts;
//   sigmoid:  dx = p · (dp - Σ p · dp) · σ(-x), or without renormalisation dp · σ(x) · σ(-x).
// Grid as above.
template <class T, int kLanes, int kEach>
__global__ void __launch_bounds__(kRouteThreads) moe_route_backward(const RouteBackwardArgs a) {
  using Team = TokenTeam<kLanes, kEach>;
  PYKERN_SHARED(rows, float[Team::kTeams][Team::kExperts]);
  const Team team;
  const Router& router = a.router;
  const bool live = team.token < a.tokens;
  typename Team::Values x;
  const bool nan = team.template load<T>(a.logits, live ? router.experts : 0, x);
  float* const row = rows[team.index];
  store_row(team, x, row);

  int id = -1;
  float grad = 0;
  if (live && team.lane < router.top_k) {
    const int64_t slot = team.token * router.top_k + team.lane;
    id = expert_at(a.ids, slot, router.experts);
    // The weights of a token with a NaN are NaN whatever its logits: they have no gradient.
    if (id >= 0 && !nan) grad = a.dweights[slot] * router.scale;
  }
  const float chosen = id < 0 ? -INFINITY : row[id];
  const bool all_experts = router.score == Score::softmax && !router.renormalize;
  float opposite = 1, score = 0, mean = 0;
  if (router.score == Score::sigmoid) score = sigmoid(chosen, opposite);
  Softmax all = {};
  if (all_experts) {
    all = softmax_of(team, x);
    score = __fdiv_rn(expf(chosen - all.top), all.sum);
  }
  if (router.renormalize) score = renormalized(team, router.score, chosen);
  if (router.renormalize || all_experts) mean = team.sum(id < 0 ? 0.f : score * grad);
  const float share = all_experts ? grad : (grad - mean) * score * opposite;

  // Slots are added up one by one: a recorded choice may name an expert twice.
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kEach; ++i) row[team.expert(i)] = 0.f;
  __syncwarp();
  for (int j = 0; j < router.top_k; ++j) {
    if (j == team.lane && id >= 0) row[id] += share;
    __syncwarp();
  }
  if (!live) return;
  T* const to = static_cast<T*>(a.dlogits) + team.token * router.experts;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int e = team.expert(i);
    if (e >= router.experts) continue;
    float gradient = row[e];
    if (all_experts) gradient = __fdiv_rn(expf(x[i] - all.top), all.sum) * (gradient - mean);
    to[e] = Element<T>::narrow(gradient);
  }
}

}  // namespace pykern
