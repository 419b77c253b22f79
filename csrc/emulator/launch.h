// How a launcher starts a kernel on the emulator; cuda/launch.h wraps it.

#pragma once

#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace pykern::emulator {

struct Settings {
  uint64_t seed = 0;          // of the schedule and of the order of blocks
  int order = 0;              // 0: random, 1: ascending, 2: descending threads and blocks
  int multiprocessors = 4;    // of the device that is emulated
  int watchdog_seconds = 10;  // of processor time for which a thread may run and meet no other; 0: any
};
Settings& settings();

// Runs body once for every thread; throws std::runtime_error at the first fault. `kernel` is the address that names it.
void launch(
    const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes, const std::function<void()>& body);

int blocks_per_multiprocessor(unsigned threads, size_t shared_bytes);

}  // namespace pykern::emulator
