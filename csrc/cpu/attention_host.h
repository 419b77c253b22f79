// What the host's side of dense and packed attention share: tensors as views, memory, and a call's panels.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "../tensors.h"
#include "attention.h"
#include "compiled.h"
#include "parallel.h"
#include "scratch.h"

namespace pykern {

using Optional = std::optional<Tensor>;

inline const AttentionForwardKernels& forward_kernels() { return compiled(&PYKERN_CHOOSE(attention_forward)); }
inline const AttentionBackwardKernels& backward_kernels() { return compiled(&PYKERN_CHOOSE(attention_backward)); }

inline Element element_of(const Tensor& t, const char* name) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  if (code == aoti_torch_dtype_bool()) return Element::boolean;
  if (code == aoti_torch_dtype_float64()) return Element::f64;
  return static_cast<Element>(dtype_of(t, name));
}

// The places of a tensor's last dimensions in a view, outermost first; those before them are the leading ones.
using Places = std::initializer_list<int64_t AttentionView::*>;
constexpr Places kHeads = {&AttentionView::row, &AttentionView::head, &AttentionView::column};
constexpr Places kScores = {&AttentionView::head, &AttentionView::row, &AttentionView::column};
constexpr Places kRows = {&AttentionView::head, &AttentionView::row};
constexpr Places kPerHead = {&AttentionView::head};

// Dimensions of size one, and those that the tensor lacks, are broadcast.
inline AttentionView view_of(const Tensor& t, const char* name, Places places, int lead_dims) {
  AttentionView view = {};
  view.data = t.data_ptr();
  view.type = element_of(t, name);
  const Sizes sizes = t.sizes(), strides = t.strides();
  int64_t d = static_cast<int64_t>(sizes.size()) - 1;
  const auto next_stride = [&] {
    const int64_t stride = d >= 0 && sizes[d] > 1 ? strides[d] : 0;
    --d;
    return stride;
  };
  for (auto place = places.end(); place != places.begin();) view.*(*--place) = next_stride();
  for (int lead = lead_dims - 1; lead >= 0; --lead) view.lead[lead] = next_stride();
  return view;
}

// A gradient of x: contiguous, of any float type.
inline Tensor gradient_of(const Tensor& x, const char* name) {
  if (element_of(x, name) == Element::f64) return torch::stable::new_empty(x, x.sizes());
  return empty(x.sizes(), dtype_of(x, name));
}

// A gradient from its elements.
inline void store_rounded(const std::vector<double>& sums, Tensor& gradient) {
  const Tensor rounded = empty(gradient.sizes(), DType::f32);
  std::copy(sums.begin(), sums.end(), static_cast<float*>(rounded.data_ptr()));
  torch::stable::copy_(gradient, rounded);
}

// The work on `rows` rows and `keys` keys, of which each pair costs `columns` products, in parallel()'s elements.
inline int64_t work(int64_t rows, int64_t keys, int64_t columns) { return rows * keys * (columns + 16) / 64; }

// What scores and weights are made of besides tensors; `columns` are those of a row's random words. Gives what is to
// live as long as the call.
inline Optional set_scoring(
    AttentionCall& call, double scale, std::optional<double> softcap, const Optional& rng, double dropout_p,
    int64_t columns) {
  call.scale = static_cast<float>(scale);
  call.softcap = static_cast<float>(softcap.value_or(0));
  if (dropout_p <= 0) return std::nullopt;
  STD_TORCH_CHECK(rng && rng->numel() == 2, "rng must be seed and offset where dropout_p is ", dropout_p);
  const Tensor words = rng->is_contiguous() ? *rng : torch::stable::contiguous(*rng);
  call.rng = static_cast<const int64_t*>(words.data_ptr());
  call.random_fours = (columns + 3) / 4;
  // For p = 1 the threshold would not fit, but then what is kept counts nothing.
  call.threshold = static_cast<uint32_t>(std::min(dropout_p * 0x1p32, 0x1p32 - 1));
  call.kept = dropout_p < 1 ? static_cast<float>(1 / (1 - dropout_p)) : 0;
  return words;
}

// Panels for the call's length.
inline void cut_into_panels(AttentionCall& call) {
  call.panel_heads = std::clamp<int64_t>(
      kPanelRows / std::max<int64_t>(call.length, 1), 1, std::max<int64_t>(call.group, 1));
  call.panels_a_head = (call.length + kPanelRows - 1) / kPanelRows;
  call.panels = call.panel_heads == 1 ? call.group * call.panels_a_head
                                      : (call.group + call.panel_heads - 1) / call.panel_heads;
}

// The keys of a panel at the most: those that its first row sees, and one more for each other row's position. They may
// begin anywhere in a block.
inline int64_t keys_of_panel(const AttentionCall& call) {
  const int64_t positions = std::min<int64_t>(call.length, kPanelRows);
  return std::min(call.keys, call.left + call.right + positions + kBlockKeys);
}

}  // namespace pykern
