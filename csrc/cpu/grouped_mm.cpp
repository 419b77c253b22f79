// A matmul per group of rows on the CPU. Each group is a product of linear_host.h, whose rows are gathered and scattered
// where they lie; rows that go nowhere are in no product.

#include "../grouped_mm_ops.h"

#include <cstring>

#include "lora_host.h"

namespace pykern {
namespace {

// The rows that are multiplied, group after group: which each one is, what it reads of mat_a, what it writes.
class GroupedRows {
 public:
  explicit GroupedRows(const GroupedCall& call) {
    const auto index = [](const std::optional<Tensor>& t) {
      return t ? static_cast<const int64_t*>(t->data_ptr()) : nullptr;
    };
    const int64_t* const gather = index(call.gather);
    const int64_t* const scatter = index(call.scatter);
    const int32_t* const offs = static_cast<const int32_t*>(call.offs.data_ptr());
    int64_t row = 0;
    for (int g = 0; g < call.groups; ++g) {
      for (const int64_t end = std::min<int64_t>(offs[g], call.rows); row < end; ++row) {
        const int64_t to = scatter ? scatter[row] : row;
        if (to < 0 || to >= call.rows) continue;
        row_.push_back(row);
        source_.push_back(gather ? std::clamp<int64_t>(gather[row], 0, call.a_rows - 1) : row);
        target_.push_back(to);
      }
      ends_.push_back(count());
    }
  }

  int64_t count() const { return static_cast<int64_t>(row_.size()); }
  int64_t first(int g) const { return g == 0 ? 0 : ends_[g - 1]; }
  int64_t count(int g) const { return ends_[g] - first(g); }
  const int64_t* row() const { return row_.data(); }
  const int64_t* source() const { return source_.data(); }
  const int64_t* target() const { return target_.data(); }

 private:
  std::vector<int64_t> ends_, row_, source_, target_;
};

// The groups' matrices, read where they lie if rows or columns are contiguous.
class Matrices {
 public:
  explicit Matrices(const Tensor& t) : tensor_(t), dtype_(dtype_of(t, "mat_b")) {
    flipped_ = t.stride(2) != 1 && t.stride(1) == 1;
    if (!flipped_ && t.stride(2) != 1 && t.size(2) > 1) tensor_ = torch::stable::contiguous(t);
  }

  // That of a group, or its transpose, as a right matrix.
  RightMatrix of(int64_t group, bool transposed) const {
    char* const data = static_cast<char*>(tensor_.data_ptr()) + group * tensor_.stride(0) * tensor_.element_size();
    return {nullptr, rows_in(data, tensor_.stride(flipped_ ? 2 : 1), dtype_), transposed != flipped_};
  }

 private:
  Tensor tensor_;
  DType dtype_;
  bool flipped_;
};

FloatRows ordered(FloatRows rows, const int64_t* order) {
  rows.order = order;
  return rows;
}

// Zeros for the rows of a contiguous matrix that are not among so many.
void zero_others(const Tensor& matrix, const int64_t* rows, int64_t count) {
  const int64_t bytes = matrix.size(1) * matrix.element_size();
  std::vector<bool> written(matrix.size(0));
  for (int64_t i = 0; i < count; ++i) written[rows[i]] = true;
  for (int64_t row = 0; row < matrix.size(0); ++row)
    if (!written[row]) std::memset(static_cast<char*>(matrix.data_ptr()) + row * bytes, 0, bytes);
}

struct CpuGrouped {
  static constexpr bool kMixesDtypes = true;

  explicit CpuGrouped(const Tensor&) {}

  Tensor empty(Sizes sizes, DType dtype) const { return pykern::empty(sizes, dtype); }

  void forward(const GroupedCall& call, const Tensor& output) const {
    const GroupedRows rows(call);
    const FloatRowsOf a(call.mat_a, "mat_a");
    std::optional<Floats> bias;
    if (call.bias) bias.emplace(*call.bias, "bias");
    zero_others(output, rows.target(), rows.count());
    const int64_t bias_group = call.bias && call.bias->dim() == 2 ? call.columns : 0;
    multiply_groups(call, rows, ordered(a.floats, rows.source()), false, [&](LinearCall& product, int g) {
      product.result = output.data_ptr(), product.dtype = call.out_dtype;
      product.order = rows.target() + rows.first(g);
      if (bias) product.bias = bias->get() + g * bias_group;
    });
  }

  void backward(
      const GroupedCall& call, const Tensor& doutput, const Tensor& dmat_a, const Tensor& dmat_b,
      const Tensor& dbias) const {
    const GroupedRows rows(call);
    const FloatRowsOf a(call.mat_a, "mat_a"), dy(doutput, "doutput");
    const FloatRows given = ordered(dy.floats, rows.target());
    if (dmat_a.defined()) {
      if (call.gather) gathered_gradient(call, rows, given, dmat_a);
      else row_gradient(call, rows, given, dmat_a);
    }
    if (dmat_b.defined()) matrix_gradient(call, rows, ordered(a.floats, rows.source()), given, dmat_b);
    if (dbias.defined()) bias_gradient(call, rows, given, dbias);
  }

 private:
  // left (rows, …) times each group's matrix or its transpose, for groups that have rows; finish(product, g) says where
  // it goes.
  template <class Finish>
  static void multiply_groups(
      const GroupedCall& call, const GroupedRows& rows, const FloatRows& left, bool transposed, const Finish& finish) {
    const Matrices matrices(call.mat_b);
    const int64_t depth = transposed ? call.columns : call.inner, columns = transposed ? call.inner : call.columns;
    std::vector<LinearCall> products;
    for (int g = 0; g < call.groups; ++g) {
      if (rows.count(g) == 0) continue;
      products.push_back(product(
          ordered(left, left.order + rows.first(g)), matrices.of(g, transposed), rows.count(g), columns, depth,
          static_cast<float*>(nullptr)));
      finish(products.back(), g);
    }
    multiply(products.data(), static_cast<int64_t>(products.size()));
  }

  static void row_gradient(
      const GroupedCall& call, const GroupedRows& rows, const FloatRows& dy, const Tensor& dmat_a) {
    zero_others(dmat_a, rows.row(), rows.count());
    multiply_groups(call, rows, dy, true, [&](LinearCall& product, int g) {
      product.result = dmat_a.data_ptr(), product.dtype = call.dtype;
      product.order = rows.row() + rows.first(g);
    });
  }

  // What rows of mat_a were read more than once, or never: their gradients are summed in the order of the rows.
  static void gathered_gradient(
      const GroupedCall& call, const GroupedRows& rows, const FloatRows& dy, const Tensor& dmat_a) {
    const Buffer gradients(rows.count(), call.inner);
    multiply_groups(
        call, rows, dy, true, [&](LinearCall& product, int g) { product.result = gradients.row(rows.first(g)); });

    std::vector<int64_t> first(call.a_rows + 1), order(rows.count());
    for (int64_t i = 0; i < rows.count(); ++i) ++first[rows.source()[i] + 1];
    for (int64_t row = 0; row < call.a_rows; ++row) first[row + 1] += first[row];
    std::vector<int64_t> next = first;
    for (int64_t i = 0; i < rows.count(); ++i) order[next[rows.source()[i]]++] = i;
    const bool direct = call.dtype == DType::f32;
    const Tensor sums = direct ? dmat_a : pykern::empty(dmat_a.sizes(), DType::f32);
    float* const to = static_cast<float*>(sums.data_ptr());
    parallel(call.a_rows, call.inner * (rows.count() / call.a_rows + 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        linear_kernels().sum_rows(
            ordered(gradients.from(), order.data() + first[row]), first[row + 1] - first[row], {0, call.inner},
            to + row * call.inner);
    });
    Tensor out = dmat_a;
    if (!direct) torch::stable::copy_(out, sums);
  }

  // aᵀ · dy of each group, zeros of one without rows.
  static void matrix_gradient(
      const GroupedCall& call, const GroupedRows& rows, const FloatRows& a, const FloatRows& dy,
      const Tensor& dmat_b) {
    std::vector<LinearCall> products;
    char* to = static_cast<char*>(dmat_b.data_ptr());
    for (int g = 0; g < call.groups; ++g, to += call.inner * call.columns * dmat_b.element_size()) {
      const int64_t first = rows.first(g);
      products.push_back(product(
          ordered(a, a.order + first), {nullptr, ordered(dy, dy.order + first), false}, call.inner, call.columns,
          rows.count(g), static_cast<float*>(nullptr)));
      products.back().left_transposed = true;
      products.back().result = to;
      products.back().dtype = dtype_of(dmat_b, "dmat_b");
    }
    multiply(products.data(), static_cast<int64_t>(products.size()));
  }

  static void bias_gradient(
      const GroupedCall& call, const GroupedRows& rows, const FloatRows& dy, const Tensor& dbias) {
    const bool direct = dtype_of(dbias, "dbias") == DType::f32;
    const Tensor sums = direct ? dbias : pykern::empty(dbias.sizes(), DType::f32);
    float* const to = static_cast<float*>(sums.data_ptr());
    const Span all = {0, call.columns};
    if (dbias.dim() == 1) {
      linear_kernels().sum_rows(dy, rows.count(), all, to);
    } else {
      parallel(call.groups, call.columns * (rows.count() / call.groups + 1), [&](int64_t begin, int64_t end) {
        for (int g = static_cast<int>(begin); g < end; ++g)
          linear_kernels().sum_rows(
              ordered(dy, dy.order + rows.first(g)), rows.count(g), all, to + g * call.columns);
      });
    }
    Tensor out = dbias;
    if (!direct) torch::stable::copy_(out, sums);
  }
};

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) { pykern::GroupedMmOps<pykern::CpuGrouped>::register_in(m); }
