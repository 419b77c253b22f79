// Slots sorted by expert on the CPU: a stable counting sort. Slots are cut into chunks; each is counted by itself, the
// counts become the places where each chunk's slots of an expert begin, and each chunk puts its slots in order there.
// The stable order is the only one, so it depends on neither chunks nor threads.

#include <algorithm>
#include <memory>

#include "../moe_ops.h"
#include "parallel.h"

namespace pykern {
namespace {

template <class Id>
void count(const Id* ids, int64_t begin, int64_t end, int experts, int32_t* counts) {
  using Unsigned = std::make_unsigned_t<Id>;  // in which no negative id is below `experts`
  for (int64_t slot = begin; slot < end; ++slot)
    ++counts[std::min<Unsigned>(static_cast<Unsigned>(ids[slot]), experts)];
}

template <class Id>
void place(
    const Id* ids, int64_t begin, int64_t end, int experts, int32_t* next, int64_t* order, int64_t* inverse) {
  using Unsigned = std::make_unsigned_t<Id>;
  for (int64_t slot = begin; slot < end; ++slot) {
    const int32_t to = next[std::min<Unsigned>(static_cast<Unsigned>(ids[slot]), experts)]++;
    order[to] = slot;
    inverse[slot] = to;
  }
}

struct CpuSort {
  explicit CpuSort(const Tensor&) {}

  Tensor empty(Sizes sizes, int32_t code) const { return empty_of(sizes, code, aoti_torch_device_type_cpu(), 0); }

  void sort(
      const ExpertIdsOf& given, int64_t slots, int experts, const Tensor& order, const Tensor& inverse,
      const Tensor& offs) const {
    const ExpertIds& ids = given.ids;
    if (ids.wide) sort(static_cast<const int64_t*>(ids.data), slots, experts, order, inverse, offs);
    else sort(static_cast<const int32_t*>(ids.data), slots, experts, order, inverse, offs);
  }

  template <class Id>
  static void sort(
      const Id* ids, int64_t slots, int experts, const Tensor& order, const Tensor& inverse, const Tensor& offs) {
    // Long enough that the counters, which are summed by one thread, are few beside the slots; few enough to share out.
    const int64_t bins = experts + 1, chunk = std::max<int64_t>({4096, 8 * bins, (slots + 63) / 64});
    const int64_t chunks = (slots + chunk - 1) / chunk;
    const std::unique_ptr<int32_t[]> counts(new int32_t[chunks * bins]());
    const auto each_chunk = [&](auto body) {
      parallel(chunks, 4 * chunk, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) body(c * chunk, std::min(slots, (c + 1) * chunk), &counts[c * bins]);
      });
    };
    each_chunk([&](int64_t begin, int64_t end, int32_t* own) { count(ids, begin, end, experts, own); });
    int32_t* const ends = static_cast<int32_t*>(offs.data_ptr());
    int32_t total = 0;
    for (int64_t bin = 0; bin < bins; ++bin) {
      for (int64_t c = 0; c < chunks; ++c) total += std::exchange(counts[c * bins + bin], total);
      if (bin < experts) ends[bin] = total;
    }
    int64_t* const to = static_cast<int64_t*>(order.data_ptr());
    int64_t* const from = static_cast<int64_t*>(inverse.data_ptr());
    each_chunk([&](int64_t begin, int64_t end, int32_t* own) { place(ids, begin, end, experts, own, to, from); });
  }
};

}  // namespace
}  // namespace pykern

STABLE_TORCH_LIBRARY_IMPL(pykern_native, CPU, m) { pykern::SortOps<pykern::CpuSort>::register_in(m); }
