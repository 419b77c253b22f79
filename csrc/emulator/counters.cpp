// What a kernel asks of memory: bytes, requests, sectors, bank conflicts. pykern_emulator_counters gives it as JSON.

#include <cstring>
#include <deque>

#include "memory.h"

namespace pykern::emulator {

bool counting = false;
void set_counting(bool on) { counting = on; }

namespace {

constexpr size_t kMaxLaunches = 10000;
constexpr uint32_t kMaxRequests = 1 << 16;  // of a warp that does not converge
constexpr unsigned kBanks = 32;
constexpr unsigned kWordBytes = 4;
constexpr unsigned kSectorBytes = 32;

struct Counts {
  std::string kernel;
  dim3 grid, block;
  size_t dynamic_shared = 0, static_shared = 0;
  std::vector<std::pair<std::string, Traffic>> regions;
  uint64_t read_requests = 0, write_requests = 0, read_sectors = 0, write_sectors = 0;
  uint64_t shared_wavefronts = 0, shared_wavefronts_ideal = 0, barriers = 0;
  double tensor_flops = 0;
};
Counts current;
std::deque<Counts> finished;

uint64_t distinct_sectors(const uint32_t* addresses, uint32_t lanes, unsigned bytes) {
  uint32_t sectors[2 * kWarpSize];
  unsigned count = 0;
  bool sorted = true;
  const auto add = [&](uint32_t sector) {
    if (count && sectors[count - 1] == sector) return;
    sorted &= !count || sectors[count - 1] < sector;
    sectors[count++] = sector;
  };
  for (; lanes; lanes &= lanes - 1) {
    const uint32_t address = addresses[__builtin_ctz(lanes)];
    add(address / kSectorBytes);
    add((address + bytes - 1) / kSectorBytes);
  }
  if (sorted) return count;
  std::sort(sectors, sectors + count);
  return std::unique(sectors, sectors + count) - sectors;
}

// How often the banks must be asked for what these lanes want: the most distinct words in one bank.
unsigned wavefronts(const uint32_t* addresses, uint32_t lanes, unsigned bytes) {
  uint32_t words[kBanks][kWarpSize];
  unsigned counts[kBanks] = {}, most = 0;
  for (; lanes; lanes &= lanes - 1) {
    const uint32_t address = addresses[__builtin_ctz(lanes)];
    for (uint32_t word = address / kWordBytes; word <= (address + bytes - 1) / kWordBytes; ++word) {
      const unsigned bank = word % kBanks;
      uint32_t* const end = words[bank] + counts[bank];
      if (std::find(words[bank], end, word) != end) continue;
      *end = word;
      most = std::max(most, ++counts[bank]);
    }
  }
  return most;
}

void append(std::string& json, const char* name, uint64_t value) {
  json += std::string(", \"") + name + "\": " + std::to_string(value);
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + '"';
}

std::string list(const dim3& d) {
  return "[" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + "]";
}

std::string json_of(const Counts& counts) {
  std::string json = "{\"kernel\": " + quoted(counts.kernel) + ", \"grid\": " + list(counts.grid) +
      ", \"block\": " + list(counts.block);
  append(json, "dynamic_shared", counts.dynamic_shared);
  append(json, "static_shared", counts.static_shared);
  json += ", \"regions\": {";
  const char* separator = "";
  for (const auto& [name, traffic] : counts.regions) {
    json += separator + quoted(name) + ": {\"read\": " + std::to_string(traffic.read);
    append(json, "written", traffic.written);
    append(json, "unique_read", traffic.unique_read);
    append(json, "unique_written", traffic.unique_written);
    json += "}";
    separator = ", ";
  }
  json += "}";
  append(json, "read_requests", counts.read_requests);
  append(json, "write_requests", counts.write_requests);
  append(json, "read_sectors", counts.read_sectors);
  append(json, "write_sectors", counts.write_sectors);
  append(json, "shared_wavefronts", counts.shared_wavefronts);
  append(json, "shared_wavefronts_ideal", counts.shared_wavefronts_ideal);
  append(json, "barriers", counts.barriers);
  append(json, "tensor_flops", static_cast<uint64_t>(counts.tensor_flops));
  return json + "}";
}

}  // namespace

uint32_t WarpRequests::site_of(uint64_t key) {
  if (table_.size() < 2 * (sites_.size() + 1)) grow();
  size_t i = key * 0x9e3779b97f4a7c15u >> 32;
  for (;; ++i) {
    uint32_t& slot = table_[i % table_.size()];
    if (!slot) {
      sites_.push_back({key, {}, {}});
      return (slot = sites_.size()) - 1;
    }
    if (sites_[slot - 1].key == key) return slot - 1;
  }
}

void WarpRequests::grow() {
  table_.assign(std::max<size_t>(64, 2 * table_.size()), 0);
  for (size_t s = 0; s < sites_.size(); ++s) {
    size_t i = sites_[s].key * 0x9e3779b97f4a7c15u >> 32;
    while (table_[i % table_.size()]) ++i;
    table_[i % table_.size()] = s + 1;
  }
}

void WarpRequests::add(
    unsigned lane, const void* pc, bool shared, Access kind, uintptr_t address, unsigned bytes) {
  const uint64_t key = reinterpret_cast<uint64_t>(pc) << 3 | (kind != Access::read) << 1 | shared;
  uint32_t& next = next_[lane];
  // Lanes mostly do the same in the same order.
  if (next >= used_ || sites_[requests_[next].site].key != key ||
      requests_[next].nth != sites_[requests_[next].site].seen[lane]) {
    const uint32_t number = site_of(key);
    Site& site = sites_[number];
    const uint32_t nth = site.seen[lane];
    if (nth < site.requests.size()) {
      next = site.requests[nth];
    } else {
      if (used_ == kMaxRequests) {
        flush();
        return add(lane, pc, shared, kind, address, bytes);
      }
      if (used_ == requests_.size()) requests_.emplace_back();
      Request& request = requests_[used_];
      request.site = number;
      request.nth = nth;
      request.lanes = 0;
      request.bytes = bytes;
      request.shared = shared;
      request.writes = kind != Access::read;
      site.requests.push_back(used_);
      next = used_++;
    }
  }
  Request& request = requests_[next++];
  ++sites_[request.site].seen[lane];
  request.lanes |= 1u << lane;
  request.address[lane] = address;
}

void WarpRequests::flush() {
  for (size_t i = 0; i < used_; ++i) {
    const Request& request = requests_[i];
    Site& site = sites_[request.site];
    if (!site.requests.empty()) {
      site.requests.clear();
      std::memset(site.seen, 0, sizeof site.seen);
    }
    if (!request.shared) {
      (request.writes ? current.write_requests : current.read_requests) += 1;
      (request.writes ? current.write_sectors : current.read_sectors) +=
          distinct_sectors(request.address, request.lanes, request.bytes);
      continue;
    }
    // The banks give 128 bytes at a time: wider accesses go by half or quarter warps.
    const unsigned together = request.bytes <= 4 ? 32 : request.bytes <= 8 ? 16 : 8;
    for (unsigned first = 0; first < kWarpSize; first += together) {
      const uint32_t lanes = request.lanes & (~0u >> (32 - together)) << first;
      if (!lanes) continue;
      current.shared_wavefronts += wavefronts(request.address, lanes, request.bytes);
      current.shared_wavefronts_ideal += 1;
    }
  }
  used_ = 0;
  std::memset(next_, 0, sizeof next_);
}

void WarpRequests::drop() {
  used_ = 0;
  sites_.clear();
  std::fill(table_.begin(), table_.end(), 0);
  std::memset(next_, 0, sizeof next_);
}

void count_requests(const Now& now) {
  const Thread& thread = *now.thread;
  WarpRequests& requests = thread.block->memory->warps[thread.warp()];
  const bool shared = is_shared(*thread.block, now.address);
  for (uintptr_t at = now.address, end = at + now.bytes; at < end;) {
    const uintptr_t stop = now.bytes <= 16 ? end : std::min(end, at - at % 16 + 16);
    requests.add(thread.lane(), now.pc, shared, now.kind, at, stop - at);
    at = stop;
  }
}

void count_traffic(Region& region, Page& page, size_t word, uint64_t mask, unsigned bytes, Access kind) {
  if (page.epoch != launch_epoch) {
    page.epoch = launch_epoch;
    std::memset(page.read, 0, sizeof page.read);
    std::memset(page.written, 0, sizeof page.written);
  }
  const auto mark = [&](uint64_t& seen) {
    const uint64_t fresh = mask & ~seen;
    seen |= mask;
    return fresh == mask ? bytes : fresh ? __builtin_popcountll(fresh) : 0;
  };
  if (kind != Access::write) {
    region.traffic.read += bytes;
    region.traffic.unique_read += mark(page.read[word]);
  }
  if (kind != Access::read) {
    region.traffic.written += bytes;
    region.traffic.unique_written += mark(page.written[word]);
  }
}

void count_static_shared(size_t bytes) { current.static_shared = std::max(current.static_shared, bytes); }
void count_tensor_flops(double flops) { current.tensor_flops += flops; }
void count_barrier() { ++current.barriers; }

void on_converged(Block& block, unsigned warp) {
  if (counting) block.memory->warps[warp].flush();
}

void begin_counts(const Launch& launch) {
  current = Counts();
  current.kernel = launch.kernel;
  current.grid = launch.grid;
  current.block = launch.block;
  current.dynamic_shared = launch.dynamic_shared_bytes;
  for (const auto& region : regions) region->traffic = {};
}

void end_counts(bool failed) {
  if (failed || !counting) return;
  for (const auto& region : regions)
    if (region->traffic.read || region->traffic.written) current.regions.emplace_back(region->name, region->traffic);
  finished.push_back(std::move(current));
  if (finished.size() > kMaxLaunches) finished.pop_front();
}

}  // namespace pykern::emulator

// The launches since the last reset, as JSON that holds until the next call.
extern "C" __attribute__((visibility("default"))) const char* pykern_emulator_counters(int reset) {
  static std::string json;
  json = "[";
  for (const auto& counts : pykern::emulator::finished) {
    if (json.size() > 1) json += ",\n";
    json += pykern::emulator::json_of(counts);
  }
  json += "]";
  if (reset) pykern::emulator::finished.clear();
  return json.c_str();
}
