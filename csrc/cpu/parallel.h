// Loops on torch's threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>

namespace pykern {

// How many elements one of `threads` should have at the least, as torch's own elementwise kernels say.
constexpr int64_t kElementsPerThread = 32768;

// How many of torch's threads `count` pieces of work with so many elements each are worth waking.
inline int64_t threads_for(int64_t count, int64_t elements_each) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_each));
  return std::min<int64_t>((count + grain - 1) / grain, torch::stable::get_num_threads());
}

// work() on each of so many threads.
template <class Work>
void on_threads(int64_t threads, const Work& work) {
  if (threads <= 1) work();
  else torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(); });
}

// body(begin, end) over the range, on torch's threads where the elements are worth waking them. A thread takes the next
// piece when it has done one: it may wake late, or be disturbed, without the others waiting for its share. The range is
// cut differently for every number of threads, so the result must not depend on where.
template <class Body>
void parallel(int64_t count, int64_t elements_each, const Body& body) {
  constexpr int64_t kPieces = 16;  // a thread
  const int64_t threads = threads_for(count, elements_each);
  if (threads <= 1) return body(0, count);
  const int64_t piece = std::max<int64_t>(1, count / (threads * kPieces));
  std::atomic<int64_t> next = 0;
  on_threads(threads, [&] {
    for (int64_t begin; (begin = next.fetch_add(piece)) < count;) body(begin, std::min(count, begin + piece));
  });
}

}  // namespace pykern
