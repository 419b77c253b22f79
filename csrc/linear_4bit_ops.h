// linear_4bit and its gradient as ops of a device: the signatures of library.cpp, checks, outputs, calls in which there
// is nothing to multiply. What computes them is given by the launchers of each device, cpu/linear_4bit.cpp and
// cuda/linear_4bit.cu.

#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"
#include "weight4bit_ops.h"

namespace pykern {

// y (rows, out) = input (rows, in) · Wᵀ + bias, W of (out, in).
struct LinearShape {
  LinearShape(const Tensor& input, const std::vector<int64_t>& weight) : dtype(dtype_of(input, "input")) {
    STD_TORCH_CHECK(weight.size() == 2, "shape must be (out, in) of a linear layer, not of ", weight.size(), " sizes");
    out = weight[0];
    in = weight[1];
    const Sizes sizes = input.sizes();
    STD_TORCH_CHECK(sizes.size() > 0, "input must have at least one dimension");
    STD_TORCH_CHECK(
        sizes[sizes.size() - 1] == in, "rows of input must have ", in, " elements, not ", sizes[sizes.size() - 1]);
    input_sizes.assign(sizes.begin(), sizes.end());
    output_sizes = input_sizes;
    output_sizes.back() = out;
    for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
  }

  DType dtype;  // of input, output and their gradients
  int64_t rows = 1, in, out;
  std::vector<int64_t> input_sizes, output_sizes;
};

inline Sizes sizes_of(const std::vector<int64_t>& sizes) { return Sizes(sizes.data(), sizes.size()); }

// A vector of so many elements, of the input's dtype or fp32.
inline void check_vector(const Tensor& t, const char* name, int64_t count, const LinearShape& shape) {
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == count, name, " must have shape (", count, ",)");
  const DType dtype = dtype_of(t, name);
  STD_TORCH_CHECK(dtype == shape.dtype || dtype == DType::f32, name, " must have the dtype of input or float32");
}

inline void check_dy(const Tensor& dy, const LinearShape& shape) {
  const Sizes given = dy.sizes();
  STD_TORCH_CHECK(
      std::equal(given.begin(), given.end(), shape.output_sizes.begin(), shape.output_sizes.end()),
      "dy must have the shape of the output");
  STD_TORCH_CHECK(dtype_of(dy, "dy") == shape.dtype, "dy must have the dtype of input");
}

// The ops, given `Linear`, one call's work on one device. A Linear is made from input, of which only shape, dtype and
// device count, and has
//   Tensor empty(Sizes, DType) const;  // on input's device
//   void forward(const Tensor& input, const WeightOf&, const std::optional<Tensor>& bias, const LinearShape&,
//                const Tensor& y) const;
//   void backward_input(const Tensor& dy, const WeightOf&, const LinearShape&, const Tensor& dinput) const;
//   void backward_bias(const Tensor& dy, const LinearShape&, const Tensor& dbias) const;
// which write all of their output, contiguous. rows, in and out are at least 1, for the bias' gradient rows and out.
// Shapes and dtypes are checked: bias and dbias are of the input's dtype or fp32. Strides are any.
template <class Linear>
class LinearOps {
 public:
  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("linear_4bit", TORCH_BOX(&forward));
    m.impl("linear_4bit_backward", TORCH_BOX(&backward));
  }

 private:
  using Optional = std::optional<Tensor>;
  using Gradients = std::tuple<Tensor, Tensor>;

  static Tensor forward(
      const Tensor& input, const Tensor& codes, const Tensor& absmax, const Optional& nested_absmax,
      const Optional& nested_code, const Optional& nested_offset, const Optional& code, const Optional& zero_points,
      const std::vector<int64_t>& sizes, int64_t blocksize, const Optional& bias) {
    const LinearShape shape(input, sizes);
    const WeightOf weight(
        codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, sizes, blocksize);
    if (bias) check_vector(*bias, "bias", shape.out, shape);
    const Linear linear(input);
    Tensor y = linear.empty(sizes_of(shape.output_sizes), shape.dtype);
    if (shape.rows == 0 || shape.out == 0) return y;
    if (shape.in > 0) linear.forward(input, weight, bias, shape, y);
    else if (bias) torch::stable::copy_(y, *bias);
    else torch::stable::zero_(y);
    return y;
  }

  // What is not wanted, or is no argument, stays undefined.
  static Gradients backward(
      const Optional& dy, const Tensor& input, const Tensor& codes, const Tensor& absmax,
      const Optional& nested_absmax, const Optional& nested_code, const Optional& nested_offset, const Optional& code,
      const Optional& zero_points, const std::vector<int64_t>& sizes, int64_t blocksize, const Optional& bias,
      const std::vector<bool>& wanted) {
    Tensor dinput, dbias;
    const bool wants_dinput = wanted[0], wants_dbias = wanted[1] && bias;
    if (!wants_dinput && !wants_dbias) return {dinput, dbias};
    const LinearShape shape(input, sizes);
    const WeightOf weight(
        codes, absmax, nested_absmax, nested_code, nested_offset, code, zero_points, sizes, blocksize);
    if (bias) check_vector(*bias, "bias", shape.out, shape);
    if (dy) check_dy(*dy, shape);
    const Linear linear(input);
    const bool zero = !dy || shape.rows == 0 || shape.out == 0;
    if (wants_dinput) {
      dinput = linear.empty(sizes_of(shape.input_sizes), shape.dtype);
      if (zero) torch::stable::zero_(dinput);
      else if (shape.in > 0) linear.backward_input(*dy, weight, shape, dinput);
    }
    if (wants_dbias) {
      dbias = linear.empty(Sizes(&shape.out, 1), dtype_of(*bias, "bias"));
      if (zero) torch::stable::zero_(dbias);
      else linear.backward_bias(*dy, shape, dbias);
    }
    return {dinput, dbias};
  }
};

}  // namespace pykern
