// What the scheduler's parts share: threads, where they wait, and the blocks that are resident.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "collectives.h"
#include "fiber.h"
#include "launch.h"

namespace pykern::emulator {

constexpr int kBarriers = 16;

// Where a thread waits, for what, and what it brought.
struct Wait {
  enum class For : uint8_t { nothing, warp, barrier, memory, exited };
  For kind = For::nothing;
  bool orders_memory = false;
  unsigned mask = 0;  // lanes, or a barrier's number
  const char* what = nullptr;
  Place place = {};
  const void* pc = nullptr;  // of a thread that polls memory
  void* mine = nullptr;
  void (*combine)(void* const* lanes, unsigned mask) = nullptr;
};

struct Resident;

// What a switch needs lies in two cache lines.
struct alignas(64) EmulatedThread : Thread {
  EmulatedThread(Resident& resident, unsigned number) : resident(resident), fiber(number) {}

  Resident& resident;
  Wait wait;
  Fiber fiber;
  int barrier_result = 0;
  int idle_atomics = 0;  // in a row, that changed nothing
};

struct Barrier {
  unsigned arrived = 0;   // threads, those that only arrived among them
  unsigned expected = 0;  // 0: all that live
  unsigned count = 0;     // of true predicates
  BlockVote vote = BlockVote::none;
  const char* what = nullptr;
  Place place = {};
  std::vector<EmulatedThread*> waiting;
  std::vector<Thread*> participants;
};

struct Warp {
  unsigned living = 0, waiting = 0;  // lanes; waiting at a meeting of the warp
};

// A block while it runs. The objects are used again for later blocks: nothing is allocated in the long run.
struct Resident {
  Resident();
  Resident(const Resident&) = delete;
  ~Resident();

  void begin(const Launch& launch, unsigned linear);
  EmulatedThread& thread(unsigned number) const { return *threads[number]; }

  Block block = {};
  unsigned living = 0;
  std::vector<std::unique_ptr<EmulatedThread>> threads;  // block.threads of them in use
  Warp warps[kMaxThreads / kWarpSize];
  Barrier barriers[kBarriers];
};

inline EmulatedThread& self() { return *static_cast<EmulatedThread*>(running); }

// Makes the threads [first, last), given in the order in which they came, ready to run; clears their waits.
void wake(EmulatedThread* const* first, EmulatedThread* const* last);
// The running thread gives way, to go on when it has been woken.
void pause();
// Something happened for which threads that poll memory may have waited.
void note_progress();

// collectives.cpp: what the rest of a block, if it waits, has to know of a thread's end.
void leave_meetings(EmulatedThread& thread);
void meet(
    unsigned mask, void* mine, void (*combine)(void* const* lanes, unsigned mask), const char* what, Place place,
    bool orders_memory);

// report.cpp
std::string describe(const Thread& thread);
std::string describe(Place place);
std::string name_of(const void* kernel);
// Where the threads of the blocks are, one line for all that wait at the same place.
std::string where_threads_are(const std::vector<Resident*>& residents);

// watchdog.cpp
class Watchdog {
 public:
  // Calls expired() in place of the instruction of device code that runs when no thread has given way for `seconds` of
  // processor time. Device code is what lies in the library of `kernel`.
  Watchdog(const void* kernel, int seconds, void (*expired)(const void* pc));
  Watchdog(const Watchdog&) = delete;
  ~Watchdog();

 private:
  void* timer_ = nullptr;
  bool armed_ = false;
};
extern uint64_t switches;  // counts them, for the watchdog

}  // namespace pykern::emulator
