// A tensor seen as rows of contiguous elements. Plain data: this header is compiled for every instruction set, so it
// must not define a function that the linker could share between them.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define PYKERN_ANYWHERE __host__ __device__
#else
#define PYKERN_ANYWHERE
#endif

namespace pykern {

enum class DType { f32, f16, bf16, count };
constexpr int kDTypes = static_cast<int>(DType::count);

constexpr int kRowDims = 4;

// The rows' indices count through `dims` dimensions, the last one fastest; strides are in elements.
struct Rows {
  void* data;
  int dims;
  int64_t size[kRowDims];
  int64_t stride[kRowDims];
};

// Index: int64_t, or a type whose divisions are cheaper where all rows can be counted in it.
template <class Index>
PYKERN_ANYWHERE static inline __attribute__((always_inline)) int64_t row_offset(const Rows& rows, Index row) {
  int64_t offset = 0;
  for (int d = rows.dims - 1; d > 0; --d) {
    const Index size = static_cast<Index>(rows.size[d]);
    offset += static_cast<int64_t>(row % size) * rows.stride[d];
    row /= size;
  }
  return offset + static_cast<int64_t>(row) * rows.stride[0];
}

}  // namespace pykern
