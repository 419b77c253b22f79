// Packed attention on the CPU: each sequence is a call of the dense kernels, on its own rows of the packed tensors. The
// tasks of all sequences are one list, from which every thread takes the next.

#include <torch/csrc/stable/library.h>

#include <array>
#include <atomic>
#include <tuple>

#include "../packed_ops.h"
#include "attention_host.h"

namespace pykern {
namespace {

using Gradients = std::array<Tensor, 5>;  // of query, key, value, slopes, sinks; undefined where not wanted

// The forward's tensors and numbers, in the op's order.
struct Given {
  const Tensor &query, &key, &value, &cu_seqlens_q, &cu_seqlens_k;
  int64_t max_seqlen_q, max_seqlen_k;
  const Optional &slopes, &sinks, &seqused_k, &block_table, &rng;
  double dropout_p, scale;
  std::optional<int64_t> window_left, window_right;
  std::optional<double> softcap;
};

struct PackedTask {
  int sequence;
  AttentionTask task;
  AttentionSides sides;  // of the backward
};
using Tasks = std::vector<PackedTask>;

// The same tensor from a later place on.
void advance(AttentionView& view, int64_t elements) {
  const int64_t bytes = view.type == Element::f64 ? 8 : view.type == Element::f32 ? 4 : 2;
  if (view.data) view.data = static_cast<char*>(view.data) + elements * bytes;
}

// Zeros in some rows of a contiguous tensor, if it is there.
void clear(const Tensor& t, Range rows) {
  if (!t.defined() || t.numel() == 0 || rows.first >= rows.end) return;
  const int64_t bytes = t.stride(0) * t.element_size();
  std::memset(static_cast<char*>(t.data_ptr()) + rows.first * bytes, 0, (rows.end - rows.first) * bytes);
}

class PackedAttention {
 public:
  explicit PackedAttention(const Given& given)
      : given_(given),
        shape_(
            given.query, given.key, given.value, given.cu_seqlens_q, given.cu_seqlens_k, given.max_seqlen_q,
            given.max_seqlen_k, given.seqused_k, given.block_table, given.window_left, given.window_right),
        sequences_(shape_.sequences) {
    const bool in_pages = sequences_.pages.table;
    all_.query = view_of(given.query, "query", kHeads, 0);
    all_.key = view_of(given.key, "key", kHeads, in_pages);
    all_.value = view_of(given.value, "value", kHeads, in_pages);
    if (given.slopes) all_.slopes = view_of(*given.slopes, "alibi_slopes", kPerHead, 1);
    if (given.sinks) all_.sinks = view_of(*given.sinks, "sinks", kPerHead, 0);
    all_.pages = sequences_.pages;
    all_.batches = 1;
    all_.heads = shape_.heads;
    all_.group = shape_.group();
    all_.size = shape_.size;
    all_.value_size = shape_.value_size;
    all_.left = sequences_.left;
    all_.right = sequences_.right;
    all_.numbers = {0, 0, sequences_.query_rows, 1};
    all_.random_rows = {0, 0, 1, shape_.heads};
    rng_ = set_scoring(all_, given.scale, given.softcap, given.rng, given.dropout_p, given.max_seqlen_k);

    for (int b = 0; b < sequences_.count; ++b) {
      if (!has_rows(b)) continue;
      order_.push_back(b);
      pairs_ += pairs_of(b);
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return pairs_of(a) > pairs_of(b); });
  }

  std::tuple<Tensor, Tensor> forward() {
    const Tensor out = empty(as_sizes(shape_.out_sizes()), shape_.dtype);
    const Tensor lse = empty(as_sizes(shape_.lse_sizes()), DType::f32);
    all_.out = view_of(out, "out", kHeads, 0);
    all_.lse = static_cast<float*>(lse.data_ptr());
    for (int b = 0; b <= sequences_.count; ++b) {
      const Range rows = sequences_.queries_before(b);
      clear(out, rows);
      for (float* head = all_.lse; head != all_.lse + shape_.rows(); head += sequences_.query_rows)
        for (int row = rows.first; row < rows.end; ++row) head[row] = -std::numeric_limits<float>::infinity();
    }

    // More panels together read keys less often, but threads want tasks.
    const int64_t together = std::clamp<int64_t>(shape_.rows() / kPanelRows / 16, 1, kPanelsTogether);
    Tasks tasks;
    for (int b : order_) add_panels(b, together, tasks);
    const AttentionForwardKernels& kernels = forward_kernels();
    run(tasks, all_.size + all_.value_size, kernels.scratch(all_, together),
        [&](const AttentionCall& call, const AttentionGradients&, const PackedTask& task, float* scratch) {
          kernels.run(call, task.task, scratch);
        });
    return {out, lse};
  }

  Gradients backward(const Optional& dout, const Optional& dlse, const Tensor& lse, const std::vector<bool>& wanted) {
    STD_TORCH_CHECK(!sequences_.pages.table, "keys in pages have no backward kernel");
    Gradients found;
    if (wanted[0]) found[0] = empty(given_.query.sizes(), shape_.dtype);
    if (wanted[1]) found[1] = empty(given_.key.sizes(), shape_.dtype);
    if (wanted[2]) found[2] = empty(given_.value.sizes(), shape_.dtype);
    if (wanted[3] && given_.slopes) found[3] = gradient_of(*given_.slopes, "alibi_slopes");
    if (wanted[4] && given_.sinks) found[4] = gradient_of(*given_.sinks, "sinks");
    for (int b = 0; b <= sequences_.count; ++b) {
      clear(found[0], sequences_.queries_before(b));
      for (int i : {1, 2}) {
        clear(found[i], sequences_.keys_before(b));
        if (b < sequences_.count && !has_rows(b)) clear(found[i], sequences_.keys_of(b));
      }
    }

    const Tensor dense_lse = lse.is_contiguous() ? lse : torch::stable::contiguous(lse);
    all_.lse = static_cast<float*>(dense_lse.data_ptr());
    AttentionGradients& gradients = all_gradients_;
    if (dout) gradients.dout = view_of(*dout, "dout", kHeads, 0);
    if (dlse) gradients.dlse = view_of(*dlse, "dlse", kRows, 0);
    if (wanted[0]) gradients.dquery = view_of(found[0], "dquery", kHeads, 0);
    if (wanted[1]) gradients.dkey = view_of(found[1], "dkey", kHeads, 0);
    if (wanted[2]) gradients.dvalue = view_of(found[2], "dvalue", kHeads, 0);
    gradients.of_scores = wanted[0] || wanted[1] || wanted[3] || wanted[4];
    const Scratch rows(4 * shape_.rows());
    gradients.norm = rows.get();
    gradients.delta = gradients.norm + shape_.rows();
    if (found[3].defined()) gradients.slope_rows = gradients.delta + shape_.rows();
    if (found[4].defined()) gradients.sink_rows = gradients.delta + 2 * shape_.rows();

    run_backward();
    if (gradients.slope_rows) add_rows(gradients.slope_rows, found[3]);
    if (gradients.sink_rows) add_rows(gradients.sink_rows, found[4]);
    return found;
  }

 private:
  // Whether there is anything to compute of a sequence.
  bool has_rows(int sequence) const {
    const Range rows = sequences_.queries_of(sequence);
    return rows.first < rows.end && shape_.heads > 0;
  }

  // How much that is: about how many keys its queries see.
  double pairs_of(int sequence) const {
    const Range rows = sequences_.queries_of(sequence), keys = sequences_.keys_of(sequence);
    const int seen = std::min<int64_t>(keys.end - keys.first, all_.left + all_.right + 1);
    return static_cast<double>(rows.end - rows.first) * (seen + 1);
  }

  AttentionCall call_of(int sequence) const {
    AttentionCall call = all_;
    const Range rows = sequences_.queries_of(sequence), keys = sequences_.keys_of(sequence);
    const Band band = sequences_.band_of(rows, keys);
    call.sequence = sequence;
    call.length = band.queries;
    call.keys = band.keys;
    call.offset = band.offset;
    call.numbers.first = rows.first;
    call.random_rows.first = rows.first * call.heads;
    advance(call.query, rows.first * call.query.row);
    advance(call.out, rows.first * call.out.row);
    advance(call.key, keys.first * call.key.row);
    advance(call.value, keys.first * call.value.row);
    advance(call.slopes, sequence * call.slopes.lead[0]);
    cut_into_panels(call);
    return call;
  }

  AttentionGradients gradients_of(int sequence) const {
    AttentionGradients gradients = all_gradients_;
    const int64_t row = sequences_.queries_of(sequence).first, key = sequences_.keys_of(sequence).first;
    for (AttentionView* view : {&gradients.dout, &gradients.dlse, &gradients.dquery}) advance(*view, row * view->row);
    for (AttentionView* view : {&gradients.dkey, &gradients.dvalue}) advance(*view, key * view->row);
    return gradients;
  }

  // Tasks of a few panels and all keys; late rows, which with causality have more keys, come first.
  void add_panels(int sequence, int64_t together, Tasks& tasks) const {
    const AttentionCall call = call_of(sequence);
    for (int64_t head = 0; head < shape_.key_heads; ++head)
      for (int64_t end = call.panels; end > 0; end -= together)
        tasks.push_back(
            {sequence, {0, head, std::max<int64_t>(end - together, 0), end, 0, call.keys}, {true, false}});
  }

  // Tasks of some keys and all panels.
  void add_keys(int sequence, int64_t count, AttentionSides sides, Tasks& tasks) const {
    const AttentionCall call = call_of(sequence);
    for (int64_t head = 0; head < shape_.key_heads; ++head)
      for (int64_t first = 0; first == 0 || first < call.keys; first += count)
        tasks.push_back(
            {sequence, {0, head, 0, call.panels, first, std::min(first + count, call.keys)}, sides});
  }

  // Runs tasks of `columns` products a pair of query and key. A thread takes the next when it has done one, and as the
  // long sequences come first, none waits long for another at the end.
  template <class Kernel>
  void run(const Tasks& tasks, int64_t columns, int64_t scratch_floats, const Kernel& kernel) const {
    const int64_t count = static_cast<int64_t>(tasks.size());
    if (count == 0) return;
    const int64_t pairs_each = static_cast<int64_t>(std::min(pairs_ * shape_.heads / count, 0x1p30));
    std::atomic<int64_t> next = 0;
    on_threads(threads_for(count, work(1, pairs_each, columns)), [&] {
      const Scratch scratch(scratch_floats);
      AttentionCall call;
      AttentionGradients gradients;
      int sequence = -1;
      for (int64_t i; (i = next++) < count;) {
        if (tasks[i].sequence != sequence) {
          sequence = tasks[i].sequence;
          call = call_of(sequence);
          gradients = gradients_of(sequence);
        }
        kernel(call, gradients, tasks[i], scratch.get());
      }
    });
  }

  // As for the dense op: with a task a key head everything is computed once, and of a sequence that is too large a part
  // of the whole for that, rows and keys have tasks of their own.
  void run_backward() const {
    constexpr int64_t kFewHeads = 4, kSplitKeys = 256;
    Tasks with_rows, only_keys;
    int64_t panel_keys = 0, most_keys = 0;
    for (int b : order_) {
      const AttentionCall call = call_of(b);
      panel_keys = std::max(panel_keys, keys_of_panel(call));
      if (call.panels > 1 && kFewHeads * pairs_of(b) > shape_.key_heads * pairs_) {
        add_panels(b, 1, with_rows);
        if (all_gradients_.dkey.data || all_gradients_.dvalue.data) add_keys(b, kSplitKeys, {false, true}, only_keys);
      } else {
        most_keys = std::max(most_keys, call.keys);
        add_keys(b, std::max<int64_t>(call.keys, 1), {true, true}, with_rows);
      }
    }
    const AttentionBackwardKernels& kernels = backward_kernels();
    const auto run_with = [&](const Tasks& tasks, int64_t panel_keys, int64_t task_keys) {
      run(tasks, 3 * all_.size + 2 * all_.value_size, kernels.scratch(all_, panel_keys, task_keys),
          [&](const AttentionCall& call, const AttentionGradients& gradients, const PackedTask& task, float* scratch) {
            kernels.run(call, gradients, task.task, task.sides, panel_keys, scratch);
          });
    };
    run_with(with_rows, panel_keys, most_keys);
    run_with(only_keys, kBlockKeys, kSplitKeys);
  }

  // The sum over the rows of each sequence, or where the gradient has none, of all, in order.
  void add_rows(const float* rows, Tensor& gradient) const {
    const int64_t sums = gradient.numel();
    std::vector<double> total(sums);
    for (int b = 0; b < sequences_.count; ++b) {
      const Range own = sequences_.queries_of(b);
      for (int64_t head = 0; head < shape_.heads; ++head) {
        double& sum = total[(b * shape_.heads + head) % sums];
        for (int64_t row = own.first; row < own.end; ++row) sum += rows[head * sequences_.query_rows + row];
      }
    }
    store_rounded(total, gradient);
  }

  const Given given_;
  const PackedShape shape_;
  const Sequences& sequences_;
  // What the sequences have in common; tensors begin at their first rows.
  AttentionCall all_ = {};
  AttentionGradients all_gradients_ = {};
  std::vector<int> order_;  // of the sequences with rows: long ones first
  double pairs_ = 0;        // of all sequences
  Optional rng_;
};

std::tuple<Tensor, Tensor> attention_varlen(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
    const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, const Optional& alibi_slopes,
    const Optional& sinks, const Optional& seqused_k, const Optional& block_table, const Optional& rng,
    double dropout_p, double scale, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    std::optional<double> softcap) {
  return PackedAttention({query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes,
                          sinks, seqused_k, block_table, rng, dropout_p, scale, window_left, window_right, softcap})
      .forward();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_varlen_backward(
    const Optional& dout, const Optional& dlse, const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
    const Optional& alibi_slopes, const Optional& sinks, const Optional& seqused_k, const Optional& block_table,
    const Optional& rng, double dropout_p, double scale, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, std::optional<double> softcap, const Tensor&, const Tensor& lse,
    const std::vector<bool>& output_mask) {
  const Gradients found =
      PackedAttention({query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, alibi_slopes,
                       sinks, seqused_k, block_table, rng, dropout_p, scale, window_left, window_right, softcap})
          .backward(dout, dlse, lse, output_mask);
  return {found[0], found[1], found[2], found[3], found[4]};
}

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) {
  m.impl("attention_varlen", TORCH_BOX(&pykern::attention_varlen));
  m.impl("attention_varlen_backward", TORCH_BOX(&pykern::attention_varlen_backward));
}
