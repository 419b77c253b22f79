// Products of matrices on torch's threads. The arithmetic is in simd/linear.cpp and simd/linear_4bit_rows.cpp.

#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "../weight4bit_ops.h"
#include "compiled.h"
#include "linear_4bit.h"
#include "parallel.h"
#include "scratch.h"

namespace pykern {

inline const LinearKernels& linear_kernels() { return compiled(&PYKERN_CHOOSE(linear)); }

inline int64_t parts(int64_t count, int64_t most) { return (count + most - 1) / most; }

// Rows of a tensor as products read them; they live as long as this.
class FloatRowsOf {
 public:
  explicit FloatRowsOf(const Tensor& t, const char* name) : rows_(t), floats{rows_.rows, dtype_of(t, name)} {}

 private:
  const RowsOf rows_;

 public:
  FloatRows floats;
};

// A vector in fp32, contiguous.
class Floats {
 public:
  Floats(const Tensor& t, const char* name) : tensor_(t) {
    if (dtype_of(t, name) == DType::f32 && t.is_contiguous()) return;
    tensor_ = empty(t.sizes(), DType::f32);
    torch::stable::copy_(tensor_, t);
  }
  float* get() const { return static_cast<float*>(tensor_.data_ptr()); }

 private:
  Tensor tensor_;
};

// How a product is cut into spans, as equal as can be, so that threads have as much to do. Results do not depend on how
// columns and rows are cut.
struct Cut {
  Cut(const LinearCall& call, int64_t threads) {
    constexpr int64_t kFewestRows = 32;  // for which a right matrix is worth decoding again
    const LinearKernels& table = linear_kernels();
    row_spans = parts(call.rows, table.most_rows);
    const int64_t wanted = parts(parts(call.columns, table.most_columns) * row_spans, threads) * threads;
    const int64_t units = parts(call.columns, table.column_unit);
    columns = parts(units, std::min(units, parts(wanted, row_spans))) * table.column_unit;
    column_spans = parts(call.columns, columns);
    row_spans = std::max(row_spans, std::min(parts(call.rows, kFewestRows), parts(threads, column_spans)));
    rows = parts(call.rows, row_spans);
    row_spans = parts(call.rows, rows);
  }
  int64_t tasks() const { return row_spans * column_spans; }

  int64_t rows, columns;  // of a span
  int64_t row_spans, column_spans;
};

// Products that do not read each other's results.
inline void multiply(const LinearCall* calls, int64_t count) {
  const LinearKernels& table = linear_kernels();
  struct Piece {
    const LinearCall* call;
    Cut cut;
    int64_t first;  // of its tasks among all
  };
  std::vector<Piece> pieces;
  const int64_t threads = parts(torch::stable::get_num_threads(), std::max<int64_t>(count, 1));
  int64_t tasks = 0, elements = 0;
  for (const LinearCall* call = calls; call != calls + count; ++call) {
    if (call->rows == 0 || call->columns == 0) continue;
    pieces.push_back({call, Cut(*call, threads), tasks});
    tasks += pieces.back().cut.tasks();
    int64_t depth = call->depth + 1;
    if (call->lows > 0) depth += call->low->depth;
    elements += call->rows * call->columns * depth;
  }
  if (tasks == 0) return;
  parallel(tasks, elements / tasks, [&](int64_t begin, int64_t end) {
    const Scratch scratch(table.scratch);
    auto piece = std::upper_bound(
        pieces.begin(), pieces.end(), begin, [](int64_t task, const Piece& p) { return task < p.first; });
    --piece;
    for (int64_t task = begin; task < end; ++task) {
      while (task >= piece->first + piece->cut.tasks()) ++piece;
      const LinearCall& call = *piece->call;
      const Cut& cut = piece->cut;
      const int64_t own = task - piece->first;
      const int64_t row = own / cut.column_spans * cut.rows, column = own % cut.column_spans * cut.columns;
      table.multiply(
          call, {row, std::min(call.rows, row + cut.rows)}, {column, std::min(call.columns, column + cut.columns)},
          scratch.get());
    }
  });
}

inline void multiply(const LinearCall& call) { multiply(&call, 1); }

// The first so many columns' sums over all rows.
inline void sum_rows(const FloatRows& from, int64_t rows, int64_t columns, const Tensor& to) {
  const bool direct = dtype_of(to, "sums") == DType::f32;
  const Tensor sums = direct ? to : empty(to.sizes(), DType::f32);
  constexpr int64_t kLine = 64;
  parallel(parts(columns, kLine), rows * kLine, [&](int64_t begin, int64_t end) {
    linear_kernels().sum_rows(
        from, rows, {begin * kLine, std::min(columns, end * kLine)}, static_cast<float*>(sums.data_ptr()));
  });
  Tensor out = to;
  if (!direct) torch::stable::copy_(out, sums);
}

// result (rows, columns) = input · Wᵀ + bias for at most kFewRows rows.
inline void multiply_few(
    const Weight4bit& weight, const FloatRows& input, int64_t rows, int64_t columns, const float* bias, DType dtype,
    void* result) {
  const FewRowsKernels& table = compiled(&PYKERN_CHOOSE(linear_4bit_rows));
  const int64_t stride = table.prepared(weight);
  const Scratch prepared(stride * rows);
  FewRows few = {weight, rows, columns, bias, result, prepared.get(), stride, {}};
  for (int64_t row = 0; row < rows; ++row)
    few.has_nan[row] = table.prepare[static_cast<int>(input.dtype)](
        weight, input.rows, row, prepared.get() + row * stride);
  parallel(columns, weight.columns, [&](int64_t begin, int64_t end) {
    const Scratch scratch(table.scratch(weight));
    table.run[static_cast<int>(dtype)](few, {begin, end}, scratch.get());
  });
}

}  // namespace pykern
