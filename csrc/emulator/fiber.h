// Fibers: stacks of their own, switched in user space on one thread. A switch mostly waits for the cache lines of the
// stack that it goes to, so functions that switch have small frames.

#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" __attribute__((visibility("hidden"))) void pykern_switch_stack(void** from, void* to);

namespace pykern::emulator {

constexpr size_t kStackBytes = 64 * 1024;

// A point of execution. One made without a stack stands for the stack that it is first switched away from.
class Fiber {
 public:
  Fiber() = default;
  // Fibers of different colours keep the tops of their stacks in different cache sets.
  explicit Fiber(unsigned colour);
  Fiber(const Fiber&) = delete;
  ~Fiber();

  // Makes the next switch to it call entry, which must not return. What was on the stack is forgotten.
  void start(void (*entry)());

  // Goes on in `to`; returns when something switches back.
  void switch_to(Fiber& to);
  // The first thing that entry does.
  static void arrived();

  const char* stack_begin() const { return stack_; }
  const char* stack_end() const { return top_; }

 private:
  void* sp_ = nullptr;
  char* mapped_ = nullptr;
  const char* stack_ = nullptr;
  char* top_ = nullptr;
#ifdef __SANITIZE_ADDRESS__
  void* fake_stack_ = nullptr;
  static inline Fiber* came_from_ = nullptr;
#endif
};

inline void Fiber::switch_to(Fiber& to) {
#ifdef __SANITIZE_ADDRESS__
  came_from_ = this;
  __sanitizer_start_switch_fiber(&fake_stack_, to.stack_, to.top_ - to.stack_);
#endif
  pykern_switch_stack(&sp_, to.sp_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

}  // namespace pykern::emulator
