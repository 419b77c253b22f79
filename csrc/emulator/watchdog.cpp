#include <csignal>
#include <ctime>
#include <dlfcn.h>
#include <link.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <stdexcept>

#include "scheduler.h"

namespace pykern::emulator {
namespace {

constexpr int kTicksASecond = 20;

struct Watched {
  uintptr_t begin, end;  // of the code
  int patience, ticks;
  uint64_t switches;
  void (*expired)(const void* pc);
  const void* pc;
};
Watched watched;

void go_to_expired() { watched.expired(watched.pc); }

// Only device code is cut short: the emulator's own and the C library's may hold a lock.
void tick(int, siginfo_t*, void* context) {
  if (!running) return;
  if (watched.switches != switches) {
    watched.switches = switches;
    watched.ticks = 0;
    return;
  }
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const uintptr_t pc = static_cast<uintptr_t>(registers[REG_RIP]);
  if (++watched.ticks < watched.patience || pc < watched.begin || pc >= watched.end) return;
  constexpr greg_t kRedZone = 128;
  watched.pc = reinterpret_cast<const void*>(pc + 1);  // as a return address, past the instruction
  registers[REG_RSP] = ((registers[REG_RSP] - kRedZone) & ~greg_t{15}) - 8;  // as after a call
  registers[REG_RIP] = reinterpret_cast<greg_t>(&go_to_expired);
}

struct Range {
  uintptr_t inside, begin, end;
};

int find_code(dl_phdr_info* info, size_t, void* data) {
  Range& range = *static_cast<Range*>(data);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = info->dlpi_phdr[i];
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr;
    if (part.p_type != PT_LOAD || range.inside < begin || range.inside >= begin + part.p_memsz) continue;
    range.begin = begin;
    range.end = begin + part.p_memsz;
    return 1;
  }
  return 0;
}

int watchdog_signal() {
  static const int number = [] {
    struct sigaction action = {};
    action.sa_sigaction = tick;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    const int number = SIGRTMIN + 7;
    sigaction(number, &action, nullptr);
    return number;
  }();
  return number;
}

}  // namespace

Watchdog::Watchdog(const void* kernel, int seconds, void (*expired)(const void* pc)) {
  Range range = {reinterpret_cast<uintptr_t>(kernel), 0, 0};
  if (seconds <= 0 || !dl_iterate_phdr(find_code, &range)) return;
  watched = {range.begin, range.end, seconds * kTicksASecond, 0, switches, expired, nullptr};
  sigevent event = {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = watchdog_signal();
  event._sigev_un._tid = static_cast<pid_t>(syscall(SYS_gettid));
  if (timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) != 0) {
    timer_ = nullptr;
    throw std::runtime_error("CUDA emulator: no timer for the watchdog");
  }
  armed_ = true;
  const timespec period = {0, 1000000000 / kTicksASecond};
  const itimerspec when = {period, period};
  timer_settime(timer_, 0, &when, nullptr);
}

Watchdog::~Watchdog() {
  if (armed_) timer_delete(timer_);
}

}  // namespace pykern::emulator
