// The emulator's settings, for Python through ctypes.

#include <cstdint>
#include <cstring>

#include "launch.h"
#include "memory.h"

namespace pykern::emulator {

Settings& settings() {
  static Settings settings;
  return settings;
}

}  // namespace pykern::emulator

// 0 when it is set, 1 for a name or a value that cannot be.
extern "C" int pykern_emulator_set(const char* name, int64_t value) {
  pykern::emulator::Settings& settings = pykern::emulator::settings();
  const auto is = [&](const char* known, int64_t first, int64_t last) {
    return std::strcmp(name, known) == 0 && value >= first && value <= last;
  };
  if (is("seed", INT64_MIN, INT64_MAX)) settings.seed = static_cast<uint64_t>(value);
  else if (is("order", 0, 2)) settings.order = static_cast<int>(value);
  else if (is("multiprocessors", 1, 1024)) settings.multiprocessors = static_cast<int>(value);
  else if (is("watchdog_seconds", 0, 1 << 20)) settings.watchdog_seconds = static_cast<int>(value);
  else if (is("counting", 0, 1)) pykern::emulator::set_counting(value);
  else return 1;
  return 0;
}
