// Dense attention as the launchers of every device take it: sizes, the rule of the scores, tensors as heads. Arguments
// were checked in Python; what is checked here keeps a launcher from reading where it must not.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "include/pykern/heads.h"
#include "tensors.h"

namespace pykern {

inline int at_most_positions(int64_t size) {
  STD_TORCH_CHECK(size <= kMostPositions, "a length, a number of heads or a size is above 2^29: ", size);
  return static_cast<int>(size);
}

// One side of a band.
inline int reach(std::optional<int64_t> window) {
  return static_cast<int>(std::min<int64_t>(window.value_or(kUnlimited), kUnlimited));
}

// The sizes of query (…, L, H, E), key (…, S, Hkv, E) and value (…, S, Hkv, Ev), and which keys a query sees.
struct AttentionShape {
  AttentionShape(
      const Tensor& query, const Tensor& key, const Tensor& value, std::optional<int64_t> window_left,
      std::optional<int64_t> window_right, const std::string& align)
      : dtype(dtype_of(query, "query")) {
    const size_t dims = query.dim();
    STD_TORCH_CHECK(dims >= 3, "query must have at least 3 dimensions, not ", dims);
    const size_t lead = dims - 3;
    for (const Tensor* t : {&key, &value}) {
      const char* const name = t == &key ? "key" : "value";
      STD_TORCH_CHECK(static_cast<size_t>(t->dim()) == dims, name, " must have as many dimensions as query");
      STD_TORCH_CHECK(std::equal(t->sizes().begin(), t->sizes().begin() + lead, query.sizes().begin()), name,
                      " must have the leading dimensions of query");
      STD_TORCH_CHECK(dtype_of(*t, name) == dtype, name, " must have the dtype of query");
    }
    leading.assign(query.sizes().begin(), query.sizes().begin() + lead);
    for (int64_t size : leading) batch *= size;
    const auto tail = [&](const Tensor& t, size_t d) { return at_most_positions(t.size(lead + d)); };
    heads = tail(query, 1), key_heads = tail(key, 1);
    size = tail(query, 2), value_size = tail(value, 2);
    band = {tail(query, 0), tail(key, 0), 0, reach(window_left), reach(window_right)};
    if (align == "bottom_right") band.offset = band.keys - band.queries;
    else STD_TORCH_CHECK(align == "top_left", "align must be top_left or bottom_right, not ", align);
    STD_TORCH_CHECK(tail(key, 2) == size, "key must have heads of size ", size);
    STD_TORCH_CHECK(
        tail(value, 0) == band.keys && tail(value, 1) == key_heads, "value must have the length and heads of key");
    STD_TORCH_CHECK(
        heads == key_heads || (key_heads > 0 && heads % key_heads == 0), "key must have a divisor of ", heads,
        " heads, not ", key_heads);
  }

  // How many query heads share a key head.
  int group() const { return key_heads > 0 ? heads / key_heads : 1; }
  int64_t rows() const { return batch * heads * band.queries; }

  // (…, length, heads, size), and (…, H, L) of lse.
  std::vector<int64_t> out_sizes() const { return with_leading({band.queries, heads, value_size}); }
  std::vector<int64_t> lse_sizes() const { return with_leading({heads, band.queries}); }

  DType dtype;
  std::vector<int64_t> leading;
  int64_t batch = 1;  // all leading dimensions
  int heads, key_heads, size, value_size;
  Band band;

 private:
  std::vector<int64_t> with_leading(std::initializer_list<int64_t> tail) const {
    std::vector<int64_t> sizes = leading;
    sizes.insert(sizes.end(), tail);
    return sizes;
  }
};

inline Sizes as_sizes(const std::vector<int64_t>& sizes) { return Sizes(sizes.data(), sizes.size()); }

// A tensor (…, length, heads, size), read in place where its elements of a head are contiguous, its leading dimensions
// fold into one, and rows begin at multiples of `alignment` bytes; else a contiguous copy, which lives as long as this.
class HeadsOf {
 public:
  explicit HeadsOf(const Tensor& t, int64_t alignment = 1) : tensor(t) {
    if (fold(alignment)) return;
    tensor = torch::stable::contiguous(t);
    // A contiguous view may begin anywhere.
    if (!fold(alignment)) tensor = torch::stable::clone(tensor);
    STD_TORCH_CHECK(fold(alignment), "heads must have a multiple of ", alignment, " bytes");
  }

  Tensor tensor;  // the one that is read
  Heads heads = {};

 private:
  bool fold(int64_t alignment) {
    if (tensor.numel() == 0) return true;  // nothing is read, and contiguous() leaves any strides as they are
    const Sizes sizes = tensor.sizes(), strides = tensor.strides();
    const int64_t dims = static_cast<int64_t>(sizes.size());
    const auto stride = [&](int64_t d) { return sizes[d] > 1 ? strides[d] : 0; };
    if (sizes[dims - 1] > 1 && strides[dims - 1] != 1) return false;
    heads = {tensor.data_ptr(), 0, stride(dims - 3), stride(dims - 2)};
    int64_t folded = 1;
    for (int64_t d = dims - 4; d >= 0; --d) {
      if (sizes[d] == 1) continue;
      if (folded == 1) heads.batch = strides[d];
      else if (strides[d] != folded * heads.batch) return false;
      folded *= sizes[d];
    }
    const int64_t element = tensor.element_size();
    return reinterpret_cast<uintptr_t>(heads.data) % alignment == 0 && heads.batch * element % alignment == 0 &&
        heads.row * element % alignment == 0 && heads.head * element % alignment == 0;
  }
};

}  // namespace pykern
