#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <utility>

#include "scheduler.h"

namespace pykern::emulator {

__thread Thread* running = nullptr;
uint64_t switches = 0;

namespace {

// Rounds in which every thread that could run polled memory and none did anything else, before they are taken to wait
// for ever.
constexpr int kIdleRounds = 10000;

enum Order { kRandom, kAscending, kDescending };

struct Failure {
  std::string what, place;
  const void* pc = nullptr;
  Thread* thread = nullptr;
};

// Of the launch in progress; one at a time in a process.
struct State {
  const Launch* launch = nullptr;
  const std::function<void()>* body = nullptr;
  int order = kRandom;
  uint64_t random = 0;
  Fiber main;
  std::vector<std::unique_ptr<Resident>> pool;
  std::vector<Resident*> residents;
  std::vector<unsigned> blocks;  // still to run, the next one last
  std::vector<EmulatedThread*> ready, polling;
  Resident* finished = nullptr;
  bool progress = false;  // since the last round of polling
  std::optional<Failure> failure;
};
State state;

// A linear congruential generator, of which the upper half is taken: it is as quick as it is good enough for schedules.
uint32_t random_below(size_t n) {
  state.random = state.random * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>((state.random >> 32) * n >> 32);
}

// The thread to run next; a random one, or the one made ready last, so that a thread and its warp get as far as they
// can before others. Null when the launching thread has to look.
EmulatedThread* next_thread() {
  std::vector<EmulatedThread*>& ready = state.ready;
  if (state.finished || ready.empty()) return nullptr;
  if (state.order == kRandom) std::swap(ready[random_below(ready.size())], ready.back());
  EmulatedThread* const thread = ready.back();
  ready.pop_back();
  return thread;
}

void switch_away(EmulatedThread& me) {
  ++switches;
  EmulatedThread* const next = next_thread();
  if (next == &me) {
    running = next;
    return;
  }
  running = next;
  me.fiber.switch_to(next ? next->fiber : state.main);
}

[[noreturn, gnu::cold]] void abandon(Failure failure) {
  if (!running) {
    if (failure.pc) failure.place = locate(failure.pc);
    throw std::runtime_error("CUDA emulator: " + failure.what + "\n  at " + failure.place);
  }
  EmulatedThread& me = self();
  failure.thread = &me;
  state.failure = std::move(failure);
  running = nullptr;
  me.fiber.switch_to(state.main);
  __builtin_unreachable();
}

void expired(const void* pc) {
  fault("the thread runs on and meets no other: an endless loop? (emulator setting watchdog_seconds)", pc);
}

// A fiber's whole life.
void thread_main() {
  Fiber::arrived();
  std::string thrown;
  try {
    (*state.body)();
  } catch (const std::exception& error) {
    thrown = std::string("exception in a kernel: ") + error.what();
  } catch (...) {
    thrown = "exception in a kernel";
  }
  EmulatedThread& me = self();
  if (!thrown.empty()) abandon({.what = std::move(thrown), .place = "a place that is not known"});
  me.wait = {.kind = Wait::For::exited};
  leave_meetings(me);
  state.progress = true;
  if (!me.resident.living) state.finished = &me.resident;
  switch_away(me);
  __builtin_unreachable();
}

void begin_block() {
  if (state.pool.empty()) state.pool.push_back(std::make_unique<Resident>());
  state.residents.push_back(state.pool.back().release());
  state.pool.pop_back();
  Resident& resident = *state.residents.back();
  resident.begin(*state.launch, state.blocks.back());
  state.blocks.pop_back();
  on_block(resident.block);
  EmulatedThread* threads[kMaxThreads];
  for (unsigned i = 0; i < resident.block.threads; ++i) {
    on_thread(resident.thread(i));
    threads[i] = &resident.thread(i);
  }
  if (state.order == kDescending) std::reverse(threads, threads + resident.block.threads);
  wake(threads, threads + resident.block.threads);
}

void end_block(Resident& resident) {
  on_block_end(resident.block);
  state.residents.erase(std::find(state.residents.begin(), state.residents.end(), &resident));
  state.pool.emplace_back(&resident);
}

[[noreturn]] void report(const std::string& what) {
  throw std::runtime_error("CUDA emulator: " + what + "\n  kernel " + state.launch->kernel);
}

[[noreturn]] void report(const Failure& failure) {
  const std::string place = failure.pc ? locate(failure.pc) : failure.place;
  report(failure.what + "\n  at " + place + "\n  " + describe(*failure.thread));
}

void run_blocks(size_t capacity) {
  int idle = 0;
  while (true) {
    if (EmulatedThread* const thread = next_thread()) {
      running = thread;
      state.main.switch_to(thread->fiber);
      if (state.failure) report(*state.failure);
    } else if (state.finished) {
      end_block(*std::exchange(state.finished, nullptr));
    } else if (state.residents.empty()) {
      if (state.blocks.empty()) return;
      begin_block();
    } else if (state.polling.empty()) {
      report("deadlock: no thread can go on\n" + where_threads_are(state.residents));
    } else if (!state.blocks.empty() && state.residents.size() < capacity) {
      begin_block();
      state.progress = true;
    } else {
      idle = std::exchange(state.progress, false) ? 0 : idle + 1;
      if (idle > kIdleRounds)
        report(
            (state.blocks.empty() ? std::string("threads poll memory that nothing changes any more\n")
                                  : "blocks wait for blocks which cannot be resident: " + std::to_string(capacity) +
                     " blocks fill the device, and " + std::to_string(state.blocks.size()) +
                     " start when one of them ends\n") +
            where_threads_are(state.residents));
      EmulatedThread* const* const polling = state.polling.data();
      wake(polling, polling + state.polling.size());
      state.polling.clear();
    }
  }
}

void check_launch(dim3 grid, dim3 block, size_t shared_bytes) {
  const auto check = [&](bool good, const std::string& what) {
    if (!good) throw std::runtime_error("CUDA emulator: invalid configuration: " + what);
  };
  const auto text = [](dim3 d) {
    return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  };
  check(
      grid.x && grid.y && grid.z && grid.x <= 0x7fffffffu && grid.y <= 65535 && grid.z <= 65535,
      "the grid is " + text(grid) + " blocks, from (1, 1, 1) to (2147483647, 65535, 65535) can be");
  check(
      block.x && block.y && block.z && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
          uint64_t{block.x} * block.y * block.z <= kMaxThreads,
      "a block is " + text(block) + " threads, from (1, 1, 1) to (1024, 1024, 64) and 1024 in all can be");
  check(uint64_t{grid.x} * grid.y * grid.z <= 0xffffffffu, "the emulator runs at most 4294967295 blocks");
  check(
      shared_bytes <= kMaxSharedBytes, std::to_string(shared_bytes) + " bytes of dynamic shared memory, at most " +
          std::to_string(kMaxSharedBytes) + " can be");
}

// Blocks in the reverse of their order: the next one is the last.
void order_blocks(size_t count) {
  state.blocks.resize(count);
  std::iota(state.blocks.begin(), state.blocks.end(), 0u);
  if (state.order == kAscending) std::reverse(state.blocks.begin(), state.blocks.end());
  if (state.order == kRandom)
    for (size_t i = count; i > 1; --i) std::swap(state.blocks[i - 1], state.blocks[random_below(i)]);
}

// The state as between launches, whatever became of the last one; fibers that were abandoned never go on.
void clear() {
  running = nullptr;
  for (Resident* resident : state.residents) state.pool.emplace_back(resident);
  state.residents.clear();
  state.blocks.clear();
  state.ready.clear();
  state.polling.clear();
  state.finished = nullptr;
  state.failure.reset();
  state.launch = nullptr;
}

}  // namespace

Resident::Resident() {
  block.shared = static_cast<char*>(std::aligned_alloc(128, kMaxSharedBytes));
  if (!block.shared) throw std::bad_alloc();
}

Resident::~Resident() { std::free(block.shared); }

void Resident::begin(const Launch& launch, unsigned linear) {
  block.launch = &launch;
  block.linear = linear;
  const unsigned row = linear / launch.grid.x;
  block.index = {linear % launch.grid.x, row % launch.grid.y, row / launch.grid.y};
  block.threads = living = launch.block.x * launch.block.y * launch.block.z;
  for (unsigned i = static_cast<unsigned>(threads.size()); i < block.threads; ++i)
    threads.push_back(std::make_unique<EmulatedThread>(*this, i));
  uint3 index = {0, 0, 0};
  for (unsigned i = 0; i < block.threads; ++i) {
    EmulatedThread& thread = *threads[i];
    thread.block = &block;
    thread.index = index;
    thread.linear = i;
    thread.stack_begin = thread.fiber.stack_begin();
    thread.stack_end = thread.fiber.stack_end();
    thread.wait = {};
    thread.idle_atomics = 0;
    thread.fiber.start(thread_main);
    if (++index.x < launch.block.x) continue;
    index.x = 0;
    if (++index.y < launch.block.y) continue;
    index.y = 0;
    ++index.z;
  }
  for (unsigned w = 0; w * kWarpSize < block.threads; ++w)
    warps[w] = {.living = ~0u >> (kWarpSize - std::min(kWarpSize, block.threads - w * kWarpSize))};
  for (Barrier& barrier : barriers) {
    barrier.arrived = barrier.count = 0;
    barrier.waiting.clear();
    barrier.participants.clear();
  }
}

void wake(EmulatedThread* const* first, EmulatedThread* const* last) {
  while (last != first) {
    EmulatedThread* const thread = *--last;
    thread->wait.kind = Wait::For::nothing;
    state.ready.push_back(thread);
  }
}

void pause() { switch_away(self()); }

void give_way(const void* pc) {
  EmulatedThread& me = self();
  me.wait = {.kind = Wait::For::memory, .pc = pc};
  state.polling.push_back(&me);
  switch_away(me);
}

void note_progress() { state.progress = true; }

void fault(const std::string& what, const void* pc) { abandon({.what = what, .place = {}, .pc = pc}); }
void fault(const std::string& what, Place place) { abandon({.what = what, .place = describe(place)}); }

void launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  check_launch(grid, block, shared_bytes);
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const Launch launch = {name_of(kernel), grid, block, shared_bytes};
  state.launch = &launch;
  state.body = &body;
  state.order = settings().order;
  state.random = (settings().seed + 1) * 0x9e3779b97f4a7c15u;  // near seeds, states far apart
  order_blocks(size_t{grid.x} * grid.y * grid.z);
  const size_t capacity = std::max(settings().multiprocessors, 1) *
      static_cast<size_t>(blocks_per_multiprocessor(block.x * block.y * block.z, shared_bytes));
  on_launch(launch);
  try {
    const Watchdog watchdog(kernel, settings().watchdog_seconds, expired);
    run_blocks(capacity);
  } catch (...) {
    clear();
    on_launch_end(launch, true);
    throw;
  }
  clear();
  on_launch_end(launch, false);
}

int blocks_per_multiprocessor(unsigned threads, size_t shared_bytes) {
  constexpr size_t kWarps = 64, kBlocks = 32, kShared = 228 * 1024, kReserved = 1024;
  const size_t warps = std::max(1u, (threads + kWarpSize - 1) / kWarpSize);
  return static_cast<int>(std::max<size_t>(
      1, std::min({kWarps / warps, kBlocks, kShared / (shared_bytes + kReserved)})));
}

}  // namespace pykern::emulator
