// A router as kernels of every device are told of it. Plain data: this header is compiled for every instruction set.

#pragma once

#include <cstdint>

#include "rows.h"

namespace pykern {

constexpr int kMostExperts = 1024, kMostChosen = 32;

enum class Score { softmax, sigmoid };
enum class GroupScore { top2, max };

struct Router {
  int experts;
  int top_k;
  Score score;
  bool renormalize;
  int groups, top_groups;
  GroupScore group_score;
  float scale;
};

// Expert ids, contiguous. An id that is no expert drops its slot; it leads to no memory.
struct ExpertIds {
  const void* data;
  bool wide;  // int64, else int32
};

PYKERN_ANYWHERE static inline __attribute__((always_inline)) int64_t id_at(const ExpertIds& ids, int64_t i) {
  return ids.wide ? static_cast<const int64_t*>(ids.data)[i] : static_cast<const int32_t*>(ids.data)[i];
}

// The expert's number, or -1 for a dropped slot.
PYKERN_ANYWHERE static inline __attribute__((always_inline)) int expert_at(
    const ExpertIds& ids, int64_t i, int experts) {
  const int64_t id = id_at(ids, i);
  return id >= 0 && id < experts ? static_cast<int>(id) : -1;
}

}  // namespace pykern
