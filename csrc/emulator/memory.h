// The books of memory, shared by memory.cpp (bounds, initialisation), races.cpp, counters.cpp and async.cpp.
//
// All of it runs on the one thread that holds the session. A fault never returns, so nothing here may rely on a
// destructor to put the books in order: on_launch_end does.

#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "runtime.h"

namespace pykern::emulator {

constexpr size_t kPageBytes = 4096;  // of global memory, the unit in which books are made
constexpr size_t kCellBytes = 16;    // the widest access, the unit in which races are looked for

// A pointer to an object that counts its references without atomics.
template <class T>
class Ref {
 public:
  Ref() = default;
  explicit Ref(T* object) : object_(object) { keep(); }
  Ref(const Ref& other) : object_(other.object_) { keep(); }
  Ref(Ref&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Ref& operator=(Ref other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  ~Ref() {
    if (object_ && --object_->references == 0) delete object_;
  }
  T* get() const { return object_; }
  T* operator->() const { return object_; }
  T& operator*() const { return *object_; }
  explicit operator bool() const { return object_; }
  bool operator==(const Ref& other) const { return object_ == other.object_; }

 private:
  void keep() {
    if (object_) ++object_->references;
  }
  T* object_ = nullptr;
};

// Objects with stable addresses, named by index, all given back at once.
template <class T>
class Pool {
 public:
  uint32_t take() {
    if (used_ == chunks_.size() * kChunk) chunks_.emplace_back(new T[kChunk]);
    (*this)[used_] = T();
    return used_++;
  }
  T& operator[](uint32_t i) { return chunks_[i / kChunk][i % kChunk]; }
  void clear() { used_ = 0; }

 private:
  static constexpr uint32_t kChunk = 256;
  std::vector<std::unique_ptr<T[]>> chunks_;
  uint32_t used_ = 0;
};

struct Clocks;

// What is known of other blocks.
struct Others {
  unsigned references = 0;
  std::unordered_map<unsigned, Ref<Clocks>> of;  // by block
};

// What a thread knows of the threads of its block, and others. Shared, and never changed once it is shared.
struct Clocks {
  unsigned references = 0;
  unsigned visit = 0;  // the last meeting that took it in
  std::vector<uint32_t> of;    // by thread
  Ref<Others> others;
};

// One access, as races remember it. Packed by hand: with bit fields its making stalls the reads that follow.
struct Record {
  static constexpr uint64_t kUsed = 1, kWrites = 2, kAtomic = 4;

  Record() = default;
  Record(const void* pc, unsigned thread, bool writes, bool atomic, uint32_t block, uint32_t clock)
      : bits(reinterpret_cast<uint64_t>(pc) << 16 | thread << 3 | atomic * kAtomic | writes * kWrites | kUsed),
        block(block),
        clock(clock) {}

  bool used() const { return bits & kUsed; }
  bool writes() const { return bits & kWrites; }
  bool atomic() const { return bits & kAtomic; }
  unsigned thread() const { return bits >> 3 & 0x3ff; }
  const void* pc() const { return reinterpret_cast<const void*>(bits >> 16); }

  uint64_t bits = 0;
  uint32_t block = 0;
  uint32_t clock = 0;
};

// What happened to 16 bytes, or to a quarter or a sixteenth of them once a part was accessed by itself.
struct Cell {
  uint32_t epoch = 0;  // of another epoch: nothing happened yet
  uint32_t more = 0;   // 1 + index of its reads and atomics, or of its four parts
  bool split = false;
  Record write;  // the last plain one
};

// The release that an atomic carries: what the releasing thread knew at its last fence.
struct Release {
  unsigned block;
  Ref<Clocks> known;
};
using Variables = std::unordered_map<uintptr_t, std::vector<Release>>;  // by address of the atomic

struct Copy {  // cp.async on its way
  char* to;
  const char* from;
  size_t bytes, filled;
  char data[16];  // the source as it was
  const void* pc;
};

struct ThreadMemory {
  unsigned block = 0, linear = 0;
  uint32_t clock = 1;
  Ref<Clocks> known;
  Ref<Clocks> fenced;                                              // known at the last fence
  std::vector<std::pair<const std::vector<Release>*, size_t>> acquired;  // by atomics since, up to that many releases

  std::vector<std::pair<int, Ref<Clocks>>> arrivals;  // known when it arrived at a barrier at which it does not wait

  std::vector<Copy> copies;
  std::vector<size_t> groups;  // where each committed group of copies ends

  bool knows(const Record& record) const {
    if (record.block == block) return record.thread() == linear || known->of[record.thread()] >= record.clock;
    return known->others && knows_of_other(record);
  }
  bool knows_of_other(const Record& record) const;
};

// An access that is being checked.
struct Now {
  const Thread* thread;
  ThreadMemory* memory;
  uintptr_t address;
  size_t bytes;
  Access kind;
  bool atomic;  // or volatile, which polls and flags use as relaxed atomics
  const void* pc;
};

// The accesses to a piece of memory that something yet to come could race with.
class Races {
 public:
  // Faults if an earlier access is unordered with this one, and remembers it. `cells` is of the memory from `base` on.
  void see(Cell* cells, uintptr_t base, uint32_t epoch, uintptr_t address, size_t bytes, const Now& now);
  void clear() {
    reads_.clear();
    parts_.clear();
  }

 private:
  using Reads = std::array<Record, 4>;
  template <unsigned kSize>
  void see(Cell& cell, unsigned first, unsigned last, const Record& record, const Now& now);
  void see_whole(Cell& cell, const Record& record, const Now& now);
  static void keep(Reads& reads, Record record);
  void split(Cell& cell);

  Pool<Reads> reads_;
  Pool<std::array<Cell, 4>> parts_;
};

// A warp's accesses since it last converged, sorted into instructions. Lanes run one after another; the n-th time that
// a lane comes to an instruction belongs with the n-th time of every other lane.
class WarpRequests {
 public:
  void add(unsigned lane, const void* pc, bool shared, Access kind, uintptr_t address, unsigned bytes);
  void flush();
  void drop();  // forgets requests and instructions

 private:
  struct Site {
    uint64_t key;
    std::vector<uint32_t> requests;  // by how many times a lane came here
    uint32_t seen[kWarpSize];
  };
  struct Request {
    uint32_t site, nth, lanes;
    uint8_t bytes;
    bool shared, writes;
    uint32_t address[kWarpSize];
  };
  uint32_t site_of(uint64_t key);
  void grow();

  std::vector<Request> requests_;
  size_t used_ = 0;
  std::vector<Site> sites_;
  std::vector<uint32_t> table_;  // hash table of 1 + index of a site
  uint32_t next_[kWarpSize] = {};
};

struct StaticShared {
  const void* tag;
  const char* name;
  size_t begin, bytes;
};

constexpr size_t kSharedWords = kMaxSharedBytes / 64;

struct BlockMemory {
  Block* block = nullptr;
  uint32_t epoch = 0;
  std::vector<StaticShared> statics;
  size_t static_bytes = 0;  // as a GPU would lay them out
  size_t used_bytes = 0;    // of the arena, with the gaps between variables
  std::array<uint64_t, kSharedWords> initialised, pending;  // a bit a byte
  size_t pending_copies = 0;
  std::unique_ptr<Cell[]> cells{new Cell[kMaxSharedBytes / kCellBytes]};
  Races races;
  Variables variables;
  std::vector<const Thread*> threads;
  std::vector<ThreadMemory> thread_memory;
  std::vector<WarpRequests> warps;
};

struct Page {
  uint64_t initialised[kPageBytes / 64] = {};
  uint64_t read[kPageBytes / 64] = {}, written[kPageBytes / 64] = {};  // in the launch of `epoch`
  uint32_t epoch = 0;
  std::unique_ptr<Cell[]> cells;
};

struct Traffic {
  uint64_t read = 0, written = 0, unique_read = 0, unique_written = 0;
};

// Global memory that kernels may touch.
struct Region {
  uintptr_t begin, end;
  size_t granule;
  bool writable;
  bool tracked;  // not all of it was initialised when it came
  std::string name;
  uintptr_t base;  // begin, rounded down to a page
  std::vector<std::unique_ptr<Page>> pages;
  Traffic traffic;  // of this launch
};

// memory.cpp
extern std::vector<std::unique_ptr<Region>> regions;  // by address, apart from each other
extern uint32_t launch_epoch;

// `aligned`: the compiler counts on an aligned address; `polled`: a volatile access.
void touch(const void* address, size_t bytes, Access kind, bool aligned, bool polled, const void* pc);
// The parts of touch(), for copies that check now what they do later.
void touch_shared(const Now& now);
bool touch_global(const Now& now);  // false: not global memory
inline bool is_shared(const Block& block, uintptr_t address) {
  return address - reinterpret_cast<uintptr_t>(block.shared) < kMaxSharedBytes;
}
[[noreturn]] void fault_misaligned(const Now& now, size_t alignment);
inline void check_alignment(const Now& now, size_t alignment) {
  if ((alignment & (alignment - 1)) == 0 && (now.address & (alignment - 1))) fault_misaligned(now, alignment);
}
// "byte 8 of sums (shared memory)", "y[4]"
std::string describe(const Block& block, uintptr_t address);

// races.cpp
void on_atomic(Variables& variables, const Now& now);
void begin_clocks(BlockMemory& memory, unsigned threads);
extern Variables global_variables;
extern Races global_races;

// counters.cpp
extern bool counting;
void set_counting(bool on);
void count_traffic(Region& region, Page& page, size_t word, uint64_t mask, unsigned bytes, Access kind);
void begin_counts(const Launch& launch);
void end_counts(bool failed);
void count_requests(const Now& now);
void count_static_shared(size_t bytes);

// async.cpp
[[noreturn]] void fault_pending(const Now& now);

}  // namespace pykern::emulator
