// Routing as ops of a device: the signatures of library.cpp, checks, outputs, calls in which there is nothing to do.
// What computes them is given by the launchers of each device, cpu/moe_*.cpp and cuda/moe_*.cu.

#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "include/pykern/moe_route.h"
#include "tensors.h"

namespace pykern {

// Ids contiguous, a copy where they are not; it lives as long as this.
class ExpertIdsOf {
 public:
  explicit ExpertIdsOf(const Tensor& given)
      : tensor(given.is_contiguous() ? given : torch::stable::contiguous(given)) {
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &code));
    STD_TORCH_CHECK(
        code == aoti_torch_dtype_int64() || code == aoti_torch_dtype_int32(), "expert_ids must be int64 or int32");
    ids = {tensor.data_ptr(), code == aoti_torch_dtype_int64()};
  }

  Tensor tensor;
  ExpertIds ids;
};

// The ops, given `Route`, one call's work on one device. A Route is made from logits and has
//   Tensor empty(Sizes, int32_t dtype) const;  // on logits' device
//   void forward(const Tensor& logits, const std::optional<Tensor>& bias, const ExpertIdsOf* replay, const Router&,
//                const Tensor& weights, const Tensor& ids) const;
//   void backward(const Tensor& dweights, const Tensor& logits, const ExpertIdsOf&, const Router&,
//                 const Tensor& dlogits) const;
// which write all of their outputs, contiguous. There is at least one token and one slot. Shapes are checked; dweights
// is contiguous fp32; logits have any strides, a bias any strides and any DType.
template <class Route>
class RouteOps {
 public:
  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("moe_route", TORCH_BOX(&forward));
    m.impl("moe_route_backward", TORCH_BOX(&backward));
  }

 private:
  using Optional = std::optional<Tensor>;

  static std::tuple<Tensor, Tensor> forward(
      const Tensor& logits, const Optional& bias, const Optional& replay, int64_t top_k, std::string score,
      bool renormalize, int64_t groups, int64_t top_groups, std::string group_score, double scale) {
    Router router = router_of(logits, top_k, score, renormalize, scale);
    const int64_t experts = router.experts;
    STD_TORCH_CHECK(top_k >= 1 && top_k <= experts, "top_k must be 1 to ", experts, " (the experts), not ", top_k);
    STD_TORCH_CHECK(
        groups >= 1 && experts % groups == 0, "num_groups must divide the ", experts, " experts, not be ", groups);
    STD_TORCH_CHECK(
        top_groups >= 1 && top_groups <= groups && top_k <= top_groups * (experts / groups),
        "top_groups must be at most num_groups and hold top_k experts, not be ", top_groups);
    STD_TORCH_CHECK(
        group_score == "top2" || group_score == "max", "group_score must be top2 or max, not ", group_score);
    router.groups = static_cast<int>(groups);
    router.top_groups = static_cast<int>(top_groups);
    router.group_score = group_score == "max" ? GroupScore::max : GroupScore::top2;
    if (bias) {
      STD_TORCH_CHECK(
          bias->dim() == 1 && bias->size(0) == experts, "selection_bias must have shape (", experts, ",)");
      dtype_of(*bias, "selection_bias");
    }
    const int64_t tokens = logits.size(0);
    std::optional<ExpertIdsOf> recorded;
    if (replay) {
      check_slots(*replay, "expert_ids", tokens, top_k);
      recorded.emplace(*replay);
    }
    const Route route(logits);
    const int64_t sizes[2] = {tokens, top_k};
    const Tensor weights = route.empty(Sizes(sizes, 2), aoti_torch_dtype_float32());
    const Tensor ids = route.empty(Sizes(sizes, 2), aoti_torch_dtype_int64());
    if (tokens > 0) route.forward(logits, bias, recorded ? &*recorded : nullptr, router, weights, ids);
    return {weights, ids};
  }

  static Tensor backward(
      const Optional& dweights, const Tensor& logits, const Tensor& expert_ids, std::string score, bool renormalize,
      double scale, std::vector<bool> wanted) {
    if (!wanted[0]) return Tensor();
    STD_TORCH_CHECK(expert_ids.dim() == 2, "expert_ids must have 2 dimensions, not ", expert_ids.dim());
    const int64_t tokens = logits.size(0), top_k = expert_ids.size(1);
    const Router router = router_of(logits, top_k, score, renormalize, scale);
    check_slots(expert_ids, "expert_ids", tokens, top_k);
    const Route route(logits);
    const int64_t sizes[2] = {tokens, router.experts};
    Tensor dlogits = route.empty(Sizes(sizes, 2), torch_code(dtype_of(logits, "logits")));
    if (!dweights || top_k == 0) {
      torch::stable::zero_(dlogits);
      return dlogits;
    }
    check_slots(*dweights, "dweights", tokens, top_k);
    STD_TORCH_CHECK(dtype_of(*dweights, "dweights") == DType::f32, "dweights must be float32");
    const ExpertIdsOf chosen(expert_ids);
    const Tensor gradient = dweights->is_contiguous() ? *dweights : torch::stable::contiguous(*dweights);
    if (tokens > 0) route.backward(gradient, logits, chosen, router, dlogits);
    return dlogits;
  }

  // Without groups; the backward knows of none.
  static Router router_of(
      const Tensor& logits, int64_t top_k, const std::string& score, bool renormalize, double scale) {
    STD_TORCH_CHECK(logits.dim() == 2, "logits must have 2 dimensions, not ", logits.dim());
    dtype_of(logits, "logits");
    STD_TORCH_CHECK(
        logits.size(1) <= kMostExperts, "logits must be of at most ", kMostExperts, " experts, not ", logits.size(1));
    STD_TORCH_CHECK(top_k <= kMostChosen, "top_k must be at most ", kMostChosen, ", not ", top_k);
    STD_TORCH_CHECK(score == "softmax" || score == "sigmoid", "score must be softmax or sigmoid, not ", score);
    return {
        .experts = static_cast<int>(logits.size(1)),
        .top_k = static_cast<int>(top_k),
        .score = score == "softmax" ? Score::softmax : Score::sigmoid,
        .renormalize = renormalize,
        .groups = 1,
        .top_groups = 1,
        .group_score = GroupScore::top2,
        .scale = static_cast<float>(scale),
    };
  }

  static void check_slots(const Tensor& t, const char* name, int64_t tokens, int64_t top_k) {
    STD_TORCH_CHECK(
        t.dim() == 2 && t.size(0) == tokens && t.size(1) == top_k, name, " must have shape (", tokens, ", ", top_k,
        ")");
  }
};

// The op, given `Sort`, made from expert_ids, with
//   Tensor empty(Sizes, int32_t dtype) const;  // on expert_ids' device
//   void sort(const ExpertIdsOf&, int64_t slots, int experts, const Tensor& order, const Tensor& inverse,
//             const Tensor& offs) const;
// which writes all outputs. There is at least one slot.
template <class Sort>
class SortOps {
 public:
  static void register_in(torch::stable::detail::StableLibrary& m) { m.impl("moe_sort", TORCH_BOX(&sort)); }

 private:
  static std::tuple<Tensor, Tensor, Tensor> sort(const Tensor& expert_ids, int64_t experts) {
    STD_TORCH_CHECK(
        experts >= 1 && experts <= kMostExperts, "num_experts must be 1 to ", kMostExperts, ", not ", experts);
    const int64_t slots = expert_ids.numel();
    STD_TORCH_CHECK(slots <= INT32_MAX, "expert_ids must have at most 2^31 - 1 elements, offs being int32");
    const ExpertIdsOf given(expert_ids);
    const Sort sorter(expert_ids);
    const Tensor order = sorter.empty(Sizes(&slots, 1), aoti_torch_dtype_int64());
    const Tensor inverse = sorter.empty(Sizes(&slots, 1), aoti_torch_dtype_int64());
    Tensor offs = sorter.empty(Sizes(&experts, 1), aoti_torch_dtype_int32());
    if (slots > 0) sorter.sort(given, slots, static_cast<int>(experts), order, inverse, offs);
    else torch::stable::zero_(offs);
    return {order, inverse, offs};
  }
};

}  // namespace pykern
