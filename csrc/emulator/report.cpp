#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <bitset>
#include <cstdlib>
#include <cstring>
#include <map>
#include <tuple>
#include <unordered_map>

#include "scheduler.h"

namespace pykern::emulator {
namespace {

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

using Threads = std::bitset<kMaxThreads>;

// "warps 0-2, warp 3 lanes 0-15"
std::string ranges(const Threads& threads, unsigned count) {
  const auto full = [&](unsigned warp) {
    for (unsigned t = warp * kWarpSize; t < std::min(count, (warp + 1) * kWarpSize); ++t)
      if (!threads[t]) return false;
    return true;
  };
  const auto span = [](unsigned first, unsigned last, const char* noun) {
    return std::string(noun) + (first == last ? " " : "s ") + std::to_string(first) +
        (first == last ? "" : "-" + std::to_string(last));
  };
  const unsigned warps = (count + kWarpSize - 1) / kWarpSize;
  std::string out;
  const auto add = [&](const std::string& part) { out += (out.empty() ? "" : ", ") + part; };
  for (unsigned w = 0; w < warps; ++w) {
    if (full(w)) {
      const unsigned first = w;
      while (w + 1 < warps && full(w + 1)) ++w;
      add(span(first, w, "warp"));
      continue;
    }
    std::string lanes;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!threads[w * kWarpSize + lane]) continue;
      const unsigned first = lane;
      while (lane + 1 < kWarpSize && threads[w * kWarpSize + lane + 1]) ++lane;
      lanes += (lanes.empty() ? " " : " and ") + span(first, lane, "lane");
    }
    if (!lanes.empty()) add("warp " + std::to_string(w) + lanes);
  }
  return out;
}

std::string describe(const Wait& wait) {
  char mask[16];
  switch (wait.kind) {
    case Wait::For::nothing: return "could run";
    case Wait::For::exited: return "exited";
    case Wait::For::memory: return "polls memory" + (wait.pc ? " at " + locate(wait.pc) : "");
    case Wait::For::barrier:
      return std::string(wait.what) + (wait.mask ? " of barrier " + std::to_string(wait.mask) : "") + " at " +
          describe(wait.place);
    case Wait::For::warp:
      snprintf(mask, sizeof mask, "0x%08x", wait.mask);
      return std::string(wait.what) + " with mask " + mask + " at " + describe(wait.place);
  }
  __builtin_unreachable();
}

}  // namespace

std::string describe(const Thread& thread) {
  return "thread " + text(thread.index) + ", which is warp " + std::to_string(thread.warp()) + " lane " +
      std::to_string(thread.lane()) + ", of block " + text(thread.block->index);
}

std::string describe(Place place) {
  const std::string file = place.file;
  const size_t source = file.rfind("csrc/"), folder = file.rfind('/');
  const size_t start = source != std::string::npos ? source : folder != std::string::npos ? folder + 1 : 0;
  return file.substr(start) + ":" + std::to_string(place.line);
}

std::string name_of(const void* kernel) {
  static std::unordered_map<const void*, std::string> names;  // under the launch's lock
  const auto [entry, is_new] = names.try_emplace(kernel);
  if (!is_new) return entry->second;
  Dl_info info;
  if (!dladdr(kernel, &info) || !info.dli_sname || info.dli_saddr != kernel)
    return entry->second = "at " + locate(kernel);
  int status = 0;
  char* const demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  entry->second = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  return entry->second;
}

std::string where_threads_are(const std::vector<Resident*>& residents) {
  constexpr size_t kBlocks = 4;
  std::string out;
  for (size_t r = 0; r < std::min(residents.size(), kBlocks); ++r) {
    const Resident& resident = *residents[r];
    using Key = std::tuple<Wait::For, const void*, std::string, unsigned, unsigned>;
    std::map<Key, std::pair<const Wait*, Threads>> groups;
    for (unsigned t = 0; t < resident.block.threads; ++t) {
      const Wait& wait = resident.thread(t).wait;
      const std::string at = (wait.what ? wait.what : "") + std::string(wait.place.file ? wait.place.file : "");
      auto& group = groups[{wait.kind, wait.pc, at, wait.place.line, wait.mask}];
      group.first = &wait;
      group.second.set(t);
    }
    out += "  block " + text(resident.block.index) + ":\n";
    for (const auto& [key, group] : groups)
      out += "    " + ranges(group.second, resident.block.threads) + ": " + describe(*group.first) + "\n";
  }
  if (residents.size() > kBlocks) out += "  and " + std::to_string(residents.size() - kBlocks) + " more blocks\n";
  out.pop_back();
  return out;
}

}  // namespace pykern::emulator
