// LayerNorm and RMSNorm on NVIDIA GPUs: memory, the choice of kernels. The arithmetic is in norm.cuh.

#include <pykern/norm.cuh>
#include <pykern/norm_backward.cuh>

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "../norm_ops.h"
#include "launch.h"

namespace pykern {
namespace {

// How kernels are cut. Plans depend on shapes and the device alone, so that sums are always added in the same order.

int round_up(int value, int step) { return (value + step - 1) / step * step; }

// The threads of a team in which each has `packs` of the row's: a power of two up to a warp, or whole warps.
int team_size(int row_packs, int packs) {
  const int threads = std::max((row_packs + packs - 1) / packs, 1);
  return threads <= kWarp ? static_cast<int>(std::bit_ceil(static_cast<unsigned>(threads))) : round_up(threads, kWarp);
}

struct ForwardPlan {
  bool fits = true;  // into registers: norm_forward; else norm_forward_long
  int team = 0;      // threads that share a row
  int threads = 0;   // of a block
  int cached = 0;    // packs of a row in shared memory
};

constexpr size_t kReservedShared = 1024;  // for the sums of reduce.cuh

ForwardPlan forward_plan(int n, int width, int element_size, size_t shared_bytes) {
  const int row_packs = n / width;
  const int team = team_size(row_packs, forward_packs(width));
  if (team <= kWarp) return {true, team, 128, 0};
  if (team <= kForwardThreads) return {true, team, team, 0};
  const size_t room = (shared_bytes - kReservedShared) / (width * element_size);
  return {false, kForwardThreads, kForwardThreads, static_cast<int>(std::min<size_t>(row_packs, room))};
}

struct BackwardPlan {
  SumsIn sums_in = SumsIn::registers;
  int team = 0;     // threads that share a row
  int threads = 0;  // of a block
  int tiles = 1;    // in which the columns are cut
  size_t shared = 0;
};

// A block fills half a multiprocessor's threads: sums leave no room for more, and every block more costs a row of
// partial sums. Rows of which one block can hold neither kind of sums are cut into columns, and read twice where dx is
// wanted.
BackwardPlan backward_plan(
    int64_t rows, int n, int width, bool wants_dx, int gradients, int multiprocessors, size_t shared_bytes) {
  const int row_packs = n / width;
  BackwardPlan plan;
  int packs = backward_packs(SumsIn::registers, width);
  const auto slots = [&] { return sizeof(float) * plan.threads * packs * width; };  // a number for each held element
  plan.team = team_size(row_packs, packs);
  if (plan.team <= kBackwardThreads) {
    // Fewer rows a block where that would leave multiprocessors without one; but whole warps.
    const int64_t wanted = std::clamp<int64_t>(rows / multiprocessors, 1, kBackwardThreads / plan.team);
    plan.threads = round_up(static_cast<int>(wanted) * plan.team, kWarp);
    plan.shared = slots();
    return plan;
  }
  if (wants_dx && width > 1) {
    packs = backward_packs(SumsIn::shared, width);
    plan.sums_in = SumsIn::shared;
    plan.team = plan.threads = team_size(row_packs, packs);
    plan.shared = slots() * gradients;
    if (plan.team <= kBackwardThreads && plan.shared + kReservedShared <= shared_bytes) return plan;
    packs = backward_packs(SumsIn::registers, width);
  }
  plan.sums_in = SumsIn::registers;
  plan.team = plan.threads = kBackwardThreads / 2;  // narrow tiles: such rows are few, and blocks should be many
  plan.tiles = (row_packs + plan.team * packs - 1) / (plan.team * packs);
  plan.shared = slots();
  return plan;
}

// How many blocks walk over the rows: as many as are resident, but a multiple of the multiprocessors, and no more than
// keep writing and reading partial sums at a sixteenth of the other traffic where that leaves each multiprocessor one.
int backward_programs(
    const BackwardPlan& plan, int64_t rows, int element_bytes_moved, int gradients, int resident, int multiprocessors) {
  int64_t each = resident;
  const int64_t partial_bytes = 8 * gradients;  // written and read, an element
  if (gradients > 0) each = std::min(each, rows * element_bytes_moved / (16 * partial_bytes) / multiprocessors);
  const int64_t row_tiles = (rows + plan.threads / plan.team - 1) / (plan.threads / plan.team);
  return static_cast<int>(
      std::clamp<int64_t>(std::max<int64_t>(each, 1) * multiprocessors / plan.tiles, 1, row_tiles));
}

// The kernels.

template <class T, bool kCentred, bool kAdds>
auto forward_kernel(int width, bool fits) {
  constexpr int kFull = kFullWidth<T>;
  if (width == 1) return fits ? &norm_forward<T, kCentred, kAdds, 1> : &norm_forward_long<T, kCentred, kAdds, 1>;
  return fits ? &norm_forward<T, kCentred, kAdds, kFull> : &norm_forward_long<T, kCentred, kAdds, kFull>;
}

template <class T, bool kCentred>
auto backward_kernel(int width, SumsIn sums_in) {
  constexpr int kFull = kFullWidth<T>;
  if (width == 1) return &norm_backward<T, kCentred, 1, SumsIn::registers>;
  return sums_in == SumsIn::registers ? &norm_backward<T, kCentred, kFull, SumsIn::registers>
                                      : &norm_backward<T, kCentred, kFull, SumsIn::shared>;
}

template <class T, bool kCentred>
auto projections_kernel(int width) {
  return width > 1 ? &norm_projections<T, kCentred, kFullWidth<T>> : &norm_projections<T, kCentred, 1>;
}

// choose(T()) for the C++ type of dtype.
template <class Choose>
auto by_type(DType dtype, const Choose& choose) {
  if (dtype == DType::f32) return choose(float());
  if (dtype == DType::f16) return choose(__half());
  return choose(__nv_bfloat16());
}

// choose(T(), kCentred) likewise.
template <class Choose>
auto by_kind(DType dtype, bool centred, const Choose& choose) {
  return by_type(dtype, [&](auto type) {
    return centred ? choose(type, std::true_type()) : choose(type, std::false_type());
  });
}

// What kernels read, as they read it.

// Weight and bias, contiguous and of one type: where they differ, the narrower one is made fp32.
class Parameters {
 public:
  Parameters(
      const Device& device, const NormShape& shape, const Optional& weight, const Optional& bias, double offset) {
    for (const Optional* given : {&weight, &bias})
      wide_ |= *given && dtype_of(**given, given == &weight ? "weight" : "bias") == DType::f32;
    args = {take(device, shape, weight, "weight"), take(device, shape, bias, "bias"), wide_,
            weight ? static_cast<float>(offset) : 0.f};
    wide_accesses = aligned(args.weight) && aligned(args.bias);
  }

  NormParameters args;
  bool wide_accesses;

 private:
  static bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

  const void* take(const Device& device, const NormShape& shape, const Optional& given, const char* name) {
    if (!given) return nullptr;
    const DType dtype = dtype_of(*given, name);
    STD_TORCH_CHECK(dtype == DType::f32 || dtype == shape.dtype, name, " must be float32 or of x's dtype");
    if (wide_ && dtype != DType::f32) {
      Tensor& copy = kept_.emplace_back(device.empty(given->sizes(), DType::f32));
      torch::stable::copy_(copy, *given);
    } else {
      kept_.push_back(given->is_contiguous() ? *given : torch::stable::contiguous(*given));
    }
    return device.in(kept_.back(), name);
  }

  bool wide_ = false;
  std::vector<Tensor> kept_;
};

// The rows of the activations of one call, and whether all of them can be moved 16 bytes at a time.
class Activations {
 public:
  Activations(const Device& device, const NormShape& shape)
      : device_(device), shape_(shape), wide_(shape.n > 0 && shape.n % (16 / shape.element_size()) == 0) {}

  Rows in(const Tensor& t, const char* name) {
    const bool countable = shape_.rows < int64_t{1} << 32;  // in what row_of divides
    const RowsOf* given = &kept_.emplace_back(t);
    if (given->rows.dims > 1 && !countable) given = &kept_.emplace_back(torch::stable::contiguous(t));
    Rows rows = given->rows;
    rows.data = const_cast<void*>(device_.in(given->tensor, name));
    wide_ &= reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
    for (int d = 0; d < rows.dims; ++d) wide_ &= rows.stride[d] * shape_.element_size() % 16 == 0;
    return rows;
  }

  // The elements of an access, given what else takes part in it.
  int width(bool wide) const { return wide_ && wide ? 16 / shape_.element_size() : 1; }

 private:
  const Device& device_;
  const NormShape& shape_;
  bool wide_;
  std::vector<RowsOf> kept_;
};

float* statistic(const Device& device, const Tensor& t, const char* name) {
  return static_cast<float*>(device.out(t, name));
}

// Adds up the rows of partial sums, (2, programs, n), into the gradients that are wanted.
void reduce(const Device& device, const Tensor& partials, int programs, int n, const NormGradients& out) {
  const float* const sums = static_cast<const float*>(device.in(partials, "partial sums"));
  std::vector<PartialSums> gradients;
  std::vector<DType> dtypes;
  for (int i = 1; i < 3; ++i) {
    if (!out[i].defined()) continue;
    const int64_t before = static_cast<int64_t>(gradients.size()) * programs * n;
    gradients.push_back({sums + before, device.out(out[i], i == 1 ? "dweight" : "dbias")});
    dtypes.push_back(dtype_of(out[i], "gradient"));
  }
  const unsigned blocks = (static_cast<unsigned>(n) + kReduceColumns - 1) / kReduceColumns;
  const bool together = gradients.size() == 2 && dtypes[0] == dtypes[1];
  for (size_t i = 0; i < (together ? 1 : gradients.size()); ++i) {
    const auto kernel = by_type(dtypes[i], [](auto type) { return &norm_reduce<decltype(type)>; });
    device.launch(
        kernel, dim3(blocks, together ? 2 : 1), dim3(kReduceColumns * kReduceGroups), 0, gradients[i],
        gradients[together ? 1 : i], programs, n);
  }
}

struct CudaNorm {
  explicit CudaNorm(const Tensor& x) : shape(x), device(x) {
    STD_TORCH_CHECK(shape.n <= 1 << 30, "rows of x may have up to 2^30 elements, not ", shape.n);
  }

  Tensor empty(Sizes sizes, DType dtype) const { return device.empty(sizes, dtype); }

  void forward(
      const Tensor& x, const Tensor* residual, const Optional& weight, const Optional& bias, double eps,
      double weight_offset, bool round_before_weight, const NormOutputs& out) const {
    const bool centred = out.mean.has_value();
    const int n = static_cast<int>(shape.n);
    const Parameters parameters(device, shape, weight, bias, weight_offset);
    Activations activations(device, shape);
    NormForwardArgs args = {};
    args.x = activations.in(x, "x");
    if (residual) args.residual = activations.in(*residual, "residual");
    if (residual) args.summed = device.out(*out.summed, "summed");
    args.parameters = parameters.args;
    args.y = device.out(out.y, "y");
    if (centred) args.mean = statistic(device, *out.mean, "mean");
    args.rstd = statistic(device, out.rstd, "rstd");
    args.rows = shape.rows;
    args.n = n;
    args.eps = static_cast<float>(eps);
    args.round_before_weight = round_before_weight;

    const int width = activations.width(parameters.wide_accesses);
    const ForwardPlan plan = forward_plan(n, width, shape.element_size(), device.shared_bytes());
    args.team = plan.team;
    args.cached = plan.cached;
    const auto kernel = by_kind(shape.dtype, centred, [&](auto type, auto kind) {
      using T = decltype(type);
      return residual ? forward_kernel<T, kind.value, true>(width, plan.fits)
                      : forward_kernel<T, kind.value, false>(width, plan.fits);
    });
    const int64_t teams = plan.threads / plan.team;
    const int64_t blocks = (shape.rows + teams - 1) / teams;
    STD_TORCH_CHECK(blocks < int64_t{1} << 31, "x has too many rows for one launch: ", shape.rows);
    device.launch(
        kernel, dim3(static_cast<unsigned>(blocks)), dim3(plan.threads),
        static_cast<size_t>(plan.cached) * width * shape.element_size(), args);
  }

  void backward(
      const Tensor& dy, const Optional& dsummed, const Tensor& x, const Optional& weight, double weight_offset,
      const Optional& mean, const Tensor& rstd, const NormGradients& out) const {
    const bool centred = mean.has_value(), wants_dx = out[0].defined();
    const int n = static_cast<int>(shape.n);
    const Parameters parameters(device, shape, weight, {}, weight_offset);
    Activations activations(device, shape);
    NormBackwardArgs args = {};
    args.dy = activations.in(dy, "dy");
    args.x = activations.in(x, "x");
    if (dsummed && wants_dx) args.dsummed = activations.in(*dsummed, "dsummed");
    args.parameters = parameters.args;
    if (centred) args.mean = static_cast<const float*>(device.in(*mean, "mean"));
    args.rstd = static_cast<const float*>(device.in(rstd, "rstd"));
    args.rows = shape.rows;
    args.n = n;
    if (wants_dx) args.dx = device.out(out[0], "dx");

    const int width = activations.width(parameters.wide_accesses);
    const int gradients = out[1].defined() + out[2].defined(), multiprocessors = device.multiprocessors();
    const BackwardPlan plan =
        backward_plan(shape.rows, n, width, wants_dx, gradients, multiprocessors, device.shared_bytes());
    args.team = plan.team;
    const auto kernel = by_kind(shape.dtype, centred, [&](auto type, auto kind) {
      return backward_kernel<decltype(type), kind.value>(width, plan.sums_in);
    });
    const int programs = backward_programs(
        plan, shape.rows, (2 + wants_dx) * shape.element_size(), gradients,
        device.blocks_per_multiprocessor(kernel, plan.threads, plan.shared), multiprocessors);

    Optional partials, projections;
    if (gradients > 0) {
      const std::array<int64_t, 3> sizes = {gradients, programs, n};
      partials = device.empty(Sizes(sizes.data(), sizes.size()), DType::f32);
      float* sums = static_cast<float*>(device.out(*partials, "partial sums"));
      for (int i = 1; i < 3; ++i) {
        if (!out[i].defined()) continue;
        (i == 1 ? args.dweight : args.dbias) = sums;
        sums += static_cast<int64_t>(programs) * n;
      }
    }
    if (plan.tiles > 1 && wants_dx) {
      const std::array<int64_t, 2> sizes = {shape.rows, 2};
      projections = device.empty(Sizes(sizes.data(), sizes.size()), DType::f32);
      args.projections = static_cast<float*>(device.out(*projections, "projections"));
      const auto first = by_kind(shape.dtype, centred, [&](auto type, auto kind) {
        return projections_kernel<decltype(type), kind.value>(width);
      });
      device.launch(first, dim3(static_cast<unsigned>(shape.rows)), dim3(kBackwardThreads), 0, args);
    }
    device.launch(kernel, dim3(programs, plan.tiles), dim3(plan.threads), plan.shared, args);
    if (gradients > 0) reduce(device, *partials, programs, n, out);
  }

  const NormShape shape;
  const Device device;
};

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { pykern::NormOps<pykern::CudaNorm>::register_in(m); }
