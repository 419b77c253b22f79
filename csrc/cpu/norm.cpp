// LayerNorm and RMSNorm on the CPU: checks, memory and threads. The arithmetic is in simd/norm.cpp.

#include "norm.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "parallel.h"

namespace pykern {
namespace {

using Optional = std::optional<Tensor>;

const NormKernels& kernels() {
  static const NormKernels* const table = &PYKERN_CHOOSE(norm);
  STD_TORCH_CHECK(table, "pykern's CPU kernels were not compiled for this processor");
  return *table;
}

int index(DType dtype) { return static_cast<int>(dtype); }

void check_same(const Tensor& t, const char* name, const Tensor& x, const char* x_name) {
  const Sizes a = t.sizes(), b = x.sizes();
  STD_TORCH_CHECK(
      a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()), name, " must have the shape of ", x_name);
  STD_TORCH_CHECK(dtype_of(t, name) == dtype_of(x, x_name), name, " must have the dtype of ", x_name);
}

struct Shape {
  explicit Shape(const Tensor& x) : sizes(x.sizes()), dtype(dtype_of(x, "x")) {
    STD_TORCH_CHECK(sizes.size() > 0, "x must have at least one dimension");
    n = sizes[sizes.size() - 1];
    for (size_t d = 0; d + 1 < sizes.size(); ++d) rows *= sizes[d];
  }
  Sizes leading() const { return Sizes(sizes.data(), sizes.size() - 1); }

  Sizes sizes;  // borrowed from x
  DType dtype;
  int64_t n;
  int64_t rows = 1;
};

// A weight or bias as the kernels read it: n contiguous floats, the offset added; `missing` where there is none.
class Vector {
 public:
  Vector(const Optional& given, const char* name, int64_t n, float offset, float missing) {
    if (!given) {
      own_.reset(new float[n]);
      std::fill_n(own_.get(), n, missing);
      return;
    }
    STD_TORCH_CHECK(given->dim() == 1 && given->size(0) == n, name, " must have shape (", n, ",)");
    const DType dtype = dtype_of(*given, name);
    kept_ = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
    if (dtype == DType::f32 && offset == 0) return;
    own_.reset(new float[n]);
    kernels().widen[index(dtype)](kept_->data_ptr(), offset, own_.get(), n);
    kept_.reset();
  }
  const float* data() const { return own_ ? own_.get() : static_cast<const float*>(kept_->data_ptr()); }

 private:
  Optional kept_;
  std::unique_ptr<float[]> own_;
};

// A statistic that a forward returned: one float a row. There is none where the op has none.
class Statistic {
 public:
  Statistic(const Tensor* given, const char* name, const Shape& shape) {
    if (!given) return;
    STD_TORCH_CHECK(
        dtype_of(*given, name) == DType::f32 && given->numel() == shape.rows, name, " must be float32, one a row");
    kept_ = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
  }
  const float* data() const { return kept_ ? static_cast<const float*>(kept_->data_ptr()) : nullptr; }

 private:
  Optional kept_;
};

// Whether an output goes past the caches: it saves reading what is to be overwritten. From 12 MB on that made the
// forward 1.5 to 2 times as fast, and a forward and its consumer no slower; below, consumers find outputs in cache.
bool past_caches(const Tensor& out, const Shape& shape) {
  constexpr int64_t kBytes = 8 << 20, kLine = 64;
  const int64_t row_bytes = shape.n * (shape.dtype == DType::f32 ? 4 : 2);
  return row_bytes * shape.rows >= kBytes && row_bytes % kLine == 0 &&
      reinterpret_cast<uintptr_t>(out.data_ptr()) % kLine == 0;
}

struct Forward {
  Tensor y, rstd;
  Optional summed, mean;
};

Forward forward(
    NormKernels::Forward const (&kernel)[kDTypes], bool has_mean, const Tensor& x, const Tensor* residual,
    const Vector& weight, const Vector& bias, double eps, bool round_before_weight) {
  const Shape shape(x);
  const RowsOf x_rows(x);
  std::optional<RowsOf> residual_rows;
  Forward out = {empty(shape.sizes, shape.dtype), empty(shape.leading(), DType::f32), {}, {}};
  if (residual) {
    check_same(*residual, "residual", x, "x");
    residual_rows.emplace(*residual);
    out.summed = empty(shape.sizes, shape.dtype);
  }
  if (has_mean) out.mean = empty(shape.leading(), DType::f32);

  NormForward args = {};
  args.x = x_rows.rows;
  if (residual) args.residual = residual_rows->rows;
  if (residual) args.summed = out.summed->data_ptr();
  args.weight = weight.data();
  args.bias = bias.data();
  args.y = out.y.data_ptr();
  if (has_mean) args.mean = static_cast<float*>(out.mean->data_ptr());
  args.rstd = static_cast<float*>(out.rstd.data_ptr());
  args.n = shape.n;
  args.eps = eps;
  args.round_before_weight = round_before_weight;
  args.stream = past_caches(out.y, shape);
  parallel(shape.rows, shape.n, [&](int64_t begin, int64_t end) { kernel[index(shape.dtype)](args, begin, end); });
  return out;
}

Forward layer_forward(
    const Tensor& x, const Tensor* residual, const Optional& weight, const Optional& bias, double eps) {
  const int64_t n = Shape(x).n;
  return forward(
      kernels().layer_norm, true, x, residual, Vector(weight, "weight", n, 0, 1), Vector(bias, "bias", n, 0, 0), eps,
      false);
}

Forward rms_forward(
    const Tensor& x, const Tensor* residual, const Optional& weight, double eps, double offset, bool round) {
  const Vector scale(weight, "weight", Shape(x).n, static_cast<float>(offset), 1);
  return forward(kernels().rms_norm, false, x, residual, scale, Vector({}, "bias", 0, 0, 0), eps, round);
}

// dx, dweight, dbias; undefined where not wanted.
using Gradients = std::array<Tensor, 3>;

// With no gradient of y there is only that of the sum to hand on.
Gradients pass_on(
    const Tensor& x, const Optional& dsummed, const std::array<const Optional*, 2>& params,
    const std::array<bool, 3>& wanted) {
  Gradients out;
  const Shape shape(x);
  if (wanted[0]) {
    out[0] = empty(shape.sizes, shape.dtype);
    if (dsummed) torch::stable::copy_(out[0], *dsummed);
    else torch::stable::zero_(out[0]);
  }
  for (int i = 0; i < 2; ++i) {
    if (!wanted[i + 1]) continue;
    out[i + 1] = empty((*params[i])->sizes(), dtype_of(**params[i], i ? "bias" : "weight"));
    torch::stable::zero_(out[i + 1]);
  }
  return out;
}

Gradients backward(
    NormKernels::Backward const (&kernel)[kDTypes], const Optional& dy, const Optional& dsummed, const Tensor& x,
    const Optional& weight, const Optional& bias, double weight_offset, const Tensor* mean, const Tensor& rstd,
    std::array<bool, 3> wanted) {
  wanted[1] = wanted[1] && weight;
  wanted[2] = wanted[2] && bias;
  if (!wanted[0] && !wanted[1] && !wanted[2]) return {};
  if (dsummed) check_same(*dsummed, "dsummed", x, "x");
  if (!dy) return pass_on(x, dsummed, {&weight, &bias}, wanted);
  check_same(*dy, "dy", x, "x");
  const Shape shape(x);
  const int64_t n = shape.n;
  const Vector scale(weight, "weight", n, static_cast<float>(weight_offset), 1);
  const Statistic mean_of_row(mean, "mean", shape), rstd_of_row(&rstd, "rstd", shape);
  const RowsOf x_rows(x), dy_rows(*dy);
  std::optional<RowsOf> dsummed_rows;
  if (dsummed) dsummed_rows.emplace(*dsummed);

  Gradients out;
  NormBackward args = {};
  args.x = x_rows.rows;
  args.dy = dy_rows.rows;
  if (dsummed) args.dsummed = dsummed_rows->rows;
  args.weight = scale.data();
  args.mean = mean_of_row.data();
  args.rstd = rstd_of_row.data();
  args.n = n;
  if (wanted[0]) {
    out[0] = empty(shape.sizes, shape.dtype);
    args.dx = out[0].data_ptr();
    args.stream = past_caches(out[0], shape);
  }

  // Rows are summed in chunks that depend on the shape alone, and the chunks in order: the same bits whatever the
  // number of threads. With 32 rows or more the partial sums are at most a sixteenth of x in fp32.
  const int64_t chunk = std::max<int64_t>(32, (shape.rows + 255) / 256);
  const int64_t chunks = (shape.rows + chunk - 1) / chunk;
  const int64_t stride = n * (wanted[1] + wanted[2]);
  const std::unique_ptr<float[]> partial(new float[chunks * stride]);
  parallel(chunks, chunk * n, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      float* const sums = partial.get() + c * stride;
      std::fill_n(sums, stride, 0.f);
      kernel[index(shape.dtype)](
          args, c * chunk, std::min(shape.rows, (c + 1) * chunk), wanted[1] ? sums : nullptr,
          wanted[2] ? sums + stride - n : nullptr);
    }
  });
  for (int i = 0; i < 2; ++i) {
    if (!wanted[i + 1]) continue;
    const DType dtype = dtype_of(i ? *bias : *weight, i ? "bias" : "weight");
    out[i + 1] = empty(Sizes(&n, 1), dtype);
    const float* const sums = partial.get() + (i ? stride - n : 0);
    parallel(n, chunks, [&](int64_t begin, int64_t end) {
      kernels().reduce[index(dtype)](sums, chunks, stride, out[i + 1].data_ptr(), begin, end);
    });
  }
  return out;
}

std::array<bool, 3> mask(const std::vector<bool>& given) { return {given[0], given[1], given.size() > 2 && given[2]}; }

std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x, const Optional& weight, const Optional& bias, double eps) {
  const Forward out = layer_forward(x, nullptr, weight, bias, eps);
  return {out.y, *out.mean, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm(
    const Tensor& x, const Tensor& residual, const Optional& weight, const Optional& bias, double eps) {
  const Forward out = layer_forward(x, &residual, weight, bias, eps);
  return {out.y, *out.summed, *out.mean, out.rstd};
}

std::tuple<Tensor, Tensor> rms_norm(
    const Tensor& x, const Optional& weight, double eps, double weight_offset, bool round_before_weight) {
  const Forward out = rms_forward(x, nullptr, weight, eps, weight_offset, round_before_weight);
  return {out.y, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Optional& weight, double eps, double weight_offset,
    bool round_before_weight) {
  const Forward out = rms_forward(x, &residual, weight, eps, weight_offset, round_before_weight);
  return {out.y, *out.summed, out.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Optional& dy, const Optional& dsummed, const Tensor& summed, const Optional& weight, const Optional& bias,
    double, const Tensor& mean, const Tensor& rstd, const std::vector<bool>& output_mask) {
  const Gradients out = backward(
      kernels().layer_norm_backward, dy, dsummed, summed, weight, bias, 0, &mean, rstd, mask(output_mask));
  return {out[0], out[1], out[2]};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
    const Optional& dy, const Tensor& x, const Optional& weight, const Optional& bias, double eps, const Tensor& mean,
    const Tensor& rstd, const std::vector<bool>& output_mask) {
  return add_layer_norm_backward(dy, {}, x, weight, bias, eps, mean, rstd, output_mask);
}

std::tuple<Tensor, Tensor> add_rms_norm_backward(
    const Optional& dy, const Optional& dsummed, const Tensor& summed, const Optional& weight, double,
    double weight_offset, bool, const Tensor& rstd, const std::vector<bool>& output_mask) {
  const Gradients out = backward(
      kernels().rms_norm_backward, dy, dsummed, summed, weight, {}, weight_offset, nullptr, rstd, mask(output_mask));
  return {out[0], out[1]};
}

std::tuple<Tensor, Tensor> rms_norm_backward(
    const Optional& dy, const Tensor& x, const Optional& weight, double eps, double weight_offset,
    bool round_before_weight, const Tensor& rstd, const std::vector<bool>& output_mask) {
  return add_rms_norm_backward(dy, {}, x, weight, eps, weight_offset, round_before_weight, rstd, output_mask);
}

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&pykern::layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&pykern::layer_norm_backward));
  m.impl("rms_norm", TORCH_BOX(&pykern::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&pykern::rms_norm_backward));
  m.impl("add_layer_norm", TORCH_BOX(&pykern::add_layer_norm));
  m.impl("add_layer_norm_backward", TORCH_BOX(&pykern::add_layer_norm_backward));
  m.impl("add_rms_norm", TORCH_BOX(&pykern::add_rms_norm));
  m.impl("add_rms_norm_backward", TORCH_BOX(&pykern::add_rms_norm_backward));
}
