// Linear layers with one low-rank adapter on the CPU, and the norms of DoRA. With D(x) what dropout leaves of x, S is
// D(x) · Aᵀ and dS is dy · B, of which DoRA multiplies dy's columns by dora_scale; neither has `scaling` in it.

#include "lora.h"

#include "lora_host.h"

namespace pykern {
namespace {

// DoRA's factors of outputs: g, and g - 1.
class DoraScale {
 public:
  explicit DoraScale(const Tensor& t) : whole_(t, "dora_scale"), less_(1, t.size(0)) {
    for (int64_t i = 0; i < t.size(0); ++i) less_.row(0)[i] = whole_.get()[i] - 1;
  }
  const float* whole() const { return whole_.get(); }
  const float* less_one() const { return less_.row(0); }

 private:
  const Floats whole_;
  const Buffer less_;
};

// A call's arguments as products take them.
class Arguments {
 public:
  explicit Arguments(const OneLora& call)
      : shape(call.shape), rank(call.rank), scaling(static_cast<float>(call.scaling)), x_(call.input, "input"),
        a_(call.lora_a, "lora_a"), b_(call.lora_b, "lora_b"), base(call.weight), x(x_.floats), dropped(x_.floats),
        a(a_.floats), b(b_.floats) {
    if (call.dora_scale) dora.emplace(*call.dora_scale);
    // What drops nothing multiplies by 1, in fp32.
    if (!call.dropout || call.dropout->threshold == 0) return;
    const auto* const rng = static_cast<const int64_t*>(call.dropout->rng.data_ptr());
    dropout = {
        static_cast<uint64_t>(rng[0]), static_cast<uint64_t>(rng[1]), (shape.in + 3) / 4,
        static_cast<uint32_t>(call.dropout->threshold - 1), call.dropout->kept};
    dropped.dropout = &*dropout;
  }
  Arguments(const Arguments&) = delete;

  const float* dora_whole() const { return dora ? dora->whole() : nullptr; }
  const float* dora_less_one() const { return dora ? dora->less_one() : nullptr; }
  const Dropout* drops() const { return dropout ? &*dropout : nullptr; }

  const LinearShape& shape;
  const int64_t rank;
  const float scaling;

 private:
  const FloatRowsOf x_, a_, b_;

 public:
  const BaseOf base;
  FloatRows x, dropped, a, b;
  std::optional<DoraScale> dora;
  std::optional<Dropout> dropout;
};

FloatRows by_columns(FloatRows rows, const float* factor) {
  rows.factor = factor;
  return rows;
}

LinearCall s_call(const Arguments& args, const Buffer& s) {
  return product(
      args.dropped, {nullptr, args.a, true}, args.shape.rows, args.rank, args.shape.in, s.row(0));
}

struct CpuLora {
  explicit CpuLora(const Tensor&) {}

  Tensor empty(Sizes sizes, DType dtype) const { return pykern::empty(sizes, dtype); }

  void forward(const OneLora& call, const Tensor& y) const {
    const Arguments args(call);
    const LinearShape& shape = call.shape;
    const Buffer s(shape.rows, call.rank);
    multiply(s_call(args, s));
    std::optional<Floats> bias;
    if (call.bias) bias.emplace(*call.bias, "bias");
    const LowRank low = {{0, shape.rows}, scaled(s.from(), args.scaling), {nullptr, args.b, true}, call.rank};
    LinearCall whole = product(args.x, args.base.transposed(), shape.rows, shape.out, shape.in, y);
    whole.low = &low, whole.lows = 1;
    whole.low_factor = args.dora_whole();
    whole.other_factor = args.dora_less_one();
    if (bias) whole.bias = bias->get();
    std::optional<Buffer> other;
    if (args.dora && args.dropout) {
      other.emplace(shape.rows, shape.out);
      multiply(product(args.dropped, whole.right, shape.rows, shape.out, shape.in, other->row(0)));
    } else if ((other = few_rows_product(args.base, args.x, shape))) {
      whole.depth = 0;
      whole.other_factor = args.dora_whole();
    }
    if (other) whole.other = other->row(0);
    multiply(whole);
  }

  void backward(const OneLora& call, const Tensor& dy, const LoraGradients& out) const {
    const Arguments args(call);
    const LinearShape& shape = call.shape;
    const FloatRowsOf dy_rows(dy, "dy");
    const FloatRows& plain = dy_rows.floats;
    const FloatRows scaled_dy = by_columns(plain, args.dora_whole());
    if (out.dbias.defined()) sum_rows(plain, shape.rows, shape.out, out.dbias);

    std::vector<LinearCall> calls;
    std::optional<Buffer> s, ds;
    if (out.dlora_b.defined() || out.dscale.defined()) {
      s.emplace(shape.rows, call.rank);
      calls.push_back(s_call(args, *s));
    }
    if (out.dlora_a.defined() || out.dinput.defined()) {
      ds.emplace(shape.rows, call.rank);
      calls.push_back(product(scaled_dy, {nullptr, args.b, false}, shape.rows, call.rank, shape.out, ds->row(0)));
    }
    multiply(calls.data(), calls.size());
    calls.clear();

    LowRank low;
    if (ds) low = {{0, shape.rows}, scaled(ds->from(), args.scaling), {nullptr, args.a, false}, call.rank};
    std::optional<Buffer> dropped_dinput, dropped_dweight;
    if (out.dinput.defined()) calls.push_back(dinput_call(args, plain, low, out.dinput, dropped_dinput));
    if (out.dweight.defined()) calls.push_back(dweight_call(args, plain, out.dweight, dropped_dweight));
    if (out.dlora_a.defined()) {
      calls.push_back(transposed_product(ds->from(), args.dropped, call.rank, shape.in, shape.rows, out.dlora_a));
      calls.back().scale = args.scaling;
    }
    if (out.dlora_b.defined()) {
      calls.push_back(transposed_product(scaled_dy, s->from(), shape.out, call.rank, shape.rows, out.dlora_b));
      calls.back().scale = args.scaling;
    }
    multiply(calls.data(), calls.size());
    if (out.dscale.defined()) ddora_scale(args, plain, *s, out.dscale);
  }

  void norm(
      const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, double scaling, const Tensor& out) const {
    const FloatRowsOf w(weight, "weight"), a(lora_a, "lora_a"), b(lora_b, "lora_b");
    const int64_t rows = weight.size(0), columns = weight.size(1), rank = lora_a.size(0);
    const LinearCall call = product(
        scaled(b.floats, static_cast<float>(scaling)), {nullptr, a.floats, false}, rows, columns, rank, out);
    constexpr int64_t kTogether = 32;  // enough rows that decoding A for them is of no account
    const LoraKernels& kernels = compiled(&PYKERN_CHOOSE(lora));
    parallel(parts(rows, kTogether), kTogether * columns * rank, [&](int64_t begin, int64_t end) {
      const Scratch scratch(linear_kernels().scratch);
      for (int64_t i = begin; i < end; ++i)
        kernels.norms(call, w.floats, {i * kTogether, std::min(rows, (i + 1) * kTogether)}, scratch.get());
    });
  }

 private:
  // DoRA multiplies what goes through the weight by g as well; with dropout, by g - 1 and only of what is not dropped.
  static LinearCall dinput_call(
      const Arguments& args, const FloatRows& dy, const LowRank& low, const Tensor& result,
      std::optional<Buffer>& dropped) {
    const LinearShape& shape = args.shape;
    const bool apart = args.dora && args.dropout;
    LinearCall call = product(
        apart ? dy : by_columns(dy, args.dora_whole()), args.base.matrix(), shape.rows, shape.in, shape.out, result);
    call.dropout = args.drops();
    call.low = &low, call.lows = 1;
    if (!apart) return call;
    dropped.emplace(shape.rows, shape.in);
    LinearCall other = product(
        by_columns(dy, args.dora_less_one()), call.right, shape.rows, shape.in, shape.out, dropped->row(0));
    std::swap(other.low, call.low);
    std::swap(other.lows, call.lows);
    multiply(other);
    call.other = dropped->row(0);
    return call;
  }

  static LinearCall dweight_call(
      const Arguments& args, const FloatRows& dy, const Tensor& result, std::optional<Buffer>& dropped) {
    const LinearShape& shape = args.shape;
    const bool apart = args.dora && args.dropout;
    LinearCall call = transposed_product(
        apart ? dy : by_columns(dy, args.dora_whole()), args.x, shape.out, shape.in, shape.rows, result);
    if (!apart) return call;
    dropped.emplace(shape.out, shape.in);
    LinearCall other = call;
    other.left.factor = args.dora_less_one();
    other.right.floats = args.dropped;
    other.result = dropped->row(0);
    other.dtype = DType::f32;
    multiply(other);
    call.other = dropped->row(0);
    return call;
  }

  // That of g: the sum over rows of dy · (scaling · S · Bᵀ + D(x) · Wᵀ).
  static void ddora_scale(const Arguments& args, const FloatRows& dy, const Buffer& s, const Tensor& to) {
    const LinearShape& shape = args.shape;
    const bool direct = dtype_of(to, "ddora_scale") == DType::f32;
    const Tensor sums = direct ? to : pykern::empty(to.sizes(), DType::f32);
    const LowRank low = {{0, shape.rows}, scaled(s.from(), args.scaling), {nullptr, args.b, true}, args.rank};
    LinearCall call = product(args.dropped, args.base.transposed(), shape.rows, shape.out, shape.in, sums);
    call.low = &low, call.lows = 1;
    const LinearKernels& products = linear_kernels();
    const LoraKernels& kernels = compiled(&PYKERN_CHOOSE(lora));
    const int64_t threads = torch::stable::get_num_threads(), units = parts(shape.out, products.column_unit);
    const int64_t spans = parts(parts(shape.out, products.most_columns), threads) * threads;
    const int64_t columns = parts(units, std::min(units, spans)) * products.column_unit;
    parallel(parts(shape.out, columns), shape.rows * columns * shape.in, [&](int64_t begin, int64_t end) {
      const Scratch scratch(products.scratch);
      for (int64_t i = begin; i < end; ++i)
        kernels.column_dots(call, dy, {i * columns, std::min(shape.out, (i + 1) * columns)}, scratch.get());
    });
    Tensor out = to;
    if (!direct) torch::stable::copy_(out, sums);
  }
};

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) {
  pykern::LoraOps<pykern::CpuLora>::register_in(m);
  pykern::DoraNormOps<pykern::CpuLora>::register_in(m);
}
