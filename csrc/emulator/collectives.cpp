#include "collectives.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "scheduler.h"

namespace pykern::emulator {
namespace {

std::string hex(unsigned mask) {
  char text[16];
  snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
bool same(Place a, Place b) { return a.line == b.line && same(a.file, b.file); }

EmulatedThread& lane_of(Resident& block, unsigned warp, unsigned lane) {
  return block.thread(warp * kWarpSize + lane);
}

// Ends the meeting of `lanes`, which all wait for it.
[[gnu::noinline]] void complete(Resident& block, unsigned warp, unsigned lanes) {
  Warp& state = block.warps[warp];
  EmulatedThread* threads[kWarpSize];
  Thread* participants[kWarpSize];
  void* mine[kWarpSize] = {};
  unsigned count = 0;
  for (unsigned rest = lanes; rest; rest &= rest - 1) {
    const unsigned lane = std::countr_zero(rest);
    EmulatedThread& thread = lane_of(block, warp, lane);
    mine[lane] = thread.wait.mine;
    participants[count] = &thread;
    threads[count++] = &thread;
  }
  const Wait wait = threads[0]->wait;
  if (wait.orders_memory) on_meeting(block.block, {participants, count});
  if (lanes == state.living) on_converged(block.block, warp);
  if (wait.combine) wait.combine(mine, lanes);
  state.waiting &= ~lanes;
  wake(threads, threads + count);
}

[[noreturn, gnu::cold, gnu::noinline]] void fault_different(const Wait& wait, const EmulatedThread& other) {
  fault(
      "lanes of a warp wait for each other in different calls: " + std::string(wait.what) + " with mask " +
          hex(wait.mask) + " here, and lane " + std::to_string(other.lane()) + " in " + other.wait.what +
          " with mask " + hex(other.wait.mask) + " at " + describe(other.wait.place),
      wait.place);
}

// Completes the meeting for which this lane waits, if all that it waits for are there.
void try_complete(EmulatedThread& thread) {
  Resident& block = thread.resident;
  const unsigned warp = thread.warp(), bit = 1u << thread.lane();
  const Wait& wait = thread.wait;
  const unsigned needed = wait.mask & block.warps[warp].living;
  if (needed & ~block.warps[warp].waiting) return;
  for (unsigned rest = needed & ~bit; rest; rest &= rest - 1) {
    const EmulatedThread& other = lane_of(block, warp, std::countr_zero(rest));
    if (other.wait.mask == wait.mask && same(other.wait.what, wait.what)) continue;
    // Another lane may first have a meeting without this one. If both wait for each other, they will for ever.
    if (other.wait.mask & bit) fault_different(wait, other);
    return;
  }
  complete(block, warp, needed);
}

[[noreturn, gnu::cold, gnu::noinline]] void fault_mask(const char* what, unsigned mask, Place place) {
  fault(std::string(what) + ": the mask " + hex(mask) + " lacks the calling lane", place);
}

[[noreturn, gnu::cold, gnu::noinline]] void fault_width(const char* what, unsigned width, Place place) {
  fault(std::string(what) + ": width is " + std::to_string(width) + ", not a power of two up to 32", place);
}

// For a combine function: a fault of one lane, at the place where it called.
[[noreturn]] void fault_of_lane(unsigned lane, const std::string& what) {
  EmulatedThread& thread = lane_of(self().resident, self().warp(), lane);
  running = &thread;
  fault(std::string(thread.wait.what) + ": " + what, thread.wait.place);
}

template <class T>
T& given(void* mine) {
  return *static_cast<T*>(mine);
}

template <class F>
void for_each(unsigned lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(static_cast<unsigned>(std::countr_zero(lanes)));
}

struct Shuffled {
  Shuffle kind;
  unsigned source, width;
  uint64_t value;
};

// The lane that this one reads; itself where the source is outside its part of the warp.
unsigned source_of(const Shuffled& s, unsigned lane) {
  const unsigned source = s.source & (kWarpSize - 1), part = lane & ~(s.width - 1), last = part + s.width - 1;
  switch (s.kind) {
    case Shuffle::index: return part + (source & (s.width - 1));
    case Shuffle::up: return lane >= part + source ? lane - source : lane;
    case Shuffle::down: return lane + source <= last ? lane + source : lane;
    case Shuffle::bits: return (lane ^ source) <= last ? lane ^ source : lane;
  }
  __builtin_unreachable();
}

void combine_shuffle(void* const* lanes, unsigned mask) {
  uint64_t values[kWarpSize];
  for_each(mask, [&](unsigned lane) { values[lane] = given<Shuffled>(lanes[lane]).value; });
  for_each(mask, [&](unsigned lane) {
    Shuffled& own = given<Shuffled>(lanes[lane]);
    const unsigned source = source_of(own, lane);
    if (!(mask >> source & 1)) {
      const Resident& block = self().resident;
      const unsigned thread = self().warp() * kWarpSize + source;
      const unsigned asked = block.thread(self().warp() * kWarpSize + lane).wait.mask;
      fault_of_lane(
          lane, "reads lane " + std::to_string(source) +
              (!(asked >> source & 1)              ? ", which is not in the mask " + hex(asked)
                   : thread >= block.block.threads ? ", which the block does not have"
                                                   : ", which has exited"));
    }
    own.value = values[source];
  });
}

struct Voted {
  Vote kind;
  bool predicate;
  unsigned result;
};

void combine_vote(void* const* lanes, unsigned mask) {
  unsigned ballot = 0;
  for_each(mask, [&](unsigned lane) { ballot |= unsigned{given<Voted>(lanes[lane]).predicate} << lane; });
  for_each(mask, [&](unsigned lane) {
    Voted& own = given<Voted>(lanes[lane]);
    own.result = own.kind == Vote::ballot ? ballot : own.kind == Vote::any ? ballot != 0 : ballot == mask;
  });
}

struct Matched {
  Match kind;
  uint64_t value;
  unsigned result;
};

void combine_match(void* const* lanes, unsigned mask) {
  for_each(mask, [&](unsigned lane) {
    Matched& own = given<Matched>(lanes[lane]);
    own.result = 0;
    for_each(mask, [&](unsigned other) {
      own.result |= unsigned{given<Matched>(lanes[other]).value == own.value} << other;
    });
    if (own.kind == Match::all && own.result != mask) own.result = 0;
  });
}

struct Reduced {
  Reduce kind;
  unsigned value;
};

unsigned reduce_two(Reduce kind, unsigned a, unsigned b) {
  switch (kind) {
    case Reduce::add: return a + b;
    case Reduce::min: return std::min(a, b);
    case Reduce::max: return std::max(a, b);
    case Reduce::min_signed: return std::min<int>(a, b);
    case Reduce::max_signed: return std::max<int>(a, b);
    case Reduce::bit_and: return a & b;
    case Reduce::bit_or: return a | b;
    case Reduce::bit_xor: return a ^ b;
  }
  __builtin_unreachable();
}

void combine_reduce(void* const* lanes, unsigned mask) {
  const Reduced& first = given<Reduced>(lanes[std::countr_zero(mask)]);
  unsigned value = first.value;
  for_each(mask & (mask - 1), [&](unsigned lane) {
    value = reduce_two(first.kind, value, given<Reduced>(lanes[lane]).value);
  });
  for_each(mask, [&](unsigned lane) { given<Reduced>(lanes[lane]).value = value; });
}

void complete(Resident& block, Barrier& barrier) {
  count_barrier();
  const int result = barrier.vote == BlockVote::all ? barrier.count == barrier.participants.size()
      : barrier.vote == BlockVote::any              ? barrier.count != 0
                                                    : static_cast<int>(barrier.count);
  unsigned waiting[kMaxThreads / kWarpSize] = {};
  for (EmulatedThread* thread : barrier.waiting) {
    thread->barrier_result = result;
    waiting[thread->warp()] |= 1u << thread->lane();
  }
  on_meeting(block.block, barrier.participants, static_cast<int>(&barrier - block.barriers));
  for (unsigned w = 0; w * kWarpSize < block.block.threads; ++w)
    if (waiting[w] && waiting[w] == block.warps[w].living) on_converged(block.block, w);
  wake(barrier.waiting.data(), barrier.waiting.data() + barrier.waiting.size());
  barrier.waiting.clear();
  barrier.participants.clear();
  barrier.arrived = barrier.count = 0;
}

void wait_at(Barrier& barrier, unsigned number, const char* what, Place place) {
  EmulatedThread& me = self();
  me.wait = {.kind = Wait::For::barrier, .mask = number, .what = what, .place = place};
  barrier.waiting.push_back(&me);
}

constexpr const char* kBarrierNames[] = {
    "__syncthreads", "__syncthreads_count", "__syncthreads_and", "__syncthreads_or"};
constexpr const char* kShuffleNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
constexpr const char* kVoteNames[] = {"__all_sync", "__any_sync", "__ballot_sync"};
constexpr const char* kMatchNames[] = {"__match_any_sync", "__match_all_sync"};
constexpr const char* kReduceNames[] = {"__reduce_add_sync", "__reduce_min_sync", "__reduce_max_sync",
                                        "__reduce_min_sync", "__reduce_max_sync", "__reduce_and_sync",
                                        "__reduce_or_sync",  "__reduce_xor_sync"};

template <class Kind>
const char* name_in(const char* const* names, Kind kind) {
  return names[static_cast<int>(kind)];
}

}  // namespace

void meet(
    unsigned mask, void* mine, void (*combine)(void* const* lanes, unsigned mask), const char* what, Place place,
    bool orders_memory) {
  EmulatedThread& me = self();
  const unsigned bit = 1u << me.lane();
  if (!(mask & bit)) fault_mask(what, mask, place);
  Wait& wait = me.wait;
  wait.kind = Wait::For::warp;
  wait.orders_memory = orders_memory;
  wait.mask = mask;
  wait.what = what;
  wait.place = place;
  wait.mine = mine;
  wait.combine = combine;
  me.resident.warps[me.warp()].waiting |= bit;
  try_complete(me);
  pause();
}

void warp_meet(
    unsigned mask, void* mine, void (*combine)(void* const* lanes, unsigned mask), const char* what, Place place) {
  meet(mask, mine, combine, what, place, false);
}

void leave_meetings(EmulatedThread& thread) {
  Resident& block = thread.resident;
  Warp& warp = block.warps[thread.warp()];
  warp.living &= ~(1u << thread.lane());
  --block.living;
  if (!warp.living) on_converged(block.block, thread.warp());
  // Waiting lanes: one of each group, as the first try completes it.
  for (unsigned rest = warp.waiting; rest; rest = (rest & (rest - 1)) & warp.waiting)
    try_complete(lane_of(block, thread.warp(), std::countr_zero(rest)));
  Barrier& all = block.barriers[0];
  if (all.arrived && !all.expected && all.arrived == block.living) complete(block, all);
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, unsigned source, unsigned width, Place place) {
  const char* const name = name_in(kShuffleNames, kind);
  if (width - 1 >= kWarpSize || (width & (width - 1))) fault_width(name, width, place);
  Shuffled mine = {kind, source, width, value};
  meet(mask, &mine, combine_shuffle, name, place, false);
  return mine.value;
}

unsigned vote(Vote kind, unsigned mask, bool predicate, Place place) {
  Voted mine = {kind, predicate, 0};
  meet(mask, &mine, combine_vote, name_in(kVoteNames, kind), place, false);
  return mine.result;
}

unsigned match(Match kind, unsigned mask, uint64_t value, Place place) {
  Matched mine = {kind, value, 0};
  meet(mask, &mine, combine_match, name_in(kMatchNames, kind), place, false);
  return mine.result;
}

unsigned reduce(Reduce kind, unsigned mask, unsigned value, Place place) {
  Reduced mine = {kind, value};
  meet(mask, &mine, combine_reduce, name_in(kReduceNames, kind), place, false);
  return mine.value;
}

void sync_warp(unsigned mask, Place place) { meet(mask, nullptr, nullptr, "__syncwarp", place, true); }

int sync_block(BlockVote kind, bool predicate, Place place) {
  EmulatedThread& me = self();
  Resident& block = me.resident;
  Barrier& barrier = block.barriers[0];
  const char* const name = name_in(kBarrierNames, kind);
  if (!barrier.arrived) {
    barrier.what = name;
    barrier.place = place;
    barrier.vote = kind;
    barrier.expected = 0;
  } else if (!same(barrier.place, place) || barrier.vote != kind || barrier.expected) {
    fault(
        "divergent barrier: " + std::string(name) + " here, while other threads of the block wait in " + barrier.what +
            " at " + describe(barrier.place),
        place);
  }
  ++barrier.arrived;
  barrier.count += predicate;
  barrier.participants.push_back(&me);
  wait_at(barrier, 0, name, place);
  if (barrier.arrived == block.living) complete(block, barrier);
  pause();
  return me.barrier_result;
}

void named_barrier(int id, int threads, bool wait, Place place) {
  const char* const name = wait ? "named_barrier_sync" : "named_barrier_arrive";
  EmulatedThread& me = self();
  Resident& block = me.resident;
  if (id < 0 || id >= kBarriers)
    fault(std::string(name) + ": barrier " + std::to_string(id) + "; there are 0 to 15", place);
  if (threads <= 0 || threads % kWarpSize)
    fault(std::string(name) + ": " + std::to_string(threads) + " threads, not a multiple of 32", place);
  Barrier& barrier = block.barriers[id];
  if (barrier.arrived && barrier.expected != static_cast<unsigned>(threads))
    fault(
        std::string(name) + ": barrier " + std::to_string(id) + " for " + std::to_string(threads) +
            " threads here, for " + (barrier.expected ? std::to_string(barrier.expected) : "all") + " at " +
            describe(barrier.place),
        place);
  if (!barrier.arrived) {
    barrier.what = name;
    barrier.place = place;
    barrier.vote = BlockVote::none;
    barrier.expected = threads;
  }
  // The hardware counts whole warps: the lanes that the last one lacks come with its last thread.
  ++barrier.arrived;
  if (me.linear + 1 == block.block.threads) barrier.arrived += kWarpSize - 1 - me.lane();
  barrier.participants.push_back(&me);
  if (wait) wait_at(barrier, id, name, place);
  else on_arrival(me, id);
  if (barrier.arrived >= barrier.expected) complete(block, barrier);
  if (wait) pause();
}

}  // namespace pykern::emulator
