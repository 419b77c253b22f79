// Slots sorted by expert on NVIDIA GPUs: memory, and how the slots are shared out. The algorithm is in moe_sort.cuh.

#include <pykern/moe_sort.cuh>

#include <algorithm>
#include <optional>

#include "../moe_ops.h"
#include "launch.h"

namespace pykern {
namespace {

// How many slots each block has.
int64_t span_of(int64_t slots, int bins, int multiprocessors) {
  if (slots <= kSortTile) return kSortTile;
  // Two blocks to a multiprocessor: one can load while the other counts. Each has slots for four turns, or launching it
  // would take longer than its work.
  int64_t spans = std::min<int64_t>(2 * multiprocessors, slots / (4 * kSortThreads));
  // All blocks read all counts; those shall be no more bytes than the slots, their order and its inverse.
  while (spans > 2 && spans * spans * bins * int64_t{sizeof(int)} > slots * int64_t{3 * sizeof(int64_t)}) --spans;
  const int64_t span = (slots + spans - 1) / spans;
  return (span + kSortThreads - 1) / kSortThreads * kSortThreads;
}

struct CudaSort {
  explicit CudaSort(const Tensor& expert_ids) : device(expert_ids) {}

  Tensor empty(Sizes sizes, int32_t code) const { return device.empty_of(sizes, code); }

  void sort(
      const ExpertIdsOf& given, int64_t slots, int experts, const Tensor& order, const Tensor& inverse,
      const Tensor& offs) const {
    const int bins = experts + 1;
    SortArgs args = {};
    args.ids = device.in(given.tensor, "expert_ids");
    args.slots = slots;
    args.span = span_of(slots, bins, device.multiprocessors());
    args.experts = experts;
    args.order = static_cast<int64_t*>(device.out(order, "order"));
    args.inverse = static_cast<int64_t*>(device.out(inverse, "inverse"));
    args.offs = static_cast<int*>(device.out(offs, "offs"));
    const int64_t blocks = (slots + args.span - 1) / args.span, counters = blocks * bins;
    const dim3 grid(static_cast<unsigned>(blocks)), block(kSortThreads);
    std::optional<Tensor> counts;
    if (blocks > 1) {
      counts = empty(Sizes(&counters, 1), aoti_torch_dtype_int32());
      args.counts = static_cast<int*>(device.out(*counts, "counts"));
      const auto count = given.ids.wide ? &moe_sort_count<int64_t> : &moe_sort_count<int32_t>;
      device.launch(count, grid, block, bins * sizeof(int), args);
    }
    const auto place = given.ids.wide ? &moe_sort_place<int64_t> : &moe_sort_place<int32_t>;
    device.launch(place, grid, block, static_cast<size_t>(bins) * kSortBinBytes, args);
  }

  const Device device;
};

}  // namespace
}  // namespace pykern

PYKERN_KERNELS(m) { pykern::SortOps<pykern::CudaSort>::register_in(m); }
