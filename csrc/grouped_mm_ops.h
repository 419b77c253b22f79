// grouped_mm and its gradient as ops of a device: the signatures of library.cpp, checks, outputs, calls in which nothing
// is to be computed. What computes them is given by the launchers of each device, cpu/grouped_mm.cpp and
// cuda/grouped_mm.cu. They multiply groups of rows: a 2-D mat_a by a 3-D mat_b.

#pragma once

#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "tensors.h"
#include "weight4bit_ops.h"

namespace pykern {

// A call, of which shapes and dtypes are checked; strides of mat_a, mat_b and bias are any.
struct GroupedCall {
  Tensor mat_a;  // (rows or what gather reads, inner)
  Tensor mat_b;  // (groups, inner, columns)
  Tensor offs;   // (groups,) int32, contiguous
  std::optional<Tensor> bias;             // (groups, columns) or (columns,)
  std::optional<Tensor> gather, scatter;  // (rows,) int64, contiguous
  DType dtype, out_dtype;
  int64_t rows, a_rows, inner, columns;
  int groups;
};

// The ops, given `Grouped`, one call's work on one device. A Grouped is made from mat_a and has
//   static constexpr bool kMixesDtypes;  // whether mat_b may have another dtype than mat_a
//   Tensor empty(Sizes, DType) const;  // on mat_a's device
//   void forward(const GroupedCall&, const Tensor& output) const;
//   void backward(const GroupedCall&, const Tensor& doutput, const Tensor& dmat_a, const Tensor& dmat_b,
//                 const Tensor& dbias) const;
// which write all of those outputs that are defined; these are contiguous and have elements. There may be no rows and
// nothing to sum.
template <class Grouped>
class GroupedMmOps {
 public:
  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("grouped_mm", TORCH_BOX(&forward));
    m.impl("grouped_mm_backward", TORCH_BOX(&backward));
  }

 private:
  using Optional = std::optional<Tensor>;
  using OptionalType = std::optional<torch::headeronly::ScalarType>;

  static Tensor forward(
      const Tensor& mat_a, const Tensor& mat_b, const Optional& offs, const Optional& bias, OptionalType out_dtype,
      const Optional& gather, const Optional& scatter) {
    const GroupedCall call = call_of(mat_a, mat_b, offs, bias, out_dtype, gather, scatter);
    const Grouped grouped(mat_a);
    const int64_t sizes[2] = {call.rows, call.columns};
    const Tensor output = grouped.empty(Sizes(sizes, 2), call.out_dtype);
    if (output.numel() > 0) grouped.forward(call, output);
    return output;
  }

  static std::tuple<Tensor, Tensor, Tensor> backward(
      const Optional& doutput, const Tensor& mat_a, const Tensor& mat_b, const Optional& offs, const Optional& bias,
      OptionalType out_dtype, const Optional& gather, const Optional& scatter, std::vector<bool> wanted) {
    const GroupedCall call = call_of(mat_a, mat_b, offs, bias, out_dtype, gather, scatter);
    STD_TORCH_CHECK(doutput, "doutput must be there");
    STD_TORCH_CHECK(
        doutput->dim() == 2 && doutput->size(0) == call.rows && doutput->size(1) == call.columns,
        "doutput must have shape (", call.rows, ", ", call.columns, ")");
    dtype_of(*doutput, "doutput");
    const Grouped grouped(mat_a);
    std::tuple<Tensor, Tensor, Tensor> gradients;
    bool any = false;
    const auto like = [&](bool wants, const Tensor& t, Tensor& gradient) {
      if (!wants) return Tensor();
      gradient = grouped.empty(t.sizes(), dtype_of(t, "argument"));
      any |= gradient.numel() > 0;
      return gradient.numel() > 0 ? gradient : Tensor();
    };
    const Tensor dmat_a = like(wanted[0], mat_a, std::get<0>(gradients));
    const Tensor dmat_b = like(wanted[1], mat_b, std::get<1>(gradients));
    const Tensor dbias = bias ? like(wanted[2], *bias, std::get<2>(gradients)) : Tensor();
    if (any) grouped.backward(call, *doutput, dmat_a, dmat_b, dbias);
    return gradients;
  }

  static GroupedCall call_of(
      const Tensor& mat_a, const Tensor& mat_b, const Optional& offs, const Optional& bias, OptionalType out_dtype,
      const Optional& gather, const Optional& scatter) {
    STD_TORCH_CHECK(
        mat_a.dim() == 2 && mat_b.dim() == 3, "mat_a must have 2 dimensions and mat_b 3, not ", mat_a.dim(), " and ",
        mat_b.dim());
    const int64_t groups = mat_b.size(0), inner = mat_b.size(1), columns = mat_b.size(2);
    STD_TORCH_CHECK(mat_a.size(1) == inner, "rows of mat_a must have ", inner, " elements, not ", mat_a.size(1));
    const DType dtype = dtype_of(mat_a, "mat_a");
    STD_TORCH_CHECK(
        dtype_of(mat_b, "mat_b") == dtype || Grouped::kMixesDtypes, "mat_b must have the dtype of mat_a");
    STD_TORCH_CHECK(groups > 0 && groups < INT32_MAX, "mat_b must have at least one group");
    STD_TORCH_CHECK(offs, "offs must be there");
    const int64_t rows = gather ? gather->numel() : mat_a.size(0);
    STD_TORCH_CHECK(!gather || rows == 0 || mat_a.size(0) > 0, "mat_a must have rows for gather to read");
    if (bias) {
      dtype_of(*bias, "bias");
      const bool one = bias->dim() == 1;
      STD_TORCH_CHECK(
          (one || (bias->dim() == 2 && bias->size(0) == groups)) && bias->size(one ? 0 : 1) == columns,
          "bias must have shape (", columns, ",) or (", groups, ", ", columns, ")");
    }
    return {
        .mat_a = mat_a,
        .mat_b = mat_b,
        .offs = vector(*offs, "offs", groups, aoti_torch_dtype_int32()),
        .bias = bias,
        .gather = rows_index(gather, "gather", rows),
        .scatter = rows_index(scatter, "scatter", rows),
        .dtype = dtype,
        .out_dtype = out_dtype ? dtype_from(*out_dtype, "out_dtype") : dtype,
        .rows = rows,
        .a_rows = mat_a.size(0),
        .inner = inner,
        .columns = columns,
        .groups = static_cast<int>(groups),
    };
  }

  static Optional rows_index(const Optional& given, const char* name, int64_t rows) {
    if (!given) return {};
    return vector(*given, name, rows, aoti_torch_dtype_int64());
  }

  static Tensor vector(const Tensor& given, const char* name, int64_t count, int32_t code) {
    int32_t own;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(given.get(), &own));
    STD_TORCH_CHECK(own == code, name, " must be ", code == aoti_torch_dtype_int32() ? "int32" : "int64");
    STD_TORCH_CHECK(given.dim() == 1 && given.size(0) == count, name, " must have shape (", count, ",)");
    return given.is_contiguous() ? given : torch::stable::contiguous(given);
  }
};

}  // namespace pykern
