// Source lines of program counters, from the debug information through addr2line: the innermost line of device code,
// and where that is a helper in a header, the line of the other file that calls it.

#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <sstream>

#include "memory.h"

extern char** environ;

namespace pykern::emulator {
namespace {

std::string hexadecimal(uintptr_t address) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<size_t>(address));
  return text;
}

// The program itself has no name; /proc/self would be the child's.
std::string file_of(const link_map& object) {
  return *object.l_name ? object.l_name : "/proc/" + std::to_string(getpid()) + "/exe";
}

// The output of `addr2line -i`: the frames that were inlined into each other, innermost first.
std::string ask(std::string file, uintptr_t offset) {
  int ends[2];
  if (pipe(ends)) return "";
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  posix_spawn_file_actions_addclose(&actions, ends[0]);
  std::string address = hexadecimal(offset);
  char name[] = "addr2line", inlines[] = "-i", from[] = "-e";
  char* const arguments[] = {name, inlines, from, file.data(), address.data(), nullptr};
  pid_t child;
  const bool started = posix_spawnp(&child, name, &actions, nullptr, arguments, environ) == 0;
  posix_spawn_file_actions_destroy(&actions);
  close(ends[1]);
  std::string out;
  char buffer[512];
  for (ssize_t n; started && (n = read(ends[0], buffer, sizeof buffer)) > 0;) out.append(buffer, n);
  close(ends[0]);
  if (started) waitpid(child, nullptr, 0);
  return out;
}

bool ends_with(const std::string& text, const char* end) {
  const std::string tail = end;
  return text.size() >= tail.size() && text.compare(text.size() - tail.size(), tail.size(), tail) == 0;
}

// Whether a file is a kernel's, not a header of CUDA's or of ours that stands for one.
bool is_device_code(const std::string& file) {
  for (const char* wrapper : {"pykern/mma.cuh", "pykern/matrix.cuh", "pykern/copy_async.cuh"})
    if (ends_with(file, wrapper)) return false;
  return (ends_with(file, ".cuh") || ends_with(file, ".cu")) && file.find("/targets/") == std::string::npos &&
      file.find("/cuda/include/") == std::string::npos;
}

std::string shown(const std::string& file) {
  const size_t root = file.rfind("/csrc/");
  if (root != std::string::npos) return file.substr(root + 1);
  return file.substr(file.rfind('/') + 1);
}

}  // namespace

std::string locate(const void* pc) {
  static std::unordered_map<const void*, std::string> cache;
  if (const auto known = cache.find(pc); known != cache.end()) return known->second;
  // A return address: the call before it is what is meant.
  const auto address = reinterpret_cast<uintptr_t>(pc) - 1;
  std::string best = hexadecimal(address);
  Dl_info info;
  link_map* object = nullptr;
  if (dladdr1(reinterpret_cast<void*>(address), &info, reinterpret_cast<void**>(&object), RTLD_DL_LINKMAP) && object) {
    std::istringstream frames(ask(file_of(*object), address - object->l_addr));
    bool found = false;
    std::string device;  // file of the innermost frame in device code
    for (std::string frame; std::getline(frames, frame);) {
      frame = frame.substr(0, frame.find(" (discriminator"));
      const size_t colon = frame.rfind(':');
      if (colon == std::string::npos || frame.front() == '?' || ends_with(frame, ":?")) continue;
      const std::string file = frame.substr(0, colon);
      if (!found) best = shown(file) + frame.substr(colon);
      found = true;
      if (!is_device_code(file) || file == device) continue;
      if (!device.empty()) {
        best += ", called at " + shown(file) + frame.substr(colon);
        break;
      }
      best = shown(file) + frame.substr(colon);
      device = file;
    }
  }
  return cache[pc] = best;
}

}  // namespace pykern::emulator
