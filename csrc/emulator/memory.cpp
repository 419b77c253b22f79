// Which memory a kernel may touch, and whether it holds anything yet.

#include "memory.h"

#include <link.h>
#include <pthread.h>

#include <cstring>
#include <mutex>

namespace pykern::emulator {

std::vector<std::unique_ptr<Region>> regions;
uint32_t launch_epoch = 0;

namespace {

constexpr size_t kGap = 128;  // between variables in shared memory, so that running over the end of one is seen

std::recursive_mutex session_lock;
int session_depth = 0;

uint32_t block_epoch = 0;
std::vector<Block*> live_blocks;
std::vector<std::shared_ptr<BlockMemory>> spare;  // books of blocks that ended

struct Range {
  uintptr_t begin = 0, end = 0;
  bool holds(uintptr_t address, size_t bytes) const {
    return address >= begin && address <= end && bytes <= end - address;
  }
};
Range host_stack;  // of the thread that launched: kernel arguments are there
std::vector<Range> constants;
uint32_t constants_epoch = 0;

// f(word, mask, bytes) for each word of a bitmap with a bit a byte.
template <class F>
void for_words(size_t begin, size_t bytes, F f) {
  while (bytes) {
    const size_t shift = begin % 64, n = std::min(bytes, 64 - shift);
    f(begin / 64, (~uint64_t{0} >> (64 - n)) << shift, n);
    begin += n;
    bytes -= n;
  }
}

Page& page_of(Region& region, uintptr_t address) {
  std::unique_ptr<Page>& page = region.pages[(address - region.base) / kPageBytes];
  if (!page) page = std::make_unique<Page>();
  return *page;
}

// f(page, word, mask, bytes) for the bytes of a region.
template <class F>
void for_pages(Region& region, uintptr_t begin, size_t bytes, F f) {
  while (bytes) {
    const size_t offset = begin % kPageBytes, n = std::min(bytes, kPageBytes - offset);
    Page& page = page_of(region, begin);
    for_words(offset, n, [&](size_t word, uint64_t mask, size_t bytes) { f(page, word, mask, bytes); });
    begin += n;
    bytes -= n;
  }
}

std::string count_of(size_t bytes) { return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes"); }

const char* name_of(Access kind) {
  return kind == Access::read ? "read" : kind == Access::write ? "write" : "atomic";
}

std::string request_of(const Now& now) { return std::string(name_of(now.kind)) + " of " + count_of(now.bytes); }

template <class Memory>
size_t distance(const Memory& memory, uintptr_t address) {
  if (address >= memory.end) return address - memory.end;
  if (address < memory.begin) return memory.begin - address;
  return 0;
}

// Of a region or a part of shared memory.
template <class Memory>
[[noreturn]] void fault_outside(const Memory& memory, const Now& now) {
  std::string where;
  if (now.address < memory.begin) where = "begins " + count_of(memory.begin - now.address) + " before the start";
  else if (now.address >= memory.end) where = "begins " + count_of(now.address - memory.end) + " past the end";
  else where = "ends " + count_of(now.address + now.bytes - memory.end) + " past the end";
  fault(
      "out of bounds: " + request_of(now) + " that " + where + " of " + memory.name + " (" +
          count_of(memory.end - memory.begin) + ")",
      now.pc);
}

// Constant tables, and the constants that the compiler makes, are in segments that cannot be written.
int find_constants(dl_phdr_info* info, size_t, void*) {
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& segment = info->dlpi_phdr[i];
    if ((segment.p_type == PT_LOAD && !(segment.p_flags & PF_W)) || segment.p_type == PT_GNU_RELRO) {
      const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
      constants.push_back({begin, begin + segment.p_memsz});
    }
  }
  return 0;
}

bool is_constant(uintptr_t address, size_t bytes) {
  const auto found = [&] {
    return std::any_of(constants.begin(), constants.end(), [&](const Range& r) { return r.holds(address, bytes); });
  };
  if (found()) return true;
  if (constants_epoch == launch_epoch) return false;
  constants_epoch = launch_epoch;  // a library may have been loaded since
  constants.clear();
  dl_iterate_phdr(find_constants, nullptr);
  return found();
}

// Memory that is neither the block's shared memory nor wholly inside of a region.
void touch_elsewhere(const Now& now) {
  if (now.kind == Access::read && (host_stack.holds(now.address, now.bytes) || is_constant(now.address, now.bytes)))
    return;
  const Region* nearest = nullptr;
  for (const auto& region : regions)
    if (!nearest || distance(*region, now.address) < distance(*nearest, now.address)) nearest = region.get();
  if (nearest && distance(*nearest, now.address) == 0) fault_outside(*nearest, now);
  for (const Block* block : live_blocks) {
    if (is_shared(*block, now.address))
      fault("out of bounds: " + request_of(now) + " in the shared memory of another block", now.pc);
    for (const Thread* thread : block->memory->threads) {
      const auto begin = reinterpret_cast<uintptr_t>(thread->stack_begin);
      if (now.address - begin < static_cast<size_t>(thread->stack_end - thread->stack_begin))
        fault("out of bounds: " + request_of(now) + " in the local memory of another thread, " +
            std::to_string(thread->linear) + " of block " + std::to_string(block->linear), now.pc);
    }
  }
  if (now.address < kPageBytes) fault("out of bounds: " + request_of(now) + " through a null pointer", now.pc);
  if (!nearest) fault("out of bounds: " + request_of(now) + ", and there is no global memory", now.pc);
  constexpr size_t kNear = 1 << 20;  // further off, the distance says nothing
  if (distance(*nearest, now.address) > kNear)
    fault("out of bounds: " + request_of(now) + " in no tensor that the launcher named; the nearest is " +
        nearest->name, now.pc);
  fault_outside(*nearest, now);
}

// The region in which an instruction was last.
struct Guess {
  uint32_t epoch = 0;
  Region* region = nullptr;
};
Guess guesses[64];

Region* find(uintptr_t address, size_t bytes, const void* pc = nullptr) {
  Guess& guess = guesses[reinterpret_cast<uintptr_t>(pc) * 0x9e3779b97f4a7c15u >> 58];
  if (guess.epoch == launch_epoch && address >= guess.region->begin && address < guess.region->end &&
      bytes <= guess.region->end - address)
    return guess.region;
  auto after = std::upper_bound(
      regions.begin(), regions.end(), address, [](uintptr_t a, const auto& region) { return a < region->begin; });
  if (after == regions.begin()) return nullptr;
  Region* const region = (after - 1)->get();
  if (address >= region->end || bytes > region->end - address) return nullptr;
  guess = {launch_epoch, region};
  return region;
}

// The part of shared memory that holds the address, or that ends or begins nearest to it.
struct Part {
  uintptr_t begin, end;
  std::string name;
};

Part nearest_part(const Block& block, uintptr_t address) {
  const auto shared = reinterpret_cast<uintptr_t>(block.shared);
  Part best = {shared, shared + block.launch->dynamic_shared_bytes, "dynamic shared memory"};
  bool any = block.launch->dynamic_shared_bytes;
  for (const StaticShared& variable : block.memory->statics) {
    const uintptr_t begin = shared + variable.begin;
    const Part part = {begin, begin + variable.bytes, std::string(variable.name) + " in shared memory"};
    if (!any || distance(part, address) < distance(best, address)) best = part;
    any = true;
  }
  return best;
}

void check_shared_bounds(const Block& block, const Now& now) {
  const size_t offset = now.address - reinterpret_cast<uintptr_t>(block.shared);
  const size_t end = offset + now.bytes;
  if (end <= block.launch->dynamic_shared_bytes) return;
  for (const StaticShared& variable : block.memory->statics)
    if (offset >= variable.begin && end <= variable.begin + variable.bytes) return;
  const Part part = nearest_part(block, now.address);
  if (part.begin == part.end)
    fault("out of bounds: " + request_of(now) + " in shared memory, of which the kernel has none", now.pc);
  fault_outside(part, now);
}

[[noreturn]] void fault_uninitialised(uintptr_t address, const Now& now) {
  fault("uninitialised: " + request_of(now) + " at " + describe(*now.thread->block, address) +
      ", which nothing has written", now.pc);
}

// Widens a region to take in another; what was written of either stays known.
void take_in(Region& into, Region& other) {
  for (size_t i = 0; i < other.pages.size(); ++i) {
    if (!other.pages[i] || !other.tracked) continue;
    Page& page = page_of(into, other.base + i * kPageBytes);
    for (size_t w = 0; w < std::size(page.initialised); ++w) page.initialised[w] |= other.pages[i]->initialised[w];
  }
}

std::unique_ptr<Region> make_region(uintptr_t begin, uintptr_t end, size_t granule, bool writable, bool tracked) {
  auto region = std::make_unique<Region>();
  region->begin = begin;
  region->end = end;
  region->granule = std::max<size_t>(granule, 1);
  region->writable = writable;
  region->tracked = tracked;
  region->base = begin - begin % kPageBytes;
  region->pages.resize((end - region->base + kPageBytes - 1) / kPageBytes);
  return region;
}

void initialise(Region& region, uintptr_t begin, uintptr_t end, bool value) {
  for_pages(region, begin, end - begin, [&](Page& page, size_t word, uint64_t mask, size_t) {
    if (value) page.initialised[word] |= mask;
    else page.initialised[word] &= ~mask;
  });
}

void find_host_stack() {
  thread_local Range own;
  if (!own.end) {
    pthread_attr_t attributes;
    void* begin = nullptr;
    size_t bytes = 0;
    if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
      pthread_attr_getstack(&attributes, &begin, &bytes);
      pthread_attr_destroy(&attributes);
    }
    own = {reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + bytes};
  }
  host_stack = own;
}

}  // namespace

std::string describe(const Block& block, uintptr_t address) {
  if (is_shared(block, address)) {
    const Part part = nearest_part(block, address);
    return "byte " + std::to_string(address - part.begin) + " of " + part.name;
  }
  const Region* const region = find(address, 1);
  if (!region) return "memory that is not the kernel's";
  return region->name + "[" + std::to_string((address - region->begin) / region->granule) + "]";
}

void fault_misaligned(const Now& now, size_t alignment) {
  fault("misaligned: " + request_of(now) + " at " + describe(*now.thread->block, now.address) + ", " +
      count_of(now.address % alignment) + " past a multiple of " + std::to_string(alignment), now.pc);
}

void touch_shared(const Now& now) {
  const Block& block = *now.thread->block;
  BlockMemory& memory = *block.memory;
  check_shared_bounds(block, now);
  const auto base = reinterpret_cast<uintptr_t>(block.shared);
  for_words(now.address - base, now.bytes, [&](size_t word, uint64_t mask, size_t) {
    if (memory.pending_copies && (memory.pending[word] & mask)) fault_pending(now);
    uint64_t& initialised = memory.initialised[word];
    if (now.kind != Access::write && (initialised & mask) != mask)
      fault_uninitialised(base + word * 64 + __builtin_ctzll(~initialised & mask), now);
    if (now.kind != Access::read) initialised |= mask;
  });
  if (now.kind == Access::atomic) on_atomic(memory.variables, now);
  memory.races.see(memory.cells.get(), base, memory.epoch, now.address, now.bytes, now);
}

bool touch_global(const Now& now) {
  Region* const region = find(now.address, now.bytes, now.pc);
  if (!region) return false;
  if (now.kind != Access::read && !region->writable)
    fault(std::string(now.kind == Access::write ? "writes" : "atomic on") + " its input " +
        describe(*now.thread->block, now.address), now.pc);
  for_pages(*region, now.address, now.bytes, [&](Page& page, size_t word, uint64_t mask, size_t bytes) {
    if (region->tracked) {
      uint64_t& initialised = page.initialised[word];
      if (now.kind != Access::write && (initialised & mask) != mask) {
        const uintptr_t page_begin = now.address - now.address % kPageBytes;
        const uintptr_t first = page_begin + word * 64 + __builtin_ctzll(~initialised & mask);
        fault_uninitialised(first < now.address ? first + kPageBytes : first, now);
      }
      if (now.kind != Access::read) initialised |= mask;
    }
    if (counting) count_traffic(*region, page, word, mask, bytes, now.kind);
  });
  if (!region->writable) return true;
  if (now.atomic) on_atomic(global_variables, now);
  for (uintptr_t at = now.address, end = at + now.bytes; at < end;) {
    Page& page = page_of(*region, at);
    if (!page.cells) page.cells.reset(new Cell[kPageBytes / kCellBytes]);
    const uintptr_t page_begin = at - at % kPageBytes, stop = std::min(end, page_begin + kPageBytes);
    global_races.see(page.cells.get(), page_begin, launch_epoch, at, stop - at, now);
    at = stop;
  }
  return true;
}

void touch(const void* pointer, size_t bytes, Access kind, bool aligned, bool polled, const void* pc) {
  const Thread* const thread = running;
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto stack = reinterpret_cast<uintptr_t>(thread->stack_begin);
  const size_t stack_bytes = thread->stack_end - thread->stack_begin;
  if (address - stack < stack_bytes) return;
  // Launchers on other threads of the process come here too while a kernel runs.
  if (reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) - stack >= stack_bytes) return;
  if (bytes == 0) return;

  const bool shared = is_shared(*thread->block, address);
  const bool atomic = kind == Access::atomic || (polled && !shared);
  const Now now = {thread, thread->memory.get(), address, bytes, kind, atomic, pc};
  if (aligned && bytes <= 16) check_alignment(now, bytes);
  if (shared) touch_shared(now);
  else if (!touch_global(now)) return touch_elsewhere(now);
  if (counting) count_requests(now);
}

void access(const void* address, size_t bytes, Access kind, const void* pc) {
  if (running) touch(address, bytes, kind, true, false, pc);
}

void* static_shared(const void* tag, const char* name, size_t bytes, size_t alignment) {
  Block& block = *running->block;
  BlockMemory& memory = *block.memory;
  for (const StaticShared& variable : memory.statics)
    if (variable.tag == tag) return block.shared + variable.begin;
  const void* const pc = __builtin_return_address(0);
  const auto round_up = [](size_t n, size_t to) { return (n + to - 1) / to * to; };
  memory.static_bytes = round_up(memory.static_bytes, alignment) + bytes;
  if (memory.static_bytes > kMaxStaticSharedBytes)
    fault("shared memory: with " + std::string(name) + " there are " + count_of(memory.static_bytes) +
        " in static variables; a kernel may have " + std::to_string(kMaxStaticSharedBytes), pc);
  size_t begin = round_up(memory.used_bytes + kGap, std::max(kGap, alignment));
  if (begin + bytes > kMaxSharedBytes) begin = round_up(memory.used_bytes, alignment);
  if (begin + bytes > kMaxSharedBytes)
    fault("shared memory: with " + std::string(name) + " the block needs more than " +
        count_of(kMaxSharedBytes), pc);
  memory.statics.push_back({tag, name, begin, bytes});
  memory.used_bytes = begin + bytes;
  std::memset(block.shared + begin, 0xff, bytes);
  count_static_shared(memory.static_bytes);
  return block.shared + begin;
}

void on_launch(const Launch& launch) {
  ++launch_epoch;
  find_host_stack();
  global_races.clear();
  global_variables.clear();
  begin_counts(launch);
}

void on_launch_end(const Launch&, bool failed) {
  end_counts(failed);
  for (Block* block : live_blocks) {
    for (WarpRequests& warp : block->memory->warps) warp.drop();
    spare.push_back(std::move(block->memory));
  }
  live_blocks.clear();
}

void on_block(Block& block) {
  if (spare.empty()) spare.push_back(std::make_shared<BlockMemory>());
  block.memory = std::move(spare.back());
  spare.pop_back();
  BlockMemory& memory = *block.memory;
  // Only what the last user of these books had needs to be forgotten.
  const size_t words = (std::max(memory.used_bytes, block.launch->dynamic_shared_bytes) + 63) / 64;
  if (memory.epoch) {
    std::fill_n(memory.initialised.begin(), words, 0);
    std::fill_n(memory.pending.begin(), words, 0);
  } else {
    memory.initialised = {};
    memory.pending = {};
  }
  memory.block = &block;
  memory.epoch = ++block_epoch;
  memory.statics.clear();
  memory.static_bytes = 0;
  memory.used_bytes = block.launch->dynamic_shared_bytes;
  memory.pending_copies = 0;
  memory.races.clear();
  memory.variables.clear();
  memory.threads.clear();
  memory.warps.resize((block.threads + kWarpSize - 1) / kWarpSize);
  for (WarpRequests& warp : memory.warps) warp.drop();
  begin_clocks(memory, block.threads);
  std::memset(block.shared, 0xff, block.launch->dynamic_shared_bytes);
  live_blocks.push_back(&block);
}

void on_block_end(Block& block) {
  if (counting)
    for (WarpRequests& warp : block.memory->warps) warp.flush();
  std::erase(live_blocks, &block);
  spare.push_back(std::move(block.memory));
}

void on_thread(Thread& thread) {
  Block& block = *thread.block;
  ThreadMemory& memory = block.memory->thread_memory[thread.linear];
  thread.memory = std::shared_ptr<ThreadMemory>(block.memory, &memory);
  block.memory->threads.push_back(&thread);
}

void session_begin() {
  session_lock.lock();
  ++session_depth;
}

void session_end() {
  if (--session_depth == 0) regions.clear();
  session_lock.unlock();
}

// Views of one tensor may lie inside of each other: regions that overlap become one, with the larger rights.
void add_region(const void* pointer, size_t bytes, size_t granule, bool writable, bool initialised, const char* name) {
  if (bytes == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(pointer), end = begin + bytes;
  std::vector<std::unique_ptr<Region>> overlapping;
  auto first = std::find_if(regions.begin(), regions.end(), [&](const auto& r) { return r->end > begin; });
  auto last = std::find_if(first, regions.end(), [&](const auto& r) { return r->begin >= end; });
  if (last - first == 1 && (*first)->begin <= begin && (*first)->end >= end) {
    (*first)->writable |= writable;
    return;
  }
  overlapping.insert(overlapping.end(), std::make_move_iterator(first), std::make_move_iterator(last));
  const auto at = regions.erase(first, last);

  uintptr_t low = begin, high = end;
  bool tracked = !initialised;
  for (const auto& region : overlapping) {
    low = std::min(low, region->begin);
    high = std::max(high, region->end);
    writable |= region->writable;
    tracked |= region->tracked;
  }
  auto merged = make_region(low, high, granule, writable, tracked);
  merged->name = name;
  if (tracked && initialised) initialise(*merged, begin, end, true);
  for (const auto& region : overlapping) {
    if (region->name != name) merged->name = region->name + "/" + merged->name;
    if (tracked) initialise(*merged, region->begin, region->end, !region->tracked);
    take_in(*merged, *region);
  }
  regions.insert(at, std::move(merged));
}

}  // namespace pykern::emulator
