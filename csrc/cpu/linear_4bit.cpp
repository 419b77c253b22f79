// Multiplying by 4-bit weights on the CPU.

#include "../linear_4bit_ops.h"
#include "linear_host.h"

namespace pykern {
namespace {

using Optional = std::optional<Tensor>;

struct CpuLinear {
  explicit CpuLinear(const Tensor&) {}

  Tensor empty(Sizes sizes, DType dtype) const { return pykern::empty(sizes, dtype); }

  void forward(
      const Tensor& input, const WeightOf& weight, const Optional& bias, const LinearShape& shape,
      const Tensor& y) const {
    const FloatRowsOf left(input, "input");
    std::optional<Floats> floats;
    if (bias) floats.emplace(*bias, "bias");
    const float* const added = floats ? floats->get() : nullptr;
    if (shape.rows <= kFewRows)
      return multiply_few(weight.weight, left.floats, shape.rows, shape.out, added, shape.dtype, y.data_ptr());
    multiply({
        .left = left.floats,
        .right = {&weight.weight, {}, true},
        .rows = shape.rows,
        .columns = shape.out,
        .depth = shape.in,
        .bias = added,
        .result = y.data_ptr(),
        .dtype = shape.dtype,
    });
  }

  void backward_input(
      const Tensor& dy, const WeightOf& weight, const LinearShape& shape, const Tensor& dinput) const {
    const FloatRowsOf left(dy, "dy");
    multiply({
        .left = left.floats,
        .right = {&weight.weight, {}, false},
        .rows = shape.rows,
        .columns = shape.in,
        .depth = shape.out,
        .result = dinput.data_ptr(),
        .dtype = shape.dtype,
    });
  }

  void backward_bias(const Tensor& dy, const LinearShape& shape, const Tensor& dbias) const {
    const FloatRowsOf left(dy, "dy");
    sum_rows(left.floats, shape.rows, shape.out, dbias);
  }
};

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) { pykern::LinearOps<pykern::CpuLinear>::register_in(m); }
