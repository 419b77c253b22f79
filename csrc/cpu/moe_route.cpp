// The router on the CPU: memory and threads. The arithmetic is in simd/moe_route.cpp.

#include "moe_route.h"

#include <algorithm>
#include <memory>

#include "../moe_ops.h"
#include "compiled.h"
#include "norm.h"
#include "parallel.h"

namespace pykern {
namespace {

const RouteKernels& kernels() { return compiled(&PYKERN_CHOOSE(moe_route)); }

struct CpuRoute {
  explicit CpuRoute(const Tensor& logits) : dtype(dtype_of(logits, "logits")) {}

  Tensor empty(Sizes sizes, int32_t code) const { return empty_of(sizes, code, aoti_torch_device_type_cpu(), 0); }

  void forward(
      const Tensor& logits, const std::optional<Tensor>& bias, const ExpertIdsOf* replay, const Router& router,
      const Tensor& weights, const Tensor& ids) const {
    const RowsOf rows(logits);
    std::unique_ptr<float[]> wide_bias;
    if (bias) {
      wide_bias.reset(new float[router.experts]);
      const Tensor packed = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
      const auto widen = PYKERN_CHOOSE(norm).widen[static_cast<int>(dtype_of(packed, "selection_bias"))];
      widen(packed.data_ptr(), 0, wide_bias.get(), router.experts);
    }
    RouteForward args = {};
    args.router = router;
    args.logits = rows.rows;
    args.bias = wide_bias.get();
    if (replay) args.replay = replay->ids;
    args.weights = static_cast<float*>(weights.data_ptr());
    args.ids = static_cast<int64_t*>(ids.data_ptr());
    over_tokens(kernels().forward[static_cast<int>(dtype)], args, logits.size(0));
  }

  void backward(
      const Tensor& dweights, const Tensor& logits, const ExpertIdsOf& ids, const Router& router,
      const Tensor& dlogits) const {
    const RowsOf rows(logits);
    RouteBackward args = {};
    args.router = router;
    args.logits = rows.rows;
    args.dweights = static_cast<const float*>(dweights.data_ptr());
    args.ids = ids.ids;
    args.dlogits = dlogits.data_ptr();
    over_tokens(kernels().backward[static_cast<int>(dtype)], args, logits.size(0));
  }

  // In tiles, so that only the last of a thread's is not full; a token's result does not depend on its place in one.
  template <class Kernel, class Args>
  static void over_tokens(Kernel kernel, const Args& args, int64_t tokens) {
    constexpr int64_t kTile = 16;
    parallel((tokens + kTile - 1) / kTile, kTile * args.router.experts, [&](int64_t begin, int64_t end) {
      kernel(args, begin * kTile, std::min(tokens, end * kTile));
    });
  }

  const DType dtype;
};

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) { pykern::RouteOps<pykern::CpuRoute>::register_in(m); }
