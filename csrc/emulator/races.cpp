// Races: two accesses to one byte, one of which writes, that no barrier and no fence with an atomic puts in order.
//
// Every thread counts a clock, and keeps what it knows of the clocks of others. A meeting makes all participants know
// what any of them knew. What a thread knows is never changed in place, so the participants of a barrier share it.

#include "memory.h"

namespace pykern::emulator {

Variables global_variables;
Races global_races;

namespace {

constexpr unsigned kParts = 4;  // a cell splits into so many

unsigned visits = 0;

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& other) {
  for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

void learn(Others& others, unsigned block, const Ref<Clocks>& known) {
  Ref<Clocks>& mine = others.of[block];
  if (!mine) {
    mine = known;
  } else if (!(mine == known)) {
    Ref<Clocks> both(new Clocks(*mine));
    join(both->of, known->of);
    mine = both;
  }
}

// What `into` knows of other blocks, to be changed.
Others& own_others(Ref<Others>& own, const Clocks& into) {
  if (!own) {
    own = Ref<Others>(into.others ? new Others{0, into.others->of} : new Others);
  }
  return *own;
}

void learn_all(Ref<Others>& own, Clocks& into, const Ref<Others>& from, unsigned own_block) {
  if (!from || from == into.others) return;
  for (const auto& [block, known] : from->of) {
    if (block == own_block) join(into.of, known->of);
    else learn(own_others(own, into), block, known);
  }
}

Ref<Clocks> copy_of(const Clocks& clocks) {
  Ref<Clocks> copy(new Clocks);
  copy->of = clocks.of;
  copy->others = clocks.others;
  return copy;
}

const char* name_of(const Record& record) {
  if (record.atomic()) return "atomic";
  return record.writes() ? "write" : "read";
}

std::string thread_of(unsigned block, unsigned thread) {
  return "thread " + std::to_string(thread) + " of block " + std::to_string(block);
}

[[noreturn]] void fault_race(const Record& before, const Record& record, const Now& now) {
  fault("race: " + std::string(name_of(record)) + " of " + describe(*now.thread->block, now.address) + " at " +
      locate(now.pc) + " by " + thread_of(record.block, record.thread()) + " and " + name_of(before) + " at " +
      locate(before.pc()) + " by " +
      thread_of(before.block, before.thread()) + " are in no order", now.pc);
}

bool conflict(const Record& a, const Record& b) { return (a.writes() || b.writes()) && !(a.atomic() && b.atomic()); }

bool same_kind(const Record& a, const Record& b) {
  return ((a.bits ^ b.bits) & (Record::kWrites | Record::kAtomic)) == 0;
}

uint64_t rank(const Record& record) { return uint64_t{record.block} << 10 | record.thread(); }

}  // namespace

bool ThreadMemory::knows_of_other(const Record& record) const {
  const auto other = known->others->of.find(record.block);
  return other != known->others->of.end() && other->second->of[record.thread()] >= record.clock;
}

void begin_clocks(BlockMemory& memory, unsigned threads) {
  Ref<Clocks> nothing(new Clocks);
  nothing->of.resize(threads);
  memory.thread_memory.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    ThreadMemory& thread = memory.thread_memory[i];
    thread.block = memory.block->linear;
    thread.linear = i;
    thread.clock = 1;
    thread.fenced = {};
    thread.acquired.clear();
    thread.arrivals.clear();
    thread.copies.clear();
    thread.groups.clear();
    thread.known = nothing;
  }
}

void on_arrival(Thread& thread, int barrier) {
  ThreadMemory& memory = *thread.memory;
  const Ref<Clocks> known = copy_of(*memory.known);
  known->of[memory.linear] = memory.clock++;
  memory.arrivals.emplace_back(barrier, known);
}

void on_meeting(Block& block, std::span<Thread* const> participants, int barrier) {
  if (participants.size() < 2) return;
  ++visits;
  Ref<Clocks> all;
  Ref<Others> others;
  const auto take_in = [&](Clocks& known) {
    if (std::exchange(known.visit, visits) == visits) return;
    if (!all) {
      all = copy_of(known);
      return;
    }
    join(all->of, known.of);
    learn_all(others, *all, known.others, block.linear);
  };
  const auto arrival_of = [&](ThreadMemory& memory) {
    return std::find_if(
        memory.arrivals.begin(), memory.arrivals.end(), [&](const auto& other) { return other.first == barrier; });
  };
  for (const Thread* participant : participants) {
    ThreadMemory& memory = *participant->memory;
    const auto arrival = arrival_of(memory);
    take_in(arrival == memory.arrivals.end() ? *memory.known : *arrival->second);
  }
  if (others) all->others = others;
  for (const Thread* participant : participants)
    if (arrival_of(*participant->memory) == participant->memory->arrivals.end())
      all->of[participant->linear] = participant->memory->clock++;
  for (const Thread* participant : participants) {
    ThreadMemory& memory = *participant->memory;
    // Who only arrived tells, and learns nothing.
    if (const auto arrival = arrival_of(memory); arrival != memory.arrivals.end()) memory.arrivals.erase(arrival);
    else memory.known = all;
  }
}

// Fences make atomics order more than themselves: what a thread did before its fence and then an atomic, another knows
// after an atomic on the same address and then its fence.
void on_fence(Thread& thread) {
  ThreadMemory& memory = *thread.memory;
  Ref<Clocks> known = copy_of(*memory.known);
  Ref<Others> others;
  for (const auto& [releases, count] : memory.acquired) {
    for (size_t i = 0; i < count; ++i) {
      const Release& release = (*releases)[i];
      if (release.block == memory.block) join(known->of, release.known->of);
      else learn(own_others(others, *known), release.block, release.known);
      learn_all(others, *known, release.known->others, memory.block);
    }
  }
  memory.acquired.clear();
  if (others) known->others = others;
  known->of[memory.linear] = memory.clock++;
  memory.known = known;
  memory.fenced = memory.known;
}

void on_atomic(Variables& variables, const Now& now) {
  ThreadMemory& memory = *now.memory;
  std::vector<Release>& releases = variables[now.address];
  if (now.kind != Access::write && !releases.empty()) {
    const auto known = std::find_if(
        memory.acquired.begin(), memory.acquired.end(), [&](const auto& other) { return other.first == &releases; });
    if (known == memory.acquired.end()) memory.acquired.emplace_back(&releases, releases.size());
    else known->second = releases.size();
  }
  if (now.kind != Access::read && memory.fenced && (releases.empty() || !(releases.back().known == memory.fenced)))
    releases.push_back({memory.block, memory.fenced});
}

void Races::split(Cell& cell) {
  const uint32_t parts = parts_.take();
  for (Cell& part : parts_[parts]) {
    part.epoch = cell.epoch;
    part.write = cell.write;
    if (!cell.more) continue;
    part.more = 1 + reads_.take();
    reads_[part.more - 1] = reads_[cell.more - 1];
  }
  cell.split = true;
  cell.more = 1 + parts;
}

void Races::see_whole(Cell& cell, const Record& record, const Now& now) {
  if (cell.write.used() && !now.memory->knows(cell.write) && conflict(cell.write, record))
    fault_race(cell.write, record, now);
  const bool plain_write = record.writes() && !record.atomic();
  if (!cell.more) {
    if (plain_write) {
      cell.write = record;
    } else {
      cell.more = 1 + reads_.take();
      reads_[cell.more - 1][0] = record;
    }
    return;
  }
  Reads& reads = reads_[cell.more - 1];
  for (Record& before : reads) {
    if (!before.used()) continue;
    if (same_kind(before, record) && before.clock == record.clock && rank(before) == rank(record)) return;
    if (now.memory->knows(before)) {
      // What races with it races with this one, which comes after it.
      if (same_kind(before, record)) before = {};
    } else if (conflict(before, record)) {
      fault_race(before, record, now);
    }
  }
  if (plain_write) {
    reads = {};
    cell.write = record;
  } else {
    keep(reads, record);
  }
}

// Of many that are in no order the first thread and the last are kept, and two others: a meeting of neighbours cannot
// make a later write come after these and yet not after all.
void Races::keep(Reads& reads, Record record) {
  const auto put = [&](Record& place) {
    std::swap(place, record);
    return !record.used();
  };
  if (!reads[0].used() || rank(record) < rank(reads[0]))
    if (put(reads[0])) return;
  if (!reads[1].used() || rank(record) > rank(reads[1]))
    if (put(reads[1])) return;
  put(reads[!reads[2].used() || (reads[3].used() && record.thread() % 2) ? 2 : 3]);
}

// Sees bytes [first, last) of a cell of kSize bytes.
template <unsigned kSize>
void Races::see(Cell& cell, unsigned first, unsigned last, const Record& record, const Now& now) {
  if (!cell.split) {
    if (last - first == kSize) return see_whole(cell, record, now);
    split(cell);
  }
  if constexpr (constexpr unsigned kPart = kSize / kParts; kPart > 0) {
    std::array<Cell, kParts>& parts = parts_[cell.more - 1];
    for (unsigned i = first / kPart; i * kPart < last; ++i)
      see<kPart>(
          parts[i], std::max(first, i * kPart) - i * kPart, std::min(last, (i + 1) * kPart) - i * kPart, record, now);
  }
}

void Races::see(Cell* cells, uintptr_t base, uint32_t epoch, uintptr_t address, size_t bytes, const Now& now) {
  const ThreadMemory& memory = *now.memory;
  const Record record(now.pc, memory.linear, now.kind != Access::read, now.atomic, memory.block, memory.clock);
  for (size_t at = address - base, end = at + bytes; at < end;) {
    const size_t begin = at - at % kCellBytes, stop = std::min(end, begin + kCellBytes);
    Cell& cell = cells[begin / kCellBytes];
    if (cell.epoch != epoch) {
      cell = Cell();
      cell.epoch = epoch;
    }
    see<kCellBytes>(cell, at - begin, stop - begin, record, now);
    at = stop;
  }
}

}  // namespace pykern::emulator
