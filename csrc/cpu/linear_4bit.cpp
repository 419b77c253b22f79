// Multiplying by 4-bit weights on the CPU: memory and threads. The arithmetic is in simd/linear_4bit.cpp and
// simd/linear_4bit_rows.cpp.

#include "linear_4bit.h"

#include <algorithm>

#include "../linear_4bit_ops.h"
#include "compiled.h"
#include "parallel.h"
#include "scratch.h"

namespace pykern {
namespace {

using Optional = std::optional<Tensor>;

const LinearKernels& kernels() { return compiled(&PYKERN_CHOOSE(linear_4bit)); }
const FewRowsKernels& few_rows_kernels() { return compiled(&PYKERN_CHOOSE(linear_4bit_rows)); }

int index(DType dtype) { return static_cast<int>(dtype); }
int64_t parts(int64_t count, int64_t most) { return (count + most - 1) / most; }

Tensor floats_of(const Tensor& t) {
  if (dtype_of(t, "bias") == DType::f32 && t.is_contiguous()) return t;
  Tensor copy = empty(t.sizes(), DType::f32);
  torch::stable::copy_(copy, t);
  return copy;
}

void multiply_few(const LinearCall& call, DType dtype) {
  const FewRowsKernels& table = few_rows_kernels();
  FewRows few = {};
  few.call = call;
  few.stride = table.prepared(call.weight);
  const Scratch prepared(few.stride * call.rows);
  for (int64_t row = 0; row < call.rows; ++row)
    few.has_nan[row] =
        table.prepare[index(dtype)](call.weight, call.left, row, prepared.get() + row * few.stride);
  few.prepared = prepared.get();
  parallel(call.columns, call.depth, [&](int64_t begin, int64_t end) {
    const Scratch scratch(table.scratch(call.weight));
    table.run[index(dtype)](few, {begin, end}, scratch.get());
  });
}

// Spans as equal as can be, so that threads have as much to do. Results do not depend on how columns and rows are cut.
void multiply_spans(const LinearCall& call, LinearKernels::Multiply multiply) {
  const LinearKernels& table = kernels();
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t row_spans = parts(call.rows, table.most_rows), rows = parts(call.rows, row_spans);
  const int64_t wanted = parts(parts(call.columns, table.most_columns) * row_spans, threads) * threads;
  const int64_t units = parts(call.columns, table.column_unit);
  const int64_t columns = parts(units, std::min(units, parts(wanted, row_spans))) * table.column_unit;
  const int64_t column_spans = parts(call.columns, columns);
  parallel(column_spans * row_spans, rows * columns * call.depth, [&](int64_t begin, int64_t end) {
    const Scratch scratch(table.scratch);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / column_spans * rows, column = task % column_spans * columns;
      multiply(
          call, {row, std::min(call.rows, row + rows)}, {column, std::min(call.columns, column + columns)},
          scratch.get());
    }
  });
}

struct CpuLinear {
  explicit CpuLinear(const Tensor&) {}

  Tensor empty(Sizes sizes, DType dtype) const { return pykern::empty(sizes, dtype); }

  void forward(
      const Tensor& input, const WeightOf& weight, const Optional& bias, const LinearShape& shape,
      const Tensor& y) const {
    const RowsOf rows(input);
    Optional floats;
    if (bias) floats = floats_of(*bias);
    LinearCall call = {weight.weight, rows.rows, shape.rows, shape.out, shape.in, nullptr, y.data_ptr()};
    if (bias) call.bias = static_cast<const float*>(floats->data_ptr());
    if (shape.rows <= kFewRows) multiply_few(call, shape.dtype);
    else multiply_spans(call, kernels().by_transposed[index(shape.dtype)]);
  }

  void backward_input(
      const Tensor& dy, const WeightOf& weight, const LinearShape& shape, const Tensor& dinput) const {
    const RowsOf rows(dy);
    const LinearCall call = {weight.weight, rows.rows, shape.rows, shape.in, shape.out, nullptr, dinput.data_ptr()};
    multiply_spans(call, kernels().by_weight[index(shape.dtype)]);
  }

  void backward_bias(const Tensor& dy, const LinearShape& shape, const Tensor& dbias) const {
    const RowsOf rows(dy);
    const bool direct = dtype_of(dbias, "dbias") == DType::f32;
    Tensor sums = direct ? dbias : pykern::empty(dbias.sizes(), DType::f32);
    constexpr int64_t kLine = 64;
    parallel(parts(shape.out, kLine), shape.rows * kLine, [&](int64_t begin, int64_t end) {
      kernels().sum_rows[index(shape.dtype)](
          rows.rows, shape.rows, {begin * kLine, std::min(shape.out, end * kLine)},
          static_cast<float*>(sums.data_ptr()));
    });
    Tensor out = dbias;
    if (!direct) torch::stable::copy_(out, sums);
  }
};

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) { pykern::LinearOps<pykern::CpuLinear>::register_in(m); }
