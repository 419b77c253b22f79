// The router, a tile of tokens at a time: every lane is a token, and the loops run over experts. So nothing is summed
// or compared across lanes, ties fall to the lower id by the order of the loop, and a token's arithmetic is the same
// wherever it stands. Scores are compared as integers that order as the floats do, with NaN above all.
//
// Backward, for weights w = scale · p, p the renormalised scores of the chosen, σ those of softmax or sigmoid:
//   softmax:  dx = p · (dp - Σ p · dp), over the chosen, or without renormalisation over all experts;
//   sigmoid:  dx = p · (dp - Σ p · dp) · σ(-x), or without renormalisation dp · σ(x) · σ(-x).

#include "../moe_route.h"
#include "functions.h"

namespace pykern {
namespace {

typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

constexpr float kInfinity = __builtin_inff();
constexpr int32_t kFirst = INT32_MAX;                          // the key of a NaN
constexpr int32_t kLowest = static_cast<int32_t>(0x807fffff);  // the key of -∞
constexpr int32_t kNone = INT32_MIN;                           // below every key

PYKERN_INLINE Ints splat_int(int32_t value) { return Ints{} + value; }

PYKERN_INLINE Ints key_of(Vec value) {
  const Ints bits = (Ints)(value + Vec{});  // -0 becomes +0
  return value == value ? bits ^ (bits >> 31 & INT32_MAX) : splat_int(kFirst);
}

PYKERN_INLINE Vec value_of(Ints key) { return (Vec)(key ^ (key >> 31 & INT32_MAX)); }

PYKERN_INLINE bool any_above(Ints a, Ints b) {
#if defined(__AVX512F__)
  return _mm512_cmpgt_epi32_mask((__m512i)a, (__m512i)b) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8((__m256i)(a > b)) != 0;
#elif defined(__x86_64__)
  return _mm_movemask_epi8((__m128i)(a > b)) != 0;
#else
  const Ints above = a > b;
  return (above[0] | above[1] | above[2] | above[3]) != 0;
#endif
}

// What a tile has for each lane's own expert; `otherwise` where that is -1.
PYKERN_INLINE Vec take(const Vec* tile, Ints expert, float otherwise) {
  Vec taken = splat(otherwise);
  for (int lane = 0; lane < kLanes; ++lane)
    if (expert[lane] >= 0) taken[lane] = tile[expert[lane]][lane];
  return taken;
}

PYKERN_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }  // b where a is NaN

// e^(x + rest) for x <= 0 and a rest far smaller than an ulp of e^x; unlike exp(), down to the last subnormal.
PYKERN_INLINE Vec exp_below(Vec x, Vec rest = Vec{}) {
  Vec n;
  const Vec f = reduce(x < splat(-110) ? splat(-110) : x, n) + rest;
  const Vec power = fma(exp_slope(f), f, splat(1));
  if constexpr (kLanes == 16) return scale_exponent(power, n);
  // Elsewhere a factor of 2^n has to be a normal number.
  const Vec half = round(n * splat(0.5f));
  return scale_exponent(scale_exponent(power, half), n - half);
}

// e^(x - top) for x <= top. The rounding of a difference far below zero would cost e^x many ulps, so it is taken along.
PYKERN_INLINE Vec exp_difference(Vec x, Vec top) {
  const Vec d = x - top, back = d - x;
  const Vec rest = (x - (d - back)) - (top + back);
  return exp_below(d, rest == rest ? rest : Vec{});
}

// σ(x), and σ(-x), neither of which loses digits.
PYKERN_INLINE Vec sigmoid(Vec x, Vec& opposite) {
  const Vec e = exp_below(x < Vec{} ? x : -x), inverse = reciprocal(e + splat(1)), small = e * inverse;
  opposite = x < Vec{} ? inverse : small;
  return x < Vec{} ? small : inverse;
}

PYKERN_INLINE Vec sigmoid(Vec x) {
  Vec opposite;
  return sigmoid(x, opposite);
}

// A tile's tokens. Lanes beyond `count` repeat the last one.
struct Tokens {
  int64_t first;
  int count;

  Tokens(int64_t begin, int64_t end)
      : first(begin), count(end - begin < kLanes ? static_cast<int>(end - begin) : kLanes) {}
  PYKERN_INLINE int64_t operator[](int lane) const { return first + (lane < count ? lane : count - 1); }
};

// The logits of a tile by expert. Returns where a NaN is.
template <class T>
PYKERN_INLINE Ints load_tile(const Rows& logits, const Tokens& tokens, int experts, Vec* tile) {
  const T* row[kLanes];
  for (int lane = 0; lane < kLanes; ++lane)
    row[lane] = static_cast<const T*>(logits.data) + row_offset(logits, tokens[lane]);
  Ints nan = {};
  each(experts, [&](int64_t e, int many) PYKERN_LAMBDA {
    Vec block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) block[lane] = load(row[lane] + e, many);
    transpose(block);
    for (int i = 0; i < many; ++i) {
      nan |= block[i] != block[i];
      tile[e + i] = block[i];
    }
  });
  return nan;
}

// Writes a tile to contiguous rows.
template <class T>
PYKERN_INLINE void store_tile(const Vec* tile, const Tokens& tokens, int experts, T* rows) {
  each(experts, [&](int64_t e, int many) PYKERN_LAMBDA {
    Vec block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = i < many ? tile[e + i] : Vec{};
    transpose(block);
    for (int lane = 0; lane < tokens.count; ++lane) store(rows + tokens[lane] * experts + e, block[lane], many);
  });
}

// The largest keys so far and their ids, best first. Ids come in rising order, so that an equal key stays behind.
template <int K>
struct Best {
  Ints key[K], id[K];

  Best() {
    for (int j = 0; j < K; ++j) key[j] = splat_int(kNone), id[j] = Ints{};
  }

  PYKERN_INLINE void add(Ints candidate, int expert) {
    if (!any_above(candidate, key[K - 1])) return;
    const Ints number = splat_int(expert);
    Ints above = candidate > key[K - 1];
    for (int j = K - 1; j > 0; --j) {
      const Ints here = above;
      above = candidate > key[j - 1];
      key[j] = above ? key[j - 1] : here ? candidate : key[j];
      id[j] = above ? id[j - 1] : here ? number : id[j];
    }
    key[0] = above ? candidate : key[0];
    id[0] = above ? number : id[0];
  }
};

template <int K>
void choose(const Ints* keys, int experts, int top_k, Ints* ids) {
  Best<K> best;
  for (int e = 0; e < experts; ++e) best.add(keys[e], e);
  for (int j = 0; j < top_k; ++j) ids[j] = best.id[j];
}

void choose_best(const Ints* keys, int experts, int top_k, Ints* ids) {
  const auto chooser = top_k == 1 ? choose<1>
      : top_k == 2                ? choose<2>
      : top_k <= 4                ? choose<4>
      : top_k <= 8                ? choose<8>
      : top_k <= 16               ? choose<16>
                                  : choose<kMostChosen>;
  chooser(keys, experts, top_k, ids);
}

PYKERN_INLINE Vec largest(const Vec* tile, int count) {
  Vec top = splat(-kInfinity);
  for (int i = 0; i < count; ++i) top = larger(tile[i], top);
  return top;
}

// The softmax's maximum and denominator over all experts, of a row without NaN.
struct Softmax {
  Vec top, sum;

  Softmax(const Vec* tile, int experts) : top(largest(tile, experts)), sum(Vec{}) {
    // With the rounding error of each step carried along: the sum's error is in every weight.
    Vec lost = {};
    for (int e = 0; e < experts; ++e) {
      const Vec term = exp_below(tile[e] - top) - lost, next = sum + term;
      lost = (next - sum) - term;
      sum = next;
    }
  }
};

// Gives the experts of groups that are not among the best the key `masked`. A group's best two decide its rank.
void mask_groups(const Router& router, const Vec* top, Ints masked, Ints* keys) {
  const int size = router.experts / router.groups;
  Ints worth[kMostExperts];
  for (int g = 0; g < router.groups; ++g) {
    Best<2> best;
    for (int e = 0; e < size; ++e) best.add(keys[g * size + e], e);
    worth[g] = best.key[0];
    if (size == 1 || router.group_score == GroupScore::max) continue;
    Vec sum = {};
    for (int j = 0; j < 2; ++j) {
      const Vec value = value_of(best.key[j]);
      // Without a bias the keys are those of logits.
      sum += !top ? value : router.score == Score::sigmoid ? sigmoid(value) : exp_difference(value, *top);
    }
    worth[g] = key_of(sum);
  }
  for (int g = 0; g < router.groups; ++g) {
    Ints rank = {};  // less one for each group that comes before this
    for (int other = 0; other < g; ++other) rank += worth[other] >= worth[g];
    for (int other = g + 1; other < router.groups; ++other) rank += worth[other] > worth[g];
    const Ints chosen = rank > splat_int(-router.top_groups);
    for (int e = g * size; e < (g + 1) * size; ++e) keys[e] = chosen ? keys[e] : masked;
  }
}

// The ids of the chosen. Without a bias the logits order the experts as their scores do, and exactly.
void choose_experts(const RouteForward& a, const Vec* tile, Ints nan, Ints* ids) {
  const Router& router = a.router;
  Ints keys[kMostExperts];
  if (a.bias) {
    if (router.score == Score::softmax) {
      const Softmax all(tile, router.experts);
      for (int e = 0; e < router.experts; ++e)
        keys[e] = key_of(exp_difference(tile[e], all.top) / all.sum + splat(a.bias[e]));
    } else {
      for (int e = 0; e < router.experts; ++e) keys[e] = key_of(sigmoid(tile[e]) + splat(a.bias[e]));
    }
    if (router.groups > 1) mask_groups(router, nullptr, splat_int(kLowest), keys);
  } else {
    for (int e = 0; e < router.experts; ++e) keys[e] = key_of(tile[e]);
    if (router.groups > 1) {
      const Vec top = largest(tile, router.experts);
      if (router.score == Score::softmax) {
        // Where the softmax is NaN throughout, so are all scores.
        const Ints all_nan = nan | (top == splat(kInfinity)) | (top == splat(-kInfinity));
        for (int e = 0; e < router.experts; ++e) keys[e] = all_nan ? splat_int(kFirst) : keys[e];
      }
      // A logit of -∞ is a score of 0, and so above the experts of the other groups.
      mask_groups(router, &top, splat_int(kLowest - 1), keys);
    }
  }
  choose_best(keys, router.experts, router.top_k, ids);
}

// The renormalised scores of chosen logits, in place; -∞ stands for a dropped slot.
PYKERN_INLINE void renormalize(Score score, int top_k, Vec* chosen) {
  const Vec top = largest(chosen, top_k);
  Vec sum = {};
  for (int j = 0; j < top_k; ++j) {
    const Vec x = chosen[j];
    if (score == Score::softmax) {
      chosen[j] = exp_below(x - top);
    } else {
      // σ(x) = eˣ · σ(-x); where all are small, the largest exponential is taken out, which leaves the quotient.
      Vec opposite;
      const Vec plain = sigmoid(x, opposite);
      chosen[j] = top < Vec{} ? exp_below(x - top) * opposite : plain;
    }
    sum += chosen[j];
  }
  for (int j = 0; j < top_k; ++j) chosen[j] = chosen[j] / sum;  // exactly 1 where there is but one
}

// The experts of given slots, -1 for a dropped one.
PYKERN_INLINE void load_ids(const ExpertIds& given, const Tokens& tokens, const Router& router, Ints* ids) {
  for (int lane = 0; lane < kLanes; ++lane)
    for (int j = 0; j < router.top_k; ++j)
      ids[j][lane] = expert_at(given, tokens[lane] * router.top_k + j, router.experts);
}

template <class T>
void forward(const RouteForward& a, int64_t first_token, int64_t end_token) {
  const Router& router = a.router;
  const int k = router.top_k;
  Vec tile[kMostExperts];
  for (int64_t token = first_token; token < end_token; token += kLanes) {
    const Tokens tokens(token, end_token);
    const Ints nan = load_tile<T>(a.logits, tokens, router.experts, tile);
    Ints ids[kMostChosen];
    Vec weights[kMostChosen];
    if (a.replay.data) load_ids(a.replay, tokens, router, ids);
    else choose_experts(a, tile, nan, ids);
    for (int j = 0; j < k; ++j) weights[j] = take(tile, ids[j], -kInfinity);
    if (router.renormalize) {
      renormalize(router.score, k, weights);
    } else if (router.score == Score::softmax) {
      const Softmax all(tile, router.experts);
      for (int j = 0; j < k; ++j) weights[j] = exp_below(weights[j] - all.top) / all.sum;
    } else {
      for (int j = 0; j < k; ++j) weights[j] = sigmoid(weights[j]);
    }
    for (int j = 0; j < k; ++j) {
      const Vec weight = ids[j] < 0 ? Vec{} : weights[j] * splat(router.scale);
      weights[j] = nan ? splat(__builtin_nanf("")) : weight;
    }
    for (int lane = 0; lane < tokens.count; ++lane) {
      const int64_t row = tokens[lane] * k;
      for (int j = 0; j < k; ++j) {
        a.weights[row + j] = weights[j][lane];
        a.ids[row + j] = a.replay.data ? id_at(a.replay, row + j) : ids[j][lane];
      }
    }
  }
}

template <class T>
void backward(const RouteBackward& a, int64_t first_token, int64_t end_token) {
  const Router& router = a.router;
  const int k = router.top_k;
  Vec tile[kMostExperts], gradient[kMostExperts];
  for (int64_t token = first_token; token < end_token; token += kLanes) {
    const Tokens tokens(token, end_token);
    const Ints nan = load_tile<T>(a.logits, tokens, router.experts, tile);
    Ints ids[kMostChosen];
    Vec scores[kMostChosen], grad[kMostChosen];
    load_ids(a.ids, tokens, router, ids);
    for (int lane = 0; lane < kLanes; ++lane)
      for (int j = 0; j < k; ++j) grad[j][lane] = a.dweights[tokens[lane] * k + j];
    for (int j = 0; j < k; ++j) grad[j] = nan | (ids[j] < 0) ? Vec{} : grad[j] * splat(router.scale);

    const bool all_experts = router.score == Score::softmax && !router.renormalize;
    if (all_experts) {
      const Softmax all(tile, router.experts);
      for (int e = 0; e < router.experts; ++e) tile[e] = exp_below(tile[e] - all.top) / all.sum;
    }
    for (int j = 0; j < k; ++j) scores[j] = take(tile, ids[j], all_experts ? 0 : -kInfinity);
    Vec opposite[kMostChosen];
    if (router.score == Score::sigmoid) {
      for (int j = 0; j < k; ++j) {
        const Vec score = sigmoid(scores[j], opposite[j]);
        if (!router.renormalize) scores[j] = score;
      }
    }
    if (router.renormalize) renormalize(router.score, k, scores);
    Vec mean = {};
    if (router.renormalize || all_experts)
      for (int j = 0; j < k; ++j) mean = fma(ids[j] < 0 ? Vec{} : scores[j], grad[j], mean);

    for (int e = 0; e < router.experts; ++e) gradient[e] = Vec{};
    for (int j = 0; j < k; ++j) {
      Vec share = grad[j];
      if (!all_experts) share = (share - mean) * scores[j];
      if (router.score == Score::sigmoid) share *= opposite[j];
      for (int lane = 0; lane < kLanes; ++lane)
        if (ids[j][lane] >= 0) gradient[ids[j][lane]][lane] += share[lane];
    }
    if (all_experts)
      for (int e = 0; e < router.experts; ++e) gradient[e] = tile[e] * (gradient[e] - mean);
    store_tile(gradient, tokens, router.experts, static_cast<T*>(a.dlogits));
  }
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::RouteKernels PYKERN_TABLE(moe_route) = {
    {pykern::forward<float>, pykern::forward<pykern::f16>, pykern::forward<pykern::bf16>},
    {pykern::backward<float>, pykern::backward<pykern::f16>, pykern::backward<pykern::bf16>},
};
