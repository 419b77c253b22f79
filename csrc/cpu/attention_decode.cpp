// Attention against a cache on the CPU: tensors, memory and tasks. The arithmetic is in simd/attention_decode.cpp.

#include "attention_decode.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../decode_ops.h"
#include "attention_host.h"

namespace pykern {
namespace {

// What a task costs besides its keys, in keys.
constexpr int64_t kTaskKeys = 8;

const DecodeKernels& decode_kernels() { return compiled(&PYKERN_CHOOSE(attention_decode)); }

Strided strided(const Tensor& t) {
  const Sizes sizes = t.sizes(), strides = t.strides();
  return {{t.data_ptr(), strides[0], strides[1], strides[2]}, sizes[3] > 1 ? strides[3] : 1};
}

Tensor floats_of(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  if (code == torch_code(DType::f32) && t.is_contiguous()) return t;
  Tensor copy = empty(t.sizes(), DType::f32);
  torch::stable::copy_(copy, t);
  return copy;
}

// The parts of one sequence's keys.
struct Parts {
  Band band;
  Range keys;
  int64_t count;
  int64_t first;  // its number among those of all sequences that have several

  bool several() const { return count > 1; }
};

class Decode {
 public:
  Decode(const DecodeShape& shape, const DecodeCall& call, const int* lengths)
      : shape_(shape), call_(call), kernels_(decode_kernels()), state_(kernels_.state(call)) {
    parts_.reserve(shape.batch);
    for (int b = 0; b < shape.batch; ++b) {
      const Band band = shape.band(lengths[b]);
      const Range keys = band.keys_of(Range{0, shape.tokens});
      const int64_t count = std::max((keys.end - keys.first + kPartKeys - 1) / kPartKeys, 1);
      parts_.push_back({band, keys, count, states_});
      if (parts_.back().several()) states_ += count;
      tasks_ += count;
    }
  }

  void run() {
    const Scratch states(states_ * shape_.key_heads * state_);
    make_tasks(states.get());
    const int heads = heads_a_task();
    parallel(ends_.back(), elements_a_key(), [&](int64_t begin, int64_t end) {
      const auto task_at = [&](int64_t work) {
        return list_.data() + (std::upper_bound(ends_.begin(), ends_.end(), work) - ends_.begin());
      };
      const Scratch scratch(kernels_.scratch(call_, heads));
      kernels_.run(call_, task_at(begin), task_at(end), scratch.get());
    });
    combine(states.get());
  }

 private:
  // Results do not depend on it, so it may go by the number of threads, which want some tasks each.
  int heads_a_task() const {
    const int64_t wanted = 4 * int64_t{torch::stable::get_num_threads()};
    const int64_t pieces = std::clamp<int64_t>((wanted + tasks_ - 1) / tasks_, 1, shape_.key_heads);
    return static_cast<int>((shape_.key_heads + pieces - 1) / pieces);
  }

  // In parallel()'s elements: those that are read of a cache, more where many rows meet them.
  int64_t elements_a_key() const {
    return int64_t{shape_.size + shape_.value_size} * (8 + shape_.shared_rows()) / 8;
  }

  void make_tasks(float* states) {
    const int heads = heads_a_task();
    const int64_t pieces = (shape_.key_heads + heads - 1) / heads;
    list_.reserve(tasks_ * pieces);
    ends_.reserve(tasks_ * pieces);
    int64_t work = 0;
    for (int b = 0; b < shape_.batch; ++b) {
      const Parts& parts = parts_[b];
      for (int64_t p = 0; p < parts.count; ++p) {
        const int first = parts.keys.first + static_cast<int>(p * kPartKeys);
        const Range keys = {first, std::min(first + kPartKeys, parts.keys.end)};
        for (int head = 0; head < shape_.key_heads; head += heads) {
          const Range some = {head, std::min(head + heads, shape_.key_heads)};
          float* const at =
              parts.several() ? states + ((parts.first + p) * shape_.key_heads + head) * state_ : nullptr;
          list_.push_back({b, parts.band, keys, some, at});
          work += (some.end - some.first) * (std::max(keys.end - keys.first, 0) + kTaskKeys);
          ends_.push_back(work);
        }
      }
    }
  }

  void combine(const float* states) {
    if (states_ == 0) return;
    const int64_t heads = shape_.key_heads, longest = states_ / shape_.batch;
    parallel(shape_.batch * heads, longest * state_, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int b = static_cast<int>(i / heads), head = static_cast<int>(i % heads);
        const Parts& parts = parts_[b];
        if (parts.several())
          kernels_.combine(
              call_, b, head, states + (parts.first * heads + head) * state_, heads * state_, parts.count);
      }
    });
  }

  const DecodeShape& shape_;
  const DecodeCall& call_;
  const DecodeKernels& kernels_;
  const int64_t state_;
  int64_t states_ = 0, tasks_ = 0;
  std::vector<Parts> parts_;
  std::vector<DecodeTask> list_;
  std::vector<int64_t> ends_;  // the work up to the end of each task
};

std::tuple<Tensor, Tensor> attention_decode(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& cache_seqlens,
    const Optional& block_table, const Optional& alibi_slopes, const Optional& sinks, double scale,
    std::optional<int64_t> window_left, std::optional<double> softcap) {
  const DecodeShape shape(query, key_cache, value_cache, cache_seqlens, block_table, window_left);
  const Tensor out = empty(as_sizes(shape.out_sizes()), shape.dtype);
  const Tensor lse = empty(as_sizes(shape.lse_sizes()), DType::f32);
  if (shape.rows() == 0) return {out, lse};
  const Tensor lengths = int32_values(cache_seqlens, "cache_seqlens");
  Optional table, slopes, sink_values;
  if (block_table) table = int32_values(*block_table, "block_table");
  if (alibi_slopes) slopes = floats_of(*alibi_slopes);
  if (sinks) sink_values = floats_of(*sinks);

  DecodeCall call = {};
  call.dtype = shape.dtype;
  call.query = strided(query), call.key = strided(key_cache), call.value = strided(value_cache);
  call.out = out.data_ptr();
  call.lse = static_cast<float*>(lse.data_ptr());
  if (slopes) call.slopes = static_cast<const float*>(slopes->data_ptr());
  if (slopes && slopes->dim() == 2) call.slopes_batch = shape.heads;
  if (sink_values) call.sinks = static_cast<const float*>(sink_values->data_ptr());
  call.pages = {
      table ? static_cast<const int*>(table->data_ptr()) : nullptr, shape.pages, shape.block_size, shape.blocks,
      Divisor::of(std::max(shape.block_size, 1))};
  call.tokens = shape.tokens, call.heads = shape.heads, call.group = shape.group();
  call.size = shape.size, call.value_size = shape.value_size;
  call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap.value_or(0));
  Decode(shape, call, static_cast<const int*>(lengths.data_ptr())).run();
  return {out, lse};
}

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) { m.impl("attention_decode", TORCH_BOX(&pykern::attention_decode)); }
