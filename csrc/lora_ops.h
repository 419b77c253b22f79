// Linear layers with low-rank adapters as ops of a device: the signatures of library.cpp, checks, outputs, calls in
// which there is nothing to multiply. What computes them is given by the launchers of each device, cpu/lora*.cpp and
// cuda/lora*.cu.

#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "linear_4bit_ops.h"
#include "tensors.h"
#include "weight4bit_ops.h"

namespace pykern {

// The weight (out, in) of the layer: one of the two is there.
struct LoraWeight {
  const Tensor* floats = nullptr;  // of the input's dtype, any strides
  const WeightOf* packed = nullptr;
};

// What a call is given, whether for one adapter or for many. Shapes and dtypes are checked, strides are any.
struct LoraCall {
  LinearShape shape;
  Tensor input;
  LoraWeight weight;
  Tensor lora_a, lora_b;  // of one dtype, the input's or fp32
  int64_t rank;
  DType adapter_dtype;
  std::optional<Tensor> bias;  // (out,), of the input's dtype or fp32
};

// An element of the input reaches the adapter, times `kept`, where its random word is at least `threshold`, which is
// 2^32 where all are dropped.
struct LoraDropout {
  Tensor rng;  // seed and offset: contiguous int64, on the input's device
  uint64_t threshold;
  float kept;
};

struct OneLora : LoraCall {
  double scaling;
  std::optional<Tensor> dora_scale;  // (out,), of the input's dtype or fp32
  std::optional<LoraDropout> dropout;
};

struct ManyLoras : LoraCall {
  int64_t adapters;  // may be 0
  Tensor ids;        // (rows,), contiguous int64 or int32; what is not from 0 to adapters - 1 names none
  bool wide_ids;     // int64
  Tensor scaling;    // (adapters,), of the input's dtype or fp32
};

// Contiguous; undefined where not wanted.
struct LoraGradients {
  Tensor dinput, dweight, dlora_a, dlora_b, dbias;
  Tensor dscale;  // of dora_scale, or of the scaling of many

  std::array<Tensor*, 6> all() { return {&dinput, &dweight, &dlora_a, &dlora_b, &dbias, &dscale}; }
};

inline void check_adapters(const LoraCall& call, std::optional<int64_t> adapters) {
  const int64_t lead = adapters ? 1 : 0;
  STD_TORCH_CHECK(
      call.lora_b.dim() == lead + 2 && (!adapters || call.lora_b.size(0) == *adapters) &&
          call.lora_b.size(lead) == call.shape.out && call.lora_b.size(lead + 1) == call.rank,
      "lora_b must have shape (", adapters ? "adapters, " : "", call.shape.out, ", ", call.rank, ")");
  STD_TORCH_CHECK(
      call.lora_a.size(lead + 1) == call.shape.in && call.rank > 0, "lora_a must have shape (",
      adapters ? "adapters, " : "", "r, ", call.shape.in, ") with r > 0");
  STD_TORCH_CHECK(dtype_of(call.lora_b, "lora_b") == call.adapter_dtype, "lora_b must have the dtype of lora_a");
  STD_TORCH_CHECK(
      call.adapter_dtype == call.shape.dtype || call.adapter_dtype == DType::f32,
      "lora_a must have the dtype of input or float32");
}

// What both families of ops do around a device's work.
class LoraOpsBase {
 public:
  using Optional = std::optional<Tensor>;
  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
  using Gradients4bit = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  static std::vector<int64_t> weight_sizes(const Tensor& weight, const Tensor& input) {
    STD_TORCH_CHECK(dtype_of(weight, "weight") == dtype_of(input, "input"), "weight must have the dtype of input");
    const Sizes sizes = weight.sizes();
    return {sizes.begin(), sizes.end()};
  }

  static LoraCall call_of(
      const Tensor& input, const LoraWeight& weight, const std::vector<int64_t>& sizes, const Tensor& lora_a,
      const Tensor& lora_b, const Optional& bias, int64_t lead) {
    LoraCall call = {LinearShape(input, sizes), input, weight, lora_a, lora_b, 0, dtype_of(lora_a, "lora_a"), bias};
    STD_TORCH_CHECK(lora_a.dim() == lead + 2, "lora_a must have ", lead + 2, " dimensions, not ", lora_a.dim());
    call.rank = lora_a.size(lead);
    if (bias) check_vector(*bias, "bias", call.shape.out, call.shape);
    return call;
  }

  // `wanted` as in library.cpp, with a place for dweight.
  template <class Device, class Call>
  static LoraGradients backward(
      const Optional& dy, const Call& call, const Optional& scale, const std::array<bool, 6>& wanted) {
    LoraGradients out;
    const LinearShape& shape = call.shape;
    if (dy) check_dy(*dy, shape);
    const Device device(call.input);
    const auto like = [&](const Tensor& t) { return device.empty(t.sizes(), dtype_of(t, "argument")); };
    if (wanted[0]) out.dinput = like(call.input);
    if (wanted[1]) out.dweight = like(*call.weight.floats);
    if (wanted[2]) out.dlora_a = like(call.lora_a);
    if (wanted[3]) out.dlora_b = like(call.lora_b);
    if (wanted[4] && call.bias) out.dbias = like(*call.bias);
    if (wanted[5] && scale) out.dscale = like(*scale);
    const bool nothing = !dy || shape.rows == 0 || shape.out == 0;
    LoraGradients computed = out;
    for (Tensor* gradient : out.all()) {
      if (!gradient->defined()) continue;
      // A bias has a gradient where there is no input as well.
      if (nothing || (shape.in == 0 && gradient != &out.dbias)) torch::stable::zero_(*gradient);
    }
    if (shape.in == 0) {
      computed = {};
      computed.dbias = out.dbias;
    }
    bool any = false;
    for (Tensor* gradient : computed.all()) any |= gradient->defined();
    if (!nothing && any) device.backward(call, *dy, computed);
    return out;
  }

  template <class Device, class Call>
  static Tensor forward(const Call& call) {
    const LinearShape& shape = call.shape;
    const Device device(call.input);
    Tensor y = device.empty(sizes_of(shape.output_sizes), shape.dtype);
    if (shape.rows == 0 || shape.out == 0) return y;
    if (shape.in > 0) device.forward(call, y);
    else if (call.bias) torch::stable::copy_(y, *call.bias);
    else torch::stable::zero_(y);
    return y;
  }

  static std::array<bool, 6> with_weight(const std::vector<bool>& wanted) {
    return {wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], wanted[5]};
  }

  static std::array<bool, 6> without_weight(const std::vector<bool>& wanted) {
    return {wanted[0], false, wanted[1], wanted[2], wanted[3], wanted[4]};
  }

  static Gradients all(const LoraGradients& g) {
    return {g.dinput, g.dweight, g.dlora_a, g.dlora_b, g.dbias, g.dscale};
  }

  static Gradients4bit all_4bit(const LoraGradients& g) {
    return {g.dinput, g.dlora_a, g.dlora_b, g.dbias, g.dscale};
  }
};

// The ops, given `Device`, one call's work on one device. It is made from input, of which only shape, dtype and device
// count, and has
//   Tensor empty(Sizes, DType) const;  // on input's device
//   void forward(const OneLora&, const Tensor& y) const;
//   void backward(const OneLora&, const Tensor& dy, const LoraGradients&) const;
// which write all of the outputs that are there, at least one. rows, out and in are at least 1; for the bias' gradient
// alone, in may be 0.
template <class Device>
class LoraOps : LoraOpsBase {
 public:
  static void register_forward_in(torch::stable::detail::StableLibrary& m) {
    m.impl("lora_linear", TORCH_BOX(&lora_linear));
    m.impl("lora_linear_4bit", TORCH_BOX(&lora_linear_4bit));
  }

  static void register_in(torch::stable::detail::StableLibrary& m) {
    register_forward_in(m);
    m.impl("lora_linear_backward", TORCH_BOX(&lora_linear_backward));
    m.impl("lora_linear_4bit_backward", TORCH_BOX(&lora_linear_4bit_backward));
  }

 private:
  static OneLora one(
      const Tensor& input, const LoraWeight& weight, const std::vector<int64_t>& sizes, const Tensor& lora_a,
      const Tensor& lora_b, const Optional& bias, const Optional& dora_scale, double scaling, double dropout_p,
      const Optional& rng) {
    OneLora call = {call_of(input, weight, sizes, lora_a, lora_b, bias, 0), scaling, dora_scale, {}};
    check_adapters(call, {});
    if (dora_scale) check_vector(*dora_scale, "dora_scale", call.shape.out, call.shape);
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "dropout_p must be from 0 to 1, not ", dropout_p);
    if (rng && dropout_p > 0) {
      int32_t code;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(rng->get(), &code));
      STD_TORCH_CHECK(
          code == aoti_torch_dtype_int64() && rng->dim() == 1 && rng->numel() == 2, "rng must be two of int64");
      call.dropout = {
          rng->is_contiguous() ? *rng : torch::stable::contiguous(*rng), static_cast<uint64_t>(dropout_p * 0x1p32),
          dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0.f};
    }
    return call;
  }

  static Tensor lora_linear(
      const Tensor& input, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, const Optional& bias,
      const Optional& dora_scale, double scaling, double dropout_p, const Optional& rng) {
    const LoraWeight floats = {&weight, nullptr};
    return forward<Device>(one(
        input, floats, weight_sizes(weight, input), lora_a, lora_b, bias, dora_scale, scaling, dropout_p, rng));
  }

  static Gradients lora_linear_backward(
      const Optional& dy, const Tensor& input, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
      const Optional& bias, const Optional& dora_scale, double scaling, double dropout_p, const Optional& rng,
      const std::vector<bool>& wanted) {
    const LoraWeight floats = {&weight, nullptr};
    const OneLora call = one(
        input, floats, weight_sizes(weight, input), lora_a, lora_b, bias, dora_scale, scaling, dropout_p, rng);
    return all(backward<Device>(dy, call, dora_scale, with_weight(wanted)));
  }

  static Tensor lora_linear_4bit(
      const Tensor& input, const Tensor& codes, const Tensor& absmax, const Optional& nested_absmax,
      const Optional& nested_code, const Optional& nested_offset, const Optional& code, const Optional& zero_points,
      const std::vector<int64_t>& sizes, int64_t blocksize, const Tensor& lora_a, const Tensor& lora_b,
      const Optional& bias, const Optional& dora_scale, double scaling, double dropout_p, const Optional& rng) {
    const WeightOf weight(
        codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, sizes, blocksize);
    const LoraWeight packed = {nullptr, &weight};
    return forward<Device>(one(input, packed, sizes, lora_a, lora_b, bias, dora_scale, scaling, dropout_p, rng));
  }

  static Gradients4bit lora_linear_4bit_backward(
      const Optional& dy, const Tensor& input, const Tensor& codes, const Tensor& absmax,
      const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset, const Optional& code,
      const Optional& zero_points, const std::vector<int64_t>& sizes, int64_t blocksize, const Tensor& lora_a,
      const Tensor& lora_b, const Optional& bias, const Optional& dora_scale, double scaling, double dropout_p,
      const Optional& rng, const std::vector<bool>& wanted) {
    const WeightOf weight(
        codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, sizes, blocksize);
    const LoraWeight packed = {nullptr, &weight};
    const OneLora call = one(input, packed, sizes, lora_a, lora_b, bias, dora_scale, scaling, dropout_p, rng);
    return all_4bit(backward<Device>(dy, call, dora_scale, without_weight(wanted)));
  }
};

// The same for ManyLoras.
template <class Device>
class MultiLoraOps : LoraOpsBase {
 public:
  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("multi_lora_linear", TORCH_BOX(&multi_lora_linear));
    m.impl("multi_lora_linear_backward", TORCH_BOX(&multi_lora_linear_backward));
    m.impl("multi_lora_linear_4bit", TORCH_BOX(&multi_lora_linear_4bit));
    m.impl("multi_lora_linear_4bit_backward", TORCH_BOX(&multi_lora_linear_4bit_backward));
  }

 private:
  static ManyLoras many(
      const Tensor& input, const LoraWeight& weight, const std::vector<int64_t>& sizes, const Tensor& lora_a,
      const Tensor& lora_b, const Tensor& adapter_ids, const Optional& bias, const Tensor& scaling) {
    LoraCall call = call_of(input, weight, sizes, lora_a, lora_b, bias, 1);
    const int64_t adapters = lora_a.size(0);
    check_adapters(call, adapters);
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(adapter_ids.get(), &code));
    const bool wide = code == aoti_torch_dtype_int64();
    STD_TORCH_CHECK(wide || code == aoti_torch_dtype_int32(), "adapter_ids must be int64 or int32");
    STD_TORCH_CHECK(
        adapter_ids.dim() == 1 && adapter_ids.size(0) == call.shape.rows, "adapter_ids must have shape (",
        call.shape.rows, ",)");
    check_vector(scaling, "scaling", adapters, call.shape);
    return {
        std::move(call), adapters, adapter_ids.is_contiguous() ? adapter_ids : torch::stable::contiguous(adapter_ids),
        wide, scaling};
  }

  static Tensor multi_lora_linear(
      const Tensor& input, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, const Tensor& adapter_ids,
      const Optional& bias, const Tensor& scaling) {
    const LoraWeight floats = {&weight, nullptr};
    return forward<Device>(
        many(input, floats, weight_sizes(weight, input), lora_a, lora_b, adapter_ids, bias, scaling));
  }

  static Gradients multi_lora_linear_backward(
      const Optional& dy, const Tensor& input, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
      const Tensor& adapter_ids, const Optional& bias, const Tensor& scaling, const std::vector<bool>& wanted) {
    const LoraWeight floats = {&weight, nullptr};
    const ManyLoras call =
        many(input, floats, weight_sizes(weight, input), lora_a, lora_b, adapter_ids, bias, scaling);
    return all(backward<Device>(dy, call, scaling, with_weight(wanted)));
  }

  static Tensor multi_lora_linear_4bit(
      const Tensor& input, const Tensor& codes, const Tensor& absmax, const Optional& nested_absmax,
      const Optional& nested_code, const Optional& nested_offset, const Optional& code, const Optional& zero_points,
      const std::vector<int64_t>& sizes, int64_t blocksize, const Tensor& lora_a, const Tensor& lora_b,
      const Tensor& adapter_ids, const Optional& bias, const Tensor& scaling) {
    const WeightOf weight(
        codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, sizes, blocksize);
    const LoraWeight packed = {nullptr, &weight};
    return forward<Device>(many(input, packed, sizes, lora_a, lora_b, adapter_ids, bias, scaling));
  }

  static Gradients4bit multi_lora_linear_4bit_backward(
      const Optional& dy, const Tensor& input, const Tensor& codes, const Tensor& absmax,
      const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset, const Optional& code,
      const Optional& zero_points, const std::vector<int64_t>& sizes, int64_t blocksize, const Tensor& lora_a,
      const Tensor& lora_b, const Tensor& adapter_ids, const Optional& bias, const Tensor& scaling,
      const std::vector<bool>& wanted) {
    const WeightOf weight(
        codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, sizes, blocksize);
    const LoraWeight packed = {nullptr, &weight};
    const ManyLoras call = many(input, packed, sizes, lora_a, lora_b, adapter_ids, bias, scaling);
    return all_4bit(backward<Device>(dy, call, scaling, without_weight(wanted)));
  }
};

// The norm of each row of weight + scaling · lora_b · lora_a. `Device` is made from weight and has empty() as above and
//   void norm(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling,
//             const Tensor& out) const;
// which writes all of out, contiguous fp32. Sizes are at least 1, strides any; lora_a and lora_b are of one dtype, the
// weight's or fp32.
template <class Device>
class DoraNormOps {
 public:
  static void register_in(torch::stable::detail::StableLibrary& m) { m.impl("dora_norm", TORCH_BOX(&dora_norm)); }

 private:
  static Tensor dora_norm(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling) {
    STD_TORCH_CHECK(weight.dim() == 2, "weight must have shape (out, in), not ", weight.dim(), " dimensions");
    const std::vector<int64_t> sizes = {weight.size(0), weight.size(1)};
    check_adapters(LoraOpsBase::call_of(weight, {}, sizes, lora_a, lora_b, {}, 0), {});
    const Device device(weight);
    Tensor out = device.empty(Sizes(sizes.data(), 1), DType::f32);
    if (sizes[0] == 0) return out;
    if (sizes[1] > 0) device.norm(weight, lora_a, lora_b, scaling, out);
    else torch::stable::zero_(out);
    return out;
  }
};

}  // namespace pykern
