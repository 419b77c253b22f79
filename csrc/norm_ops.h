// LayerNorm and RMSNorm as ops of a device: the signatures of library.cpp, checks, outputs. What computes them is given
// by the launchers of each device, cpu/norm.cpp and cuda/norm.cu.

#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace pykern {

using Optional = std::optional<Tensor>;

struct NormShape {
  explicit NormShape(const Tensor& x) : sizes(x.sizes()), dtype(dtype_of(x, "x")) {
    STD_TORCH_CHECK(sizes.size() > 0, "x must have at least one dimension");
    n = sizes[sizes.size() - 1];
    for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
  }
  Sizes leading() const { return Sizes(sizes.data(), sizes.size() - 1); }
  int element_size() const { return dtype == DType::f32 ? 4 : 2; }

  Sizes sizes;  // borrowed from x
  DType dtype;
  int64_t n;
  int64_t rows = 1;
};

struct NormOutputs {
  Tensor y, rstd;
  Optional summed;  // where there is a residual
  Optional mean;    // of LayerNorm; RMSNorm has none
};

// dx, dweight, dbias; undefined where not wanted.
using NormGradients = std::array<Tensor, 3>;

// The ops, given `Norm`, one call's work on one device. A Norm is made from x and has
//   NormShape shape;
//   Tensor empty(Sizes, DType) const;  // on x's device
//   void forward(x, residual, weight, bias, eps, weight_offset, round_before_weight, const NormOutputs&) const;
//   void backward(dy, dsummed, x, weight, weight_offset, mean, rstd, const NormGradients&) const;
// which write all outputs that are there. They are given at least one row, backward also n > 0; checked arguments, but
// for the dtypes of weight and bias; contiguous statistics.
template <class Norm>
class NormOps {
 public:
  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("layer_norm", TORCH_BOX(&layer_norm));
    m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
    m.impl("rms_norm", TORCH_BOX(&rms_norm));
    m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
    m.impl("add_layer_norm", TORCH_BOX(&add_layer_norm));
    m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
    m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
    m.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
  }

 private:
  static std::tuple<Tensor, Tensor, Tensor> layer_norm(
      const Tensor& x, const Optional& weight, const Optional& bias, double eps) {
    const NormOutputs out = forward(true, x, nullptr, weight, bias, eps, 0, false);
    return {out.y, *out.mean, out.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
      const Tensor& x, const Tensor& residual, const Optional& weight, const Optional& bias, double eps) {
    const NormOutputs out = forward(true, x, &residual, weight, bias, eps, 0, false);
    return {out.y, *out.summed, *out.mean, out.rstd};
  }

  static std::tuple<Tensor, Tensor> rms_norm(
      const Tensor& x, const Optional& weight, double eps, double weight_offset, bool round_before_weight) {
    const NormOutputs out = forward(false, x, nullptr, weight, {}, eps, weight_offset, round_before_weight);
    return {out.y, out.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
      const Tensor& x, const Tensor& residual, const Optional& weight, double eps, double weight_offset,
      bool round_before_weight) {
    const NormOutputs out = forward(false, x, &residual, weight, {}, eps, weight_offset, round_before_weight);
    return {out.y, *out.summed, out.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(
      const Optional& dy, const Optional& dsummed, const Tensor& summed, const Optional& weight, const Optional& bias,
      double, const Tensor& mean, const Tensor& rstd, const std::vector<bool>& wanted) {
    const NormGradients out =
        backward(dy, dsummed, summed, weight, bias, 0, &mean, rstd, {wanted[0], wanted[1], wanted[2]});
    return {out[0], out[1], out[2]};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
      const Optional& dy, const Tensor& x, const Optional& weight, const Optional& bias, double eps,
      const Tensor& mean, const Tensor& rstd, const std::vector<bool>& wanted) {
    return add_layer_norm_backward(dy, {}, x, weight, bias, eps, mean, rstd, wanted);
  }

  static std::tuple<Tensor, Tensor> add_rms_norm_backward(
      const Optional& dy, const Optional& dsummed, const Tensor& summed, const Optional& weight, double,
      double weight_offset, bool, const Tensor& rstd, const std::vector<bool>& wanted) {
    const NormGradients out =
        backward(dy, dsummed, summed, weight, {}, weight_offset, nullptr, rstd, {wanted[0], wanted[1], false});
    return {out[0], out[1]};
  }

  static std::tuple<Tensor, Tensor> rms_norm_backward(
      const Optional& dy, const Tensor& x, const Optional& weight, double eps, double weight_offset,
      bool round_before_weight, const Tensor& rstd, const std::vector<bool>& wanted) {
    return add_rms_norm_backward(dy, {}, x, weight, eps, weight_offset, round_before_weight, rstd, wanted);
  }

  static NormOutputs forward(
      bool centred, const Tensor& x, const Tensor* residual, const Optional& weight, const Optional& bias, double eps,
      double weight_offset, bool round_before_weight) {
    const Norm norm(x);
    const NormShape& shape = norm.shape;
    if (residual) check_like_x(*residual, "residual", x);
    check_parameter(weight, "weight", shape);
    check_parameter(bias, "bias", shape);
    NormOutputs out = {norm.empty(shape.sizes, shape.dtype), norm.empty(shape.leading(), DType::f32), {}, {}};
    if (residual) out.summed = norm.empty(shape.sizes, shape.dtype);
    if (centred) out.mean = norm.empty(shape.leading(), DType::f32);
    if (shape.rows > 0) norm.forward(x, residual, weight, bias, eps, weight_offset, round_before_weight, out);
    return out;
  }

  static NormGradients backward(
      const Optional& dy, const Optional& dsummed, const Tensor& x, const Optional& weight, const Optional& bias,
      double weight_offset, const Tensor* mean, const Tensor& rstd, const std::array<bool, 3>& wanted) {
    const bool wants_dweight = wanted[1] && weight, wants_dbias = wanted[2] && bias;
    NormGradients out;
    if (!wanted[0] && !wants_dweight && !wants_dbias) return out;
    const Norm norm(x);
    const NormShape& shape = norm.shape;
    if (dy) check_like_x(*dy, "dy", x);
    if (dsummed) check_like_x(*dsummed, "dsummed", x);
    check_parameter(weight, "weight", shape);
    check_parameter(bias, "bias", shape);
    if (wanted[0]) out[0] = norm.empty(shape.sizes, shape.dtype);
    if (wants_dweight) out[1] = norm.empty(Sizes(&shape.n, 1), dtype_of(*weight, "weight"));
    if (wants_dbias) out[2] = norm.empty(Sizes(&shape.n, 1), dtype_of(*bias, "bias"));
    if (dy && shape.rows > 0 && shape.n > 0) {
      Optional mean_of_row;
      if (mean) mean_of_row = statistic(*mean, "mean", shape);
      norm.backward(*dy, dsummed, x, weight, weight_offset, mean_of_row, statistic(rstd, "rstd", shape), out);
      return out;
    }
    // With no gradient of y there is only that of the sum to hand on.
    for (Tensor& gradient : out) {
      if (!gradient.defined()) continue;
      if (dsummed && &gradient == &out[0]) torch::stable::copy_(gradient, *dsummed);
      else torch::stable::zero_(gradient);
    }
    return out;
  }

  static void check_like_x(const Tensor& t, const char* name, const Tensor& x) {
    const Sizes a = t.sizes(), b = x.sizes();
    STD_TORCH_CHECK(
        a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), name, " must have the shape of x");
    STD_TORCH_CHECK(dtype_of(t, name) == dtype_of(x, "x"), name, " must have the dtype of x");
  }

  static void check_parameter(const Optional& given, const char* name, const NormShape& shape) {
    STD_TORCH_CHECK(
        !given || (given->dim() == 1 && given->size(0) == shape.n), name, " must have shape (", shape.n, ",)");
  }

  // A statistic that a forward returned: one float a row.
  static Tensor statistic(const Tensor& given, const char* name, const NormShape& shape) {
    STD_TORCH_CHECK(
        dtype_of(given, name) == DType::f32 && given.numel() == shape.rows, name, " must be float32, one a row");
    return given.is_contiguous() ? given : torch::stable::contiguous(given);
  }
};

}  // namespace pykern
