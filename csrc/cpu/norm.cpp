// LayerNorm and RMSNorm on the CPU: memory and threads. The arithmetic is in simd/norm.cpp.

#include "norm.h"

#include <algorithm>
#include <memory>

#include "../norm_ops.h"
#include "compiled.h"
#include "parallel.h"

namespace pykern {
namespace {

const NormKernels& kernels() { return compiled(&PYKERN_CHOOSE(norm)); }

int index(DType dtype) { return static_cast<int>(dtype); }

// A weight or bias as the kernels read it: n contiguous floats, the offset added; `missing` where there is none.
class Vector {
 public:
  Vector(const Optional& given, const char* name, int64_t n, float offset, float missing) {
    if (!given) {
      own_.reset(new float[n]);
      std::fill_n(own_.get(), n, missing);
      return;
    }
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

// Whether an output goes past the caches: it saves reading what is to be overwritten. From 12 MB on that made the
// forward 1.5 to 2 times as fast, and a forward and its consumer no slower; below, consumers find outputs in cache.
bool past_caches(const Tensor& out, const NormShape& shape) {
  constexpr int64_t kBytes = 8 << 20, kLine = 64;
  const int64_t row_bytes = shape.n * shape.element_size();
  return row_bytes * shape.rows >= kBytes && row_bytes % kLine == 0 &&
      reinterpret_cast<uintptr_t>(out.data_ptr()) % kLine == 0;
}

struct CpuNorm {
  explicit CpuNorm(const Tensor& x) : shape(x) {}

  Tensor empty(Sizes sizes, DType dtype) const { return pykern::empty(sizes, dtype); }

  void forward(
      const Tensor& x, const Tensor* residual, const Optional& weight, const Optional& bias, double eps,
      double weight_offset, bool round_before_weight, const NormOutputs& out) const {
    const bool centred = out.mean.has_value();
    const Vector scale(weight, "weight", shape.n, static_cast<float>(weight_offset), 1);
    const Vector shift(bias, "bias", centred ? shape.n : 0, 0, 0);
    const RowsOf x_rows(x);
    std::optional<RowsOf> residual_rows;
    if (residual) residual_rows.emplace(*residual);

    NormForward args = {};
    args.x = x_rows.rows;
    if (residual) args.residual = residual_rows->rows;
    if (residual) args.summed = out.summed->data_ptr();
    args.weight = scale.data();
    args.bias = shift.data();
    args.y = out.y.data_ptr();
    if (centred) args.mean = static_cast<float*>(out.mean->data_ptr());
    args.rstd = static_cast<float*>(out.rstd.data_ptr());
    args.n = shape.n;
    args.eps = eps;
    args.round_before_weight = round_before_weight;
    args.stream = past_caches(out.y, shape);
    const auto kernel = (centred ? kernels().layer_norm : kernels().rms_norm)[index(shape.dtype)];
    parallel(shape.rows, shape.n, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  void backward(
      const Tensor& dy, const Optional& dsummed, const Tensor& x, const Optional& weight, double weight_offset,
      const Optional& mean, const Tensor& rstd, const NormGradients& out) const {
    const int64_t n = shape.n;
    const Vector scale(weight, "weight", n, static_cast<float>(weight_offset), 1);
    const RowsOf x_rows(x), dy_rows(dy);
    std::optional<RowsOf> dsummed_rows;
    if (dsummed) dsummed_rows.emplace(*dsummed);

    NormBackward args = {};
    args.x = x_rows.rows;
    args.dy = dy_rows.rows;
    if (dsummed) args.dsummed = dsummed_rows->rows;
    args.weight = scale.data();
    if (mean) args.mean = static_cast<const float*>(mean->data_ptr());
    args.rstd = static_cast<const float*>(rstd.data_ptr());
    args.n = n;
    if (out[0].defined()) {
      args.dx = out[0].data_ptr();
      args.stream = past_caches(out[0], shape);
    }

    // Rows are summed in chunks that depend on the shape alone, and the chunks in order: the same bits whatever the
    // number of threads. With 32 rows or more the partial sums are at most a sixteenth of x in fp32.
    const int64_t chunk = std::max<int64_t>(32, (shape.rows + 255) / 256);
    const int64_t chunks = (shape.rows + chunk - 1) / chunk;
    const bool wants_dweight = out[1].defined(), wants_dbias = out[2].defined();
    const int64_t stride = n * (wants_dweight + wants_dbias);
    const std::unique_ptr<float[]> partial(new float[chunks * stride]);
    const auto kernel = (mean ? kernels().layer_norm_backward : kernels().rms_norm_backward)[index(shape.dtype)];
    parallel(chunks, chunk * n, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        float* const sums = partial.get() + c * stride;
        std::fill_n(sums, stride, 0.f);
        kernel(
            args, c * chunk, std::min(shape.rows, (c + 1) * chunk), wants_dweight ? sums : nullptr,
            wants_dbias ? sums + stride - n : nullptr);
      }
    });
    for (int i = 1; i < 3; ++i) {
      if (!out[i].defined()) continue;
      const auto reduce = kernels().reduce[index(dtype_of(out[i], "gradient"))];
      const float* const sums = partial.get() + (i == 1 ? 0 : stride - n);
      parallel(n, chunks, [&](int64_t begin, int64_t end) {
        reduce(sums, chunks, stride, out[i].data_ptr(), begin, end);
      });
    }
  }

  const NormShape shape;
};

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) { pykern::NormOps<pykern::CpuNorm>::register_in(m); }
