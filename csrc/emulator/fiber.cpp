#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <stdexcept>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifndef __x86_64__
#error "pykern's CUDA emulator switches fibers on x86-64 only: port pykern_switch_stack and Fiber::start"
#endif

// Keeps what a call must keep (but not the floating-point modes, which no kernel changes). A jump and not a return at
// the end: the processor predicts returns from its own stack of calls, which a switch puts out of step.
asm(R"(
.text
.p2align 4
.globl pykern_switch_stack
.hidden pykern_switch_stack
.type pykern_switch_stack, @function
pykern_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size pykern_switch_stack, .-pykern_switch_stack
)");

namespace pykern::emulator {
namespace {

constexpr size_t kPage = 4096, kLine = 64;

}  // namespace

Fiber::Fiber(unsigned colour) {
  // One page that must not be touched below the stack, and one more for the colour.
  void* const mapped = mmap(
      nullptr, kStackBytes + 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED || mprotect(mapped, kPage, PROT_NONE) != 0)
    throw std::runtime_error(
        "CUDA emulator: no memory for the stacks of so many resident threads; emulate fewer multiprocessors");
  mapped_ = static_cast<char*>(mapped);
  stack_ = mapped_ + kPage;
  top_ = mapped_ + 2 * kPage + kStackBytes - colour * 3 * kLine % kPage;
}

Fiber::~Fiber() {
  if (mapped_) munmap(mapped_, kStackBytes + 2 * kPage);
}

void Fiber::start(void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(stack_, top_ - stack_);
#endif
  void** sp = reinterpret_cast<void**>(top_);
  *--sp = nullptr;  // alignment as after a call, and the end for debuggers
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  sp_ = sp;
}

void Fiber::arrived() {
#ifdef __SANITIZE_ADDRESS__
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (came_from_->mapped_) return;
  came_from_->stack_ = static_cast<const char*>(bottom);  // the launching thread's, to name it when returning there
  came_from_->top_ = static_cast<char*>(const_cast<void*>(bottom)) + size;
#endif
}

}  // namespace pykern::emulator
