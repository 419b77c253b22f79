// Packed attention as the launchers of every device take it: sizes, where the sequences are, the rule of the scores.
// Arguments were checked in Python; what is checked here keeps a launcher from reading where it must not.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "attention_ops.h"
#include "include/pykern/sequences.h"
#include "tensors.h"

namespace pykern {

// The sizes of query (total, H, E), key (total, Hkv, E) and value (total, Hkv, Ev), or of pages (blocks, rows, Hkv, …),
// and what kernels are told of the sequences in them.
class PackedShape {
 public:
  PackedShape(
      const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
      const Tensor& cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k, const std::optional<Tensor>& seqused_k,
      const std::optional<Tensor>& block_table, std::optional<int64_t> window_left,
      std::optional<int64_t> window_right)
      : dtype(dtype_of(query, "query")) {
    const size_t key_dims = block_table ? 4 : 3;
    STD_TORCH_CHECK(query.dim() == 3, "query must have 3 dimensions, not ", query.dim());
    heads = extent(query, 1), size = extent(query, 2);
    for (const Tensor* t : {&key, &value}) {
      const char* const name = t == &key ? "key" : "value";
      STD_TORCH_CHECK(static_cast<size_t>(t->dim()) == key_dims, name, " must have ", key_dims, " dimensions");
      STD_TORCH_CHECK(
          std::equal(t->sizes().begin(), t->sizes().end() - 1, key.sizes().begin()), name,
          " must have the rows and heads of key");
      STD_TORCH_CHECK(dtype_of(*t, name) == dtype, name, " must have the dtype of query");
    }
    key_heads = extent(key, key_dims - 2), value_size = extent(value, key_dims - 1);
    STD_TORCH_CHECK(extent(key, key_dims - 1) == size, "key must have heads of size ", size);
    STD_TORCH_CHECK(
        heads == key_heads || (key_heads > 0 && heads % key_heads == 0), "key must have a divisor of ", heads,
        " heads, not ", key_heads);
    STD_TORCH_CHECK(max_seqlen_q >= 0 && max_seqlen_k >= 0, "max_seqlen_q and max_seqlen_k must be at least 0");

    STD_TORCH_CHECK(cu_seqlens_q.dim() == 1 && cu_seqlens_q.size(0) >= 1, "cu_seqlens_q must have shape (B + 1,)");
    Sequences& s = sequences;
    s.count = extent(cu_seqlens_q, 0) - 1;
    s.query_starts = integers(cu_seqlens_q, "cu_seqlens_q", s.count + 1);
    s.key_starts = integers(cu_seqlens_k, "cu_seqlens_k", s.count + 1);
    if (seqused_k) s.used = integers(*seqused_k, "seqused_k", s.count);
    s.query_rows = extent(query, 0);
    if (block_table) {
      STD_TORCH_CHECK(block_table->dim() == 2, "block_table must have 2 dimensions, not ", block_table->dim());
      const int width = extent(*block_table, 1), page = extent(key, 1);
      s.pages = {
          integers(*block_table, "block_table", static_cast<int64_t>(s.count) * width), width, page, extent(key, 0),
          Divisor::of(std::max(page, 1))};
      // An empty tensor has no address, which would say that there is no table.
      static const int kNoPages = 0;
      if (!s.pages.table) s.pages.table = &kNoPages;
    } else {
      s.key_rows = extent(key, 0);
    }
    s.most_queries = static_cast<int>(std::min<int64_t>(max_seqlen_q, s.query_rows));
    s.most_keys = at_most_positions(std::min(max_seqlen_k, block_table ? s.pages.capacity() : s.key_rows));
    s.left = reach(window_left), s.right = reach(window_right);
  }

  // How many query heads share a key head.
  int group() const { return key_heads > 0 ? heads / key_heads : 1; }
  int64_t rows() const { return static_cast<int64_t>(heads) * sequences.query_rows; }

  // (total, heads, size), and (H, total) of lse.
  std::vector<int64_t> out_sizes() const { return {sequences.query_rows, heads, value_size}; }
  std::vector<int64_t> lse_sizes() const { return {heads, sequences.query_rows}; }

  DType dtype;
  int heads, key_heads, size, value_size;
  Sequences sequences = {};

  // The tensors to which `sequences` points, with their names; they live as long as this.
  struct Named {
    Tensor tensor;
    const char* name;
  };
  std::vector<Named> integer_tensors;

 private:
  static int extent(const Tensor& t, size_t d) { return at_most_positions(t.size(static_cast<int64_t>(d))); }

  const int* integers(const Tensor& given, const char* name, int64_t count) {
    int32_t code;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(given.get(), &code));
    STD_TORCH_CHECK(code == aoti_torch_dtype_int32(), name, " must be int32");
    STD_TORCH_CHECK(given.numel() == count, name, " must have ", count, " elements, not ", given.numel());
    const Tensor& kept =
        integer_tensors.emplace_back(given.is_contiguous() ? given : torch::stable::contiguous(given), name).tensor;
    return static_cast<const int*>(kept.data_ptr());
  }
};

}  // namespace pykern
