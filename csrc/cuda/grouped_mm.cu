// Products per group of rows and their gradients on NVIDIA GPUs: memory, and the choice of tiles. The arithmetic is in
// grouped_mm.cuh and grouped_mm_sums.cuh.

#include <pykern/grouped_mm.cuh>
#include <pykern/grouped_mm_sums.cuh>

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <optional>
#include <tuple>

#include "../grouped_mm_ops.h"
#include "launch.h"
#include "linear.h"

namespace pykern {
namespace {

int64_t panels_of(int64_t size, int panel) { return (size + panel - 1) / panel; }

dim3 checked_grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks < int64_t{1} << 31, "the product has too many tiles for one launch: ", blocks);
  return dim3(static_cast<unsigned>(blocks));
}

// As many tiles as groups can have whatever their rows are, those behind the last offset being one more: every one may
// have a tile that is not full, and none is without a row.
int64_t most_tiles(int64_t rows, int64_t groups, int tile_rows) {
  return std::min(rows, (rows + (groups + 1) * (tile_rows - 1)) / tile_rows);
}

// The tile that holds a group of the mean size, for all that is known of groups here. A group of more rows has several,
// which read its matrix from the second-level cache. There shall be enough of 128 rows, which make the best use of
// tensor cores, to give each multiprocessor one.
int tile_rows(int64_t rows, int64_t groups, int64_t panels, int multiprocessors) {
  const int64_t mean = rows / groups;
  if (mean <= 16) return 16;
  return mean <= 64 || rows / 128 * panels < multiprocessors ? 64 : 128;
}

struct ProductChoice {
  void (*kernel)(const GroupedArgs);
  int shared_bytes;
};

template <class T, int kRows>
ProductChoice product_of(bool along) {
  if (along) return {&grouped_product<T, kRows, true>, ProductPlan<T, kRows, true>::kSharedBytes};
  return {&grouped_product<T, kRows, false>, ProductPlan<T, kRows, false>::kSharedBytes};
}

template <class T>
ProductChoice product_of(int rows, bool along) {
  return rows == 16 ? product_of<T, 16>(along) : rows == 64 ? product_of<T, 64>(along) : product_of<T, 128>(along);
}

template <class Choose>
auto by_half(DType dtype, const Choose& choose) {
  return dtype == DType::f16 ? choose(__half()) : choose(__nv_bfloat16());
}

// Matrices (groups, rows, columns) whose rows or whose columns have adjacent elements and are 16-byte aligned; else the
// rows of a copy.
class GroupMatrices {
 public:
  GroupMatrices(const Device& device, const Tensor& given, const char* name) {
    const int64_t elements = 16 / given.element_size();
    const Sizes sizes = given.sizes(), strides = given.strides();
    const auto aligned = [&](int d) { return sizes[d] <= 1 || strides[d] % elements == 0; };
    const bool in_place = reinterpret_cast<uintptr_t>(given.data_ptr()) % 16 == 0 && aligned(0);
    group_stride = strides[0];
    for (int adjacent : {2, 1}) {
      const int other = 3 - adjacent;
      if (!in_place || !aligned(other) || (sizes[adjacent] > 1 && strides[adjacent] != 1)) continue;
      by_columns = adjacent == 1;
      stride = sizes[other] > 1 ? strides[other] : 0;  // else it is anything, and not aligned
      data = device.in(given, name);
      return;
    }
    stride = panels_of(sizes[2], static_cast<int>(elements)) * elements;
    group_stride = sizes[1] * stride;
    const std::array<int64_t, 3> padded = {sizes[0], sizes[1], stride};
    copy_ = device.empty(Sizes(padded.data(), padded.size()), dtype_of(given, name));
    Tensor filled = torch::stable::narrow(*copy_, 2, 0, sizes[2]);
    torch::stable::copy_(filled, given);
    data = device.in(*copy_, name);
  }

  const void* data;
  int64_t group_stride, stride;  // and of rows, or by columns of these
  bool by_columns = false;       // elements of a column are adjacent

 private:
  std::optional<Tensor> copy_;
};

// keys sorted, and where they were: the earlier first of equal ones.
std::tuple<Tensor, Tensor> sorted(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack = {from(keys), from(std::optional<bool>(true)), from(int64_t{0}), from(false)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

class CudaGrouped {
 public:
  static constexpr bool kMixesDtypes = false;

  explicit CudaGrouped(const Tensor& mat_a) : device_(mat_a) {}

  Tensor empty(Sizes sizes, DType dtype) const { return device_.empty(sizes, dtype); }

  void forward(const GroupedCall& call, const Tensor& output) const {
    check(call);
    if (call.scatter) {
      Tensor cleared = output;
      torch::stable::zero_(cleared);
    }
    const StridedRows mat_a(device_, call.mat_a, "mat_a", true);
    const GroupMatrices mat_b(device_, call.mat_b, "mat_b");
    Tensors kept;
    GroupedArgs args = {};
    args.a = mat_a.data;
    args.a_stride = mat_a.stride;
    args.source = gathered(call);
    args.columns = static_cast<int>(call.columns);
    args.depth = static_cast<int>(call.inner);
    if (call.bias) {
      const DType dtype = dtype_of(*call.bias, "bias");
      args.wide_bias = dtype != call.dtype;
      const Tensor& bias = kept.emplace_back(converted(*call.bias, args.wide_bias ? DType::f32 : dtype));
      args.bias = device_.in(bias, "bias");
      args.bias_group = bias.dim() == 2 ? call.columns : 0;
    }
    args.out = device_.out(output, "output");
    args.out_type = call.out_dtype;
    args.target = scattered(call);
    launch_product(call, mat_b, mat_b.by_columns, args);
  }

  void backward(
      const GroupedCall& call, const Tensor& doutput, const Tensor& dmat_a, const Tensor& dmat_b,
      const Tensor& dbias) const {
    check(call);
    const Tensor of_dtype = dtype_of(doutput, "doutput") == call.dtype ? doutput : converted(doutput, call.dtype);
    const StridedRows grad(device_, of_dtype, "doutput", true);
    if (dmat_a.defined()) input_gradient(call, grad, dmat_a);
    if (dmat_b.defined()) matrix_gradient(call, grad, dmat_b);
    if (dbias.defined()) bias_gradient(call, grad, dbias);
  }

 private:
  using Tensors = std::deque<Tensor>;

  static void check(const GroupedCall& call) {
    STD_TORCH_CHECK(call.dtype != DType::f32, "mat_a must be float16 or bfloat16");
    // The bytes of a row and of a tile behind it stay within int.
    constexpr int64_t kMost = (1 << 30) - 1024;
    STD_TORCH_CHECK(
        std::max({call.rows, call.a_rows, call.inner, call.columns}) <= kMost,
        "mat_a and mat_b must have at most ", kMost, " rows and columns");
  }

  Tensor converted(const Tensor& given, DType dtype) const {
    if (dtype_of(given, "argument") == dtype) return torch::stable::contiguous(given);
    Tensor copy = device_.empty(given.sizes(), dtype);
    torch::stable::copy_(copy, given);
    return copy;
  }

  // As factors that are multiplied to 64 bits at once.
  static int row_bytes(const StridedRows& rows) {
    constexpr int64_t kElementBytes = 2;
    STD_TORCH_CHECK(rows.stride <= INT32_MAX / kElementBytes, "rows are too far apart: ", rows.stride, " elements");
    return static_cast<int>(rows.stride * kElementBytes);
  }

  RowIndex index(const std::optional<Tensor>& given, int64_t rows, bool clamped, const char* name) const {
    return {
        given ? static_cast<const int64_t*>(device_.in(*given, name)) : nullptr, static_cast<int>(rows), clamped};
  }
  RowIndex gathered(const GroupedCall& call) const { return index(call.gather, call.a_rows, true, "gather"); }
  RowIndex scattered(const GroupedCall& call) const { return index(call.scatter, call.rows, false, "scatter"); }

  GroupOffsets offsets(const GroupedCall& call) const {
    return {
        static_cast<const int*>(device_.in(call.offs, "offs")), call.groups, static_cast<int>(call.rows)};
  }

  // `along`: elements of mat_b that are summed along are adjacent.
  void launch_product(const GroupedCall& call, const GroupMatrices& mat_b, bool along, GroupedArgs& args) const {
    args.b = mat_b.data;
    args.b_group = mat_b.group_stride;
    args.b_stride = mat_b.stride;
    args.offsets = offsets(call);
    const int64_t panels = panels_of(args.columns, kGroupedColumns);
    const int rows = tile_rows(call.rows, call.groups, panels, device_.multiprocessors());
    const int64_t tiles = most_tiles(call.rows, call.groups, rows);
    args.tiles = static_cast<int>(tiles);
    const ProductChoice chosen =
        by_half(call.dtype, [&](auto type) { return product_of<decltype(type)>(rows, along); });
    device_.launch(
        chosen.kernel, checked_grid(tiles * panels), dim3(kGroupedThreads), chosen.shared_bytes, args);
  }

  void input_gradient(const GroupedCall& call, const StridedRows& grad, const Tensor& dmat_a) const {
    if (call.rows == 0) {  // though there may be some for gather to read
      Tensor cleared = dmat_a;
      torch::stable::zero_(cleared);
      return;
    }
    const GroupMatrices mat_b(device_, call.mat_b, "mat_b");
    GroupedArgs args = {};
    args.a = grad.data;
    args.a_stride = grad.stride;
    args.source = scattered(call);
    args.columns = static_cast<int>(call.inner);
    args.depth = static_cast<int>(call.columns);
    args.target = index({}, call.rows, false, "");
    std::optional<Tensor> of_rows;
    if (call.gather) {
      const std::array<int64_t, 2> sizes = {call.rows, call.inner};
      of_rows = device_.empty(Sizes(sizes.data(), sizes.size()), DType::f32);
    }
    args.out = of_rows ? device_.out(*of_rows, "gradients of rows") : device_.out(dmat_a, "dmat_a");
    args.out_type = of_rows ? DType::f32 : call.dtype;
    launch_product(call, mat_b, !mat_b.by_columns, args);
    if (of_rows) sum_gathered(call, *of_rows, dmat_a);
  }

  // Adds up the gradients of rows that were gathered from the same one.
  void sum_gathered(const GroupedCall& call, const Tensor& of_rows, const Tensor& dmat_a) const {
    const auto [gathered, order] = sorted(*call.gather);
    GatheredSumArgs args = {};
    args.values = static_cast<const float*>(device_.in(of_rows, "gradients of rows"));
    args.gathered = static_cast<const int64_t*>(device_.in(gathered, "sorted gather"));
    args.order = static_cast<const int64_t*>(device_.in(order, "order"));
    args.count = static_cast<int>(call.rows);
    args.rows = static_cast<int>(call.a_rows);
    args.columns = static_cast<int>(call.inner);
    args.sums = device_.out(dmat_a, "dmat_a");
    dim3 grid = checked_grid(call.a_rows);
    const int64_t panels = panels_of(call.inner, kGatheredThreads * kGatheredColumns);
    STD_TORCH_CHECK(panels < 65536, "rows of mat_a may not have ", call.inner, " elements where gather reads them");
    grid.y = static_cast<unsigned>(panels);
    const auto kernel = by_half(call.dtype, [](auto type) { return &grouped_gathered_sums<decltype(type)>; });
    device_.launch(kernel, grid, dim3(kGatheredThreads), 0, args);
  }

  void matrix_gradient(const GroupedCall& call, const StridedRows& grad, const Tensor& dmat_b) const {
    const StridedRows mat_a(device_, call.mat_a, "mat_a", true);
    GroupedGradientArgs args = {};
    args.a = mat_a.data;
    args.a_row_bytes = row_bytes(mat_a);
    args.a_rows = gathered(call);
    args.grad = grad.data;
    args.grad_row_bytes = row_bytes(grad);
    args.grad_rows = scattered(call);
    args.offsets = offsets(call);
    args.inner = static_cast<int>(call.inner);
    args.columns = static_cast<int>(call.columns);
    args.out = device_.out(dmat_b, "dmat_b");
    by_half(call.dtype, [&](auto type) {
      using Plan = MatrixGradientPlan<decltype(type)>;
      const int64_t blocks =
          call.groups * panels_of(call.inner, Plan::kRows) * panels_of(call.columns, kGroupedColumns);
      device_.launch(
          &grouped_matrix_gradient<decltype(type)>, checked_grid(blocks), dim3(kGroupedThreads), Plan::kSharedBytes,
          args);
      return 0;
    });
  }

  void bias_gradient(const GroupedCall& call, const StridedRows& grad, const Tensor& dbias) const {
    GroupSumArgs args = {};
    args.values = grad.data;
    args.stride = grad.stride;
    args.aligned = true;
    args.index = scattered(call);
    args.offsets = offsets(call);
    args.columns = static_cast<int>(call.columns);
    const auto launch = [&](void (*kernel)(const GroupSumArgs)) {
      device_.launch(
          kernel, checked_grid(args.offsets.groups * panels_of(call.columns, kGroupSumColumns)),
          dim3(kGroupSumThreads), 0, args);
    };
    const auto of_groups = by_half(call.dtype, [](auto type) { return &grouped_sums<decltype(type)>; });
    if (dbias.dim() == 2) {
      args.sums = device_.out(dbias, "dbias");
      args.type = dtype_of(dbias, "dbias");
      launch(of_groups);
      return;
    }
    const std::array<int64_t, 2> sizes = {call.groups, call.columns};
    const Tensor sums = device_.empty(Sizes(sizes.data(), sizes.size()), DType::f32);
    args.sums = device_.out(sums, "sums of groups");
    args.type = DType::f32;
    launch(of_groups);
    args.values = args.sums;
    args.stride = call.columns;
    args.aligned = call.columns % kFullWidth<float> == 0;
    args.index = index({}, call.groups, false, "");
    args.offsets = {nullptr, 1, call.groups};
    args.sums = device_.out(dbias, "dbias");
    args.type = dtype_of(dbias, "dbias");
    launch(&grouped_sums<float>);
  }

  const Device device_;
};

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { pykern::GroupedMmOps<pykern::CudaGrouped>::register_in(m); }
