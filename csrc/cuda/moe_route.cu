// The router on NVIDIA GPUs: memory and the choice of kernels. The algorithm is in moe_route.cuh.

#include <pykern/moe_route.cuh>

#include <algorithm>
#include <type_traits>

#include "../moe_ops.h"
#include "element.h"
#include "launch.h"

namespace pykern {
namespace {

// A team's lanes, and each lane's experts.
template <int lanes, int each>
struct TeamShape {
  static constexpr int kLanes = lanes, kEach = each, kTokens = kRouteThreads / lanes;
};

// choose(TeamShape()) for the smallest team that holds the experts and has a lane for each slot. A quarter of a warp is
// the least: the rounds over a few experts cost little beside loads and stores.
template <class Choose>
auto by_shape(const Router& router, const Choose& choose) {
  const int experts = router.experts;
  if (std::max(experts, router.top_k) <= 8) return choose(TeamShape<8, 1>());
  if (experts <= 32) return choose(TeamShape<32, 1>());
  if (experts <= 64) return choose(TeamShape<32, 2>());
  if (experts <= 128) return choose(TeamShape<32, 4>());
  if (experts <= 256) return choose(TeamShape<32, 8>());
  if (experts <= 512) return choose(TeamShape<32, 16>());
  return choose(TeamShape<32, kMostExperts / 32>());
}

// How many lanes share a group, so that as many groups as can be are looked at together.
int group_lanes(int lanes, int groups) {
  while (lanes > 1 && lanes * groups > kWarp) lanes /= 2;
  return lanes;
}

struct CudaRoute {
  explicit CudaRoute(const Tensor& logits) : dtype(dtype_of(logits, "logits")), device(logits) {}

  Tensor empty(Sizes sizes, int32_t code) const { return device.empty_of(sizes, code); }

  void forward(
      const Tensor& logits, const std::optional<Tensor>& bias, const ExpertIdsOf* replay, const Router& router,
      const Tensor& weights, const Tensor& ids) const {
    RouteArgs args = {};
    args.router = router;
    args.logits = strided(logits);
    args.tokens = logits.size(0);
    std::optional<Tensor> packed;
    if (bias) {
      packed = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
      args.bias = device.in(*packed, "selection_bias");
      args.bias_type = dtype_of(*packed, "selection_bias");
    }
    if (replay) args.replay = given(*replay, "replay_ids");
    args.weights = static_cast<float*>(device.out(weights, "weights"));
    args.ids = static_cast<int64_t*>(device.out(ids, "expert_ids"));
    by_shape(router, [&](auto shape) {
      using Shape = decltype(shape);
      args.group_lanes = group_lanes(Shape::kLanes, router.groups);
      launch(
          by_element(dtype, [](auto type) { return &moe_route<decltype(type), Shape::kLanes, Shape::kEach>; }),
          Shape::kTokens, args);
    });
  }

  void backward(
      const Tensor& dweights, const Tensor& logits, const ExpertIdsOf& ids, const Router& router,
      const Tensor& dlogits) const {
    RouteBackwardArgs args = {};
    args.router = router;
    args.logits = strided(logits);
    args.tokens = logits.size(0);
    args.dweights = static_cast<const float*>(device.in(dweights, "dweights"));
    args.ids = given(ids, "expert_ids");
    args.dlogits = device.out(dlogits, "dlogits");
    by_shape(router, [&](auto shape) {
      using Shape = decltype(shape);
      launch(
          by_element(dtype, [](auto type) { return &moe_route_backward<decltype(type), Shape::kLanes, Shape::kEach>; }),
          Shape::kTokens, args);
    });
  }

 private:
  Logits strided(const Tensor& logits) const {
    return {device.in(logits, "logits"), logits.stride(0), logits.stride(1)};
  }

  ExpertIds given(const ExpertIdsOf& ids, const char* name) const {
    return {device.in(ids.tensor, name), ids.ids.wide};
  }

  template <class Args>
  void launch(void (*kernel)(Args), int tokens_of_block, const Args& args) const {
    const int64_t blocks = (args.tokens + tokens_of_block - 1) / tokens_of_block;
    STD_TORCH_CHECK(blocks < int64_t{1} << 31, "logits have too many tokens for one launch: ", args.tokens);
    device.launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kRouteThreads), 0, args);
  }

  const DType dtype;
  const Device device;
};

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { pykern::RouteOps<pykern::CudaRoute>::register_in(m); }
