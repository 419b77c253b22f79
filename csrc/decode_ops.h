// Cached attention as the launchers of every device take it: sizes, and the keys a sequence can have. As for dense
// attention, arguments were checked in Python; what is checked here keeps a launcher from reading where it must not.

#pragma once

#include "attention_ops.h"
#include "include/pykern/sequences.h"

namespace pykern {

// The sizes of query (B, L, H, E) and of a cache (B, S, Hkv, E | Ev), or with a table (B, pages) of pages
// (blocks, block_size, Hkv, E | Ev). A contiguous cache is one page a sequence, and sequence b's is block b.
struct DecodeShape {
  DecodeShape(
      const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& cache_seqlens,
      const std::optional<Tensor>& block_table, std::optional<int64_t> window_left)
      : dtype(dtype_of(query, "query")) {
    const auto dim = [&](const Tensor& t, int64_t d) { return at_most_positions(t.size(d)); };
    for (const Tensor* t : {&query, &key_cache, &value_cache}) {
      const char* const name = t == &query ? "query" : t == &key_cache ? "key_cache" : "value_cache";
      STD_TORCH_CHECK(t->dim() == 4, name, " must have 4 dimensions, not ", t->dim());
      STD_TORCH_CHECK(dtype_of(*t, name) == dtype, name, " must have the dtype of query");
    }
    batch = dim(query, 0), tokens = dim(query, 1), heads = dim(query, 2), size = dim(query, 3);
    blocks = dim(key_cache, 0), block_size = dim(key_cache, 1), key_heads = dim(key_cache, 2);
    value_size = dim(value_cache, 3);
    STD_TORCH_CHECK(dim(key_cache, 3) == size, "key_cache must have heads of size ", size);
    for (int64_t d = 0; d < 3; ++d)
      STD_TORCH_CHECK(
          value_cache.size(d) == key_cache.size(d), "value_cache must have the lengths and heads of key_cache");
    STD_TORCH_CHECK(
        heads == key_heads || (key_heads > 0 && heads % key_heads == 0), "key_cache must have a divisor of ", heads,
        " heads, not ", key_heads);
    STD_TORCH_CHECK(
        cache_seqlens.dim() == 1 && cache_seqlens.size(0) == batch, "cache_seqlens must have ", batch, " elements");
    if (block_table) {
      STD_TORCH_CHECK(
          block_table->dim() == 2 && block_table->size(0) == batch, "block_table must have ", batch, " rows");
      pages = dim(*block_table, 1);
    } else {
      STD_TORCH_CHECK(blocks == batch, "key_cache must have ", batch, " sequences, not ", blocks);
    }
    // Without any block there is no key that a table could lead to.
    capacity = blocks == 0 ? 0 : at_most_positions(int64_t{pages} * block_size);
    left = reach(window_left);
  }

  // How many query heads share a key head, and the rows that share its keys.
  int group() const { return key_heads > 0 ? heads / key_heads : 1; }
  int shared_rows() const { return group() * tokens; }
  int64_t rows() const { return int64_t{batch} * tokens * heads; }

  // (B, L, H, Ev), and (B, H, L) of lse.
  std::vector<int64_t> out_sizes() const { return {batch, tokens, heads, value_size}; }
  std::vector<int64_t> lse_sizes() const { return {batch, heads, tokens}; }

  // Where the keys are; `table` holds block_table contiguously, or is null without one.
  Pages pages_by(const int* table) const {
    return {table, pages, block_size, blocks, Divisor::of(std::max(block_size, 1))};
  }

  // What the tokens of a sequence see, from its number in cache_seqlens, whatever that is.
  Band band(int length) const {
    const int keys = std::clamp(length, 0, capacity);
    return {tokens, keys, keys - tokens, left, 0};
  }

  DType dtype;
  int batch, tokens, heads, key_heads, size, value_size;
  int blocks, block_size, pages = 1;
  int capacity;  // the most keys a sequence can have
  int left;      // how far the window reaches
};

// An int32 tensor, contiguous: a copy where it is not.
inline Tensor int32_values(const Tensor& t, const char* name) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  STD_TORCH_CHECK(code == aoti_torch_dtype_int32(), name, " must be int32");
  return torch::stable::contiguous(t);
}

}  // namespace pykern
