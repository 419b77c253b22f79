// Attention on the CPU: tensors, memory and tasks. The arithmetic is in simd/attention_forward.cpp and
// simd/attention_backward.cpp.

#include <torch/csrc/stable/library.h>

#include <array>
#include <tuple>

#include "../attention_ops.h"
#include "attention_host.h"

namespace pykern {
namespace {

using Gradients = std::array<Tensor, 6>;  // of query, key, value, mask, slopes, sinks; undefined where not wanted

// The forward's tensors and numbers, in the op's order.
struct Given {
  const Tensor &query, &key, &value;
  const Optional &mask, &slopes, &sinks, &rng;
  double dropout_p, scale;
  std::optional<int64_t> window_left, window_right;
  std::optional<double> softcap;
  const std::string& align;
};

class CpuAttention {
 public:
  explicit CpuAttention(const Given& given)
      : given_(given),
        shape_(given.query, given.key, given.value, given.window_left, given.window_right, given.align) {
    call_.lead_dims = static_cast<int>(shape_.leading.size());
    STD_TORCH_CHECK(call_.lead_dims <= kMaxLead, "at most ", kMaxLead, " leading dimensions are supported");
    std::copy(shape_.leading.begin(), shape_.leading.end(), call_.lead);
    call_.query = heads_of(given.query, "query");
    call_.key = heads_of(given.key, "key");
    call_.value = heads_of(given.value, "value");
    if (given.mask) call_.mask = view_of(*given.mask, "attn_mask", kScores, call_.lead_dims);
    if (given.slopes) call_.slopes = view_of(*given.slopes, "alibi_slopes", kPerHead, call_.lead_dims);
    if (given.sinks) call_.sinks = view_of(*given.sinks, "sinks", kPerHead, 0);
    call_.batches = shape_.batch;
    call_.length = shape_.band.queries;
    call_.keys = shape_.band.keys;
    call_.heads = shape_.heads;
    call_.group = shape_.group();
    call_.size = shape_.size;
    call_.value_size = shape_.value_size;
    call_.left = shape_.band.left;
    call_.right = shape_.band.right;
    call_.offset = shape_.band.offset;
    call_.numbers = call_.random_rows = {0, call_.heads * call_.length, call_.length, 1};
    rng_ = set_scoring(call_, given.scale, given.softcap, given.rng, given.dropout_p, call_.keys);
    cut_into_panels(call_);
  }

  std::tuple<Tensor, Tensor> forward() {
    const Tensor out = empty(as_sizes(shape_.out_sizes()), shape_.dtype);
    const Tensor lse = empty(as_sizes(shape_.lse_sizes()), DType::f32);
    if (shape_.rows() == 0) return {out, lse};
    call_.out = heads_of(out, "out");
    call_.lse = static_cast<float*>(lse.data_ptr());
    const AttentionForwardKernels& kernels = forward_kernels();
    // More panels together read keys less often, but threads want tasks.
    const int64_t together = std::clamp<int64_t>(key_heads() * call_.panels / 16, 1, kPanelsTogether);
    by_panels(
        together, call_.size + call_.value_size, kernels.scratch(call_, together),
        [&](const AttentionTask& task, float* scratch) { kernels.run(call_, task, scratch); });
    return {out, lse};
  }

  Gradients backward(
      const Optional& dout, const Optional& dlse, const Tensor& out, const Tensor& lse,
      const std::vector<bool>& wanted) {
    Gradients found;
    if (wanted[0]) found[0] = empty(given_.query.sizes(), shape_.dtype);
    if (wanted[1]) found[1] = empty(given_.key.sizes(), shape_.dtype);
    if (wanted[2]) found[2] = empty(given_.value.sizes(), shape_.dtype);
    if (wanted[3] && given_.mask) found[3] = gradient_of(*given_.mask, "attn_mask");
    if (wanted[4] && given_.slopes) found[4] = gradient_of(*given_.slopes, "alibi_slopes");
    if (wanted[5] && given_.sinks) found[5] = gradient_of(*given_.sinks, "sinks");
    if (shape_.rows() == 0) {
      for (Tensor& gradient : found)
        if (gradient.defined()) torch::stable::zero_(gradient);
      return found;
    }

    const Tensor dense_lse = lse.is_contiguous() ? lse : torch::stable::contiguous(lse);
    call_.out = heads_of(out, "out");
    call_.lse = static_cast<float*>(dense_lse.data_ptr());
    AttentionGradients gradients = {};
    if (dout) gradients.dout = heads_of(*dout, "dout");
    if (dlse) gradients.dlse = view_of(*dlse, "dlse", kRows, call_.lead_dims);
    if (wanted[0]) gradients.dquery = heads_of(found[0], "dquery");
    if (wanted[1]) gradients.dkey = heads_of(found[1], "dkey");
    if (wanted[2]) gradients.dvalue = heads_of(found[2], "dvalue");
    if (found[3].defined()) gradients.dmask = view_of(found[3], "dattn_mask", kScores, call_.lead_dims);
    gradients.of_scores = wanted[0] || wanted[1] || wanted[3] || wanted[4] || wanted[5];
    const Scratch rows(4 * shape_.rows());
    gradients.norm = rows.get();
    gradients.delta = gradients.norm + shape_.rows();
    if (found[4].defined()) gradients.slope_rows = gradients.delta + shape_.rows();
    if (found[5].defined()) gradients.sink_rows = gradients.delta + 2 * shape_.rows();

    by_keys_and_panels(gradients);
    if (gradients.dmask.data && call_.keys > 0) by_mask(gradients);
    else if (gradients.dmask.data) torch::stable::zero_(found[3]);
    if (gradients.slope_rows) add_rows(gradients.slope_rows, found[4]);
    if (gradients.sink_rows) add_rows(gradients.sink_rows, found[5]);
    return found;
  }

 private:
  AttentionView heads_of(const Tensor& t, const char* name) const {
    return view_of(t, name, kHeads, call_.lead_dims);
  }

  int64_t key_heads() const { return call_.batches * shape_.key_heads; }

  // Of a task's `count` parts the one to do at `step`: in turn from either end, since each thread gets consecutive tasks,
  // and with causality late rows have more keys.
  static int64_t from_either_end(int64_t step, int64_t count) { return step % 2 ? count - 1 - step / 2 : step / 2; }

  // Runs tasks of a few panels and all keys.
  template <class Run>
  void by_panels(int64_t together, int64_t columns, int64_t scratch_floats, const Run& run) const {
    const int64_t tasks = (call_.panels + together - 1) / together;
    const int64_t rows = together * std::min<int64_t>(call_.panel_heads * call_.length, kPanelRows);
    parallel(key_heads() * tasks, work(rows, call_.keys, columns), [&](int64_t begin, int64_t end) {
      const Scratch scratch(scratch_floats);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tasks, first = from_either_end(i % tasks, tasks) * together;
        const int64_t last = std::min(first + together, call_.panels);
        run({head / shape_.key_heads, head % shape_.key_heads, first, last, 0, call_.keys}, scratch.get());
      }
    });
  }

  // Runs backward tasks of some keys and all panels.
  void by_keys(const AttentionGradients& gradients, AttentionSides sides, int64_t keys, int64_t panel_keys) const {
    const AttentionBackwardKernels& kernels = backward_kernels();
    const int64_t tasks = std::max<int64_t>(1, (call_.keys + keys - 1) / keys);
    const int64_t columns = 3 * call_.size + 2 * call_.value_size;
    parallel(key_heads() * tasks, work(call_.group * call_.length, keys, columns), [&](int64_t begin, int64_t end) {
      const Scratch scratch(kernels.scratch(call_, panel_keys, keys));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t head = i / tasks, first = from_either_end(i % tasks, tasks) * keys;
        const AttentionTask task = {
            head / shape_.key_heads, head % shape_.key_heads, 0, call_.panels, first,
            std::min(first + keys, call_.keys)};
        kernels.run(call_, gradients, task, sides, panel_keys, scratch.get());
      }
    });
  }

  // With a task a key head everything is computed once. Where these are few but long, rows' and keys' gradients have
  // tasks of their own, which compute scores and their gradients twice. What is chosen depends on the shape alone.
  void by_keys_and_panels(const AttentionGradients& gradients) const {
    constexpr int64_t kFewHeads = 4, kSplitKeys = 256;
    const int64_t panel_keys = keys_of_panel(call_);
    if (key_heads() >= kFewHeads || call_.panels == 1)
      return by_keys(gradients, {true, true}, std::max<int64_t>(call_.keys, 1), panel_keys);
    const AttentionBackwardKernels& kernels = backward_kernels();
    by_panels(
        1, 2 * call_.size + call_.value_size, kernels.scratch(call_, panel_keys, 0),
        [&](const AttentionTask& task, float* scratch) {
          kernels.run(call_, gradients, task, {true, false}, panel_keys, scratch);
        });
    if (gradients.dkey.data || gradients.dvalue.data) by_keys(gradients, {false, true}, kSplitKeys, kBlockKeys);
  }

  // Each task owns a part of the mask's gradient, and sums over what the mask is broadcast over.
  void by_mask(const AttentionGradients& gradients) const {
    const AttentionView& dmask = gradients.dmask;
    std::vector<int64_t> batches;  // the first of those that read the same part
    for (int64_t batch = 0; batch < call_.batches; ++batch) {
      bool is_first = true;
      for (int64_t d = call_.lead_dims - 1, rest = batch; d >= 0; rest /= call_.lead[d--])
        is_first &= dmask.lead[d] != 0 || rest % call_.lead[d] == 0;
      if (is_first) batches.push_back(batch);
    }
    const int64_t heads = dmask.head ? call_.heads : 1;
    const int64_t rows = dmask.row ? kPanelRows : call_.length, keys = dmask.column ? 512 : call_.keys;
    const int64_t row_parts = (call_.length + rows - 1) / rows, key_parts = (call_.keys + keys - 1) / keys;
    const int64_t parts = static_cast<int64_t>(batches.size()) * heads * row_parts * key_parts;
    const AttentionBackwardKernels& kernels = backward_kernels();
    const int64_t summed = call_.batches * call_.heads / (static_cast<int64_t>(batches.size()) * heads);
    parallel(parts, summed * work(rows, keys, call_.size + call_.value_size), [&](int64_t begin, int64_t end) {
      const Scratch scratch(kernels.mask_scratch(call_, keys));
      for (int64_t i = begin; i < end; ++i) {
        const int64_t key = i % key_parts * keys, row = i / key_parts % row_parts * rows;
        const int64_t head = i / key_parts / row_parts;
        const AttentionMaskTask task = {
            batches[head / heads], head % heads, row, std::min(row + rows, call_.length),
            key, std::min(key + keys, call_.keys)};
        kernels.mask(call_, gradients, task, scratch.get());
      }
    });
  }

  // The sum over rows, and over batches where the gradient has none, in order.
  void add_rows(const float* rows, Tensor& gradient) const {
    const int64_t sums = gradient.numel(), batches = call_.batches * call_.heads / sums;
    std::vector<double> total(sums);
    for (int64_t batch = 0; batch < batches; ++batch)
      for (double& sum : total)
        for (int64_t i = 0; i < call_.length; ++i) sum += *rows++;
    store_rounded(total, gradient);
  }

  const Given given_;
  const AttentionShape shape_;
  AttentionCall call_ = {};
  Optional rng_;
};

std::tuple<Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Optional& attn_mask,
    const Optional& alibi_slopes, const Optional& sinks, const Optional& rng, double dropout_p, double scale, bool,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, std::optional<double> softcap,
    const std::string& align) {
  return CpuAttention({query, key, value, attn_mask, alibi_slopes, sinks, rng, dropout_p, scale, window_left,
                       window_right, softcap, align})
      .forward();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Optional& dout, const Optional& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Optional& attn_mask, const Optional& alibi_slopes, const Optional& sinks, const Optional& rng,
    double dropout_p, double scale, bool, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    std::optional<double> softcap, const std::string& align, const Tensor& out, const Tensor& lse,
    const std::vector<bool>& output_mask) {
  const Gradients found = CpuAttention({query, key, value, attn_mask, alibi_slopes, sinks, rng, dropout_p, scale,
                                        window_left, window_right, softcap, align})
                              .backward(dout, dlse, out, lse, output_mask);
  return {found[0], found[1], found[2], found[3], found[4], found[5]};
}

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&pykern::attention));
  m.impl("attention_backward", TORCH_BOX(&pykern::attention_backward));
}
