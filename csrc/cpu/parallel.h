// Loops on torch's threads.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace pykern {

// body(begin, end) over the range, on torch's threads where the elements are worth waking them; the range is cut
// differently for every number of threads, so the result must not depend on where.
template <class Body>
void parallel(int64_t count, int64_t elements_each, const Body& body) {
  constexpr int64_t kElementsPerThread = 32768;  // as torch's own elementwise kernels
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_each));
  if (count <= grain) body(0, count);
  else torch::stable::parallel_for(0, count, grain, body);
}

}  // namespace pykern
