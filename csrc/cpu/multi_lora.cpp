// Linear layers with an adapter for each row on the CPU. Rows are taken in the order of their adapters, so that each
// adapter has a span of them; what has an adapter's NaN meets no other's rows.

#include "lora_host.h"

namespace pykern {
namespace {

// Rows sorted by the adapters that they name, those that name none last.
class Groups {
 public:
  explicit Groups(const ManyLoras& call) : adapters_(call.adapters), first_(call.adapters + 2), order_(call.shape.rows) {
    const void* const ids = call.ids.data_ptr();
    const auto id_of = [&](int64_t row) {
      const int64_t id = call.wide_ids ? static_cast<const int64_t*>(ids)[row] : static_cast<const int32_t*>(ids)[row];
      return id >= 0 && id < adapters_ ? id : adapters_;
    };
    const int64_t rows = call.shape.rows;
    for (int64_t row = 0; row < rows; ++row) ++first_[id_of(row) + 1];
    for (int64_t i = 0; i <= adapters_; ++i) first_[i + 1] += first_[i];
    std::vector<int64_t> next = first_;
    for (int64_t row = 0; row < rows; ++row) order_[next[id_of(row)]++] = row;
  }

  int64_t adapters() const { return adapters_; }
  Span of(int64_t adapter) const { return {first_[adapter], first_[adapter + 1]}; }
  int64_t count(int64_t adapter) const { return first_[adapter + 1] - first_[adapter]; }
  const int64_t* order(int64_t from = 0) const { return order_.data() + from; }

 private:
  const int64_t adapters_;
  std::vector<int64_t> first_;  // of each adapter's rows in order_
  std::vector<int64_t> order_;
};

// The matrices of each adapter, contiguous.
class Stack {
 public:
  Stack(const Tensor& t, const char* name)
      : tensor_(t.is_contiguous() ? t : torch::stable::contiguous(t)), dtype_(dtype_of(t, name)) {}

  FloatRows of(int64_t adapter) const {
    const int64_t rows = tensor_.size(1), columns = tensor_.size(2), size = tensor_.element_size();
    return rows_in(static_cast<char*>(tensor_.data_ptr()) + adapter * rows * columns * size, columns, dtype_);
  }

 private:
  const Tensor tensor_;
  const DType dtype_;
};

FloatRows ordered(FloatRows rows, const int64_t* order) {
  rows.order = order;
  return rows;
}

class CpuMultiLora {
 public:
  explicit CpuMultiLora(const Tensor&) {}

  Tensor empty(Sizes sizes, DType dtype) const { return pykern::empty(sizes, dtype); }

  void forward(const ManyLoras& call, const Tensor& y) const {
    const LinearShape& shape = call.shape;
    const Groups groups(call);
    const BaseOf base(call.weight);
    const FloatRowsOf x(call.input, "input");
    const Stack a(call.lora_a, "lora_a"), b(call.lora_b, "lora_b");
    const Floats scaling(call.scaling, "scaling");
    const Buffer s(shape.rows, call.rank);
    std::vector<LinearCall> calls;
    std::vector<LowRank> lows;
    for (int64_t i = 0; i < groups.adapters(); ++i) {
      if (groups.count(i) == 0) continue;
      calls.push_back(s_call(call, groups, i, x.floats, a, s));
      lows.push_back({groups.of(i), scaled(s.from(), scaling.get()[i]), {nullptr, b.of(i), true}, call.rank});
    }
    multiply(calls.data(), calls.size());
    std::optional<Floats> bias;
    if (call.bias) bias.emplace(*call.bias, "bias");
    LinearCall whole =
        product(ordered(x.floats, groups.order()), base.transposed(), shape.rows, shape.out, shape.in, y);
    whole.order = groups.order();
    whole.low = lows.data(), whole.lows = lows.size();
    if (bias) whole.bias = bias->get();
    const std::optional<Buffer> other = few_rows_product(base, x.floats, shape);
    if (other) whole.depth = 0, whole.other = other->row(0);
    multiply(whole);
  }

  void backward(const ManyLoras& call, const Tensor& dy, const LoraGradients& out) const {
    const LinearShape& shape = call.shape;
    const FloatRowsOf dy_rows(dy, "dy");
    if (out.dbias.defined()) sum_rows(dy_rows.floats, shape.rows, shape.out, out.dbias);
    const Groups groups(call);
    const BaseOf base(call.weight);
    const FloatRowsOf x(call.input, "input");
    const Stack a(call.lora_a, "lora_a"), b(call.lora_b, "lora_b");
    const Floats scaling(call.scaling, "scaling");

    // S = x · Aᵀ and dS = dy · B, rows in the order of the groups; neither has the scaling in it.
    std::vector<LinearCall> calls;
    std::optional<Buffer> s, ds;
    if (out.dlora_b.defined() || out.dscale.defined()) s.emplace(shape.rows, call.rank);
    if (out.dlora_a.defined() || out.dinput.defined() || out.dscale.defined()) ds.emplace(shape.rows, call.rank);
    for (int64_t i = 0; i < groups.adapters(); ++i) {
      const int64_t first = groups.of(i).first, count = groups.count(i);
      if (s) calls.push_back(s_call(call, groups, i, x.floats, a, *s));
      if (!ds) continue;
      const FloatRows own = ordered(dy_rows.floats, groups.order(first));
      calls.push_back(product(own, {nullptr, b.of(i), false}, count, call.rank, shape.out, ds->row(first)));
    }
    multiply(calls.data(), calls.size());
    calls.clear();

    std::vector<LowRank> lows;
    for (int64_t i = 0; i < groups.adapters(); ++i) {
      const int64_t first = groups.of(i).first, count = groups.count(i);
      const int64_t* const order = groups.order(first);
      if (out.dinput.defined())
        lows.push_back({groups.of(i), scaled(ds->from(), scaling.get()[i]), {nullptr, a.of(i), false}, call.rank});
      if (out.dlora_a.defined()) {
        const FloatRows right = ordered(x.floats, order);
        calls.push_back(transposed_product(ds->from(first), right, call.rank, shape.in, count, out.dlora_a));
        finish(calls.back(), i, scaling.get()[i], out.dlora_a);
      }
      if (out.dlora_b.defined()) {
        const FloatRows left = ordered(dy_rows.floats, order);
        calls.push_back(transposed_product(left, s->from(first), shape.out, call.rank, count, out.dlora_b));
        finish(calls.back(), i, scaling.get()[i], out.dlora_b);
      }
    }
    if (out.dinput.defined()) {
      const FloatRows left = ordered(dy_rows.floats, groups.order());
      calls.push_back(product(left, base.matrix(), shape.rows, shape.in, shape.out, out.dinput));
      calls.back().order = groups.order();
      calls.back().low = lows.data(), calls.back().lows = lows.size();
    }
    if (out.dweight.defined())
      calls.push_back(
          transposed_product(dy_rows.floats, x.floats, shape.out, shape.in, shape.rows, out.dweight));
    multiply(calls.data(), calls.size());
    if (out.dscale.defined()) dscaling(groups, *s, *ds, call.rank, out.dscale);
  }

 private:
  static LinearCall s_call(
      const ManyLoras& call, const Groups& groups, int64_t adapter, const FloatRows& x, const Stack& a,
      const Buffer& s) {
    const int64_t first = groups.of(adapter).first;
    return product(
        ordered(x, groups.order(first)), {nullptr, a.of(adapter), true}, groups.count(adapter), call.rank,
        call.shape.in, s.row(first));
  }

  // Of an adapter's gradient: its place among all, and the scaling.
  static void finish(LinearCall& call, int64_t adapter, float scaling, const Tensor& gradient) {
    const int64_t size = call.rows * call.columns * gradient.element_size();
    call.result = static_cast<char*>(gradient.data_ptr()) + adapter * size;
    call.scale = scaling;
  }

  // The sum of dy · (S · Bᵀ) is that of dS · S.
  static void dscaling(const Groups& groups, const Buffer& s, const Buffer& ds, int64_t rank, const Tensor& to) {
    Tensor sums = pykern::empty(to.sizes(), DType::f32), out = to;
    for (int64_t i = 0; i < groups.adapters(); ++i) {
      const float* const left = s.row(groups.of(i).first);
      const float* const right = ds.row(groups.of(i).first);
      double total = 0;
      for (int64_t at = 0; at < groups.count(i) * rank; ++at) total += static_cast<double>(left[at]) * right[at];
      static_cast<float*>(sums.data_ptr())[i] = static_cast<float>(total);
    }
    torch::stable::copy_(out, sums);
  }
};

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) { pykern::MultiLoraOps<pykern::CpuMultiLora>::register_in(m); }
