// Pieces of calls with low-rank adapters, one or many.

#pragma once

#include "../lora_ops.h"
#include "linear_host.h"

namespace pykern {

inline FloatRows rows_in(const void* data, int64_t columns, DType dtype) {
  return {{const_cast<void*>(data), 1, {1}, {columns}}, dtype};
}

// Contiguous fp32 rows for results on the way.
class Buffer {
 public:
  Buffer(int64_t rows, int64_t columns) : columns_(columns), memory_(rows * columns) {}
  float* row(int64_t row) const { return memory_.get() + row * columns_; }
  FloatRows from(int64_t first = 0) const { return rows_in(row(first), columns_, DType::f32); }

 private:
  int64_t columns_;
  Scratch memory_;
};

// A layer's weight: the right matrix of dy · W, and transposed of x · Wᵀ.
class BaseOf {
 public:
  explicit BaseOf(const LoraWeight& weight) : packed_(weight.packed ? &weight.packed->weight : nullptr) {
    if (packed_) return;
    const Tensor& t = *weight.floats;
    // Columns that are contiguous are read as the rows that they are of the transpose.
    flipped_ = t.stride(0) == 1 && t.stride(1) != 1;
    rows_.emplace(flipped_ ? torch::stable::transpose(t, 0, 1) : t, "weight");
  }

  const Weight4bit* packed() const { return packed_; }
  RightMatrix matrix() const { return of(false); }
  RightMatrix transposed() const { return of(true); }

 private:
  RightMatrix of(bool transposed) const {
    if (packed_) return {packed_, {}, transposed};
    return {nullptr, rows_->floats, transposed != flipped_};
  }

  const Weight4bit* packed_;
  bool flipped_ = false;
  std::optional<FloatRowsOf> rows_;
};

inline LinearCall product(
    const FloatRows& left, const RightMatrix& right, int64_t rows, int64_t columns, int64_t depth, float* result) {
  return {.left = left, .right = right, .rows = rows, .columns = columns, .depth = depth, .result = result,
          .dtype = DType::f32};
}

inline LinearCall product(
    const FloatRows& left, const RightMatrix& right, int64_t rows, int64_t columns, int64_t depth,
    const Tensor& result) {
  LinearCall call = product(left, right, rows, columns, depth, static_cast<float*>(nullptr));
  call.result = result.data_ptr();
  call.dtype = dtype_of(result, "result");
  return call;
}

inline LinearCall transposed_product(
    const FloatRows& left, const FloatRows& right, int64_t rows, int64_t columns, int64_t depth,
    const Tensor& result) {
  LinearCall call = product(left, {nullptr, right, false}, rows, columns, depth, result);
  call.left_transposed = true;
  return call;
}

inline FloatRows scaled(FloatRows rows, float scale) {
  rows.scale = scale;
  return rows;
}

// x · Wᵀ of a few rows by a 4-bit weight, for which there is a faster product.
inline std::optional<Buffer> few_rows_product(const BaseOf& base, const FloatRows& x, const LinearShape& shape) {
  if (!base.packed() || shape.rows > kFewRows) return {};
  Buffer result(shape.rows, shape.out);
  multiply_few(*base.packed(), x, shape.rows, shape.out, nullptr, DType::f32, result.row(0));
  return result;
}

}  // namespace pykern
