// What g++ calls before every access of code compiled with -fsanitize=thread. Linked here instead of libtsan, these see
// each plain `p[i] = x` of device code. Launchers are compiled the same way; outside kernels nothing is looked at.

#include "memory.h"

#pragma GCC visibility push(default)

namespace {

using pykern::emulator::Access;

inline void see(const void* address, size_t bytes, Access kind, const void* pc) {
  if (pykern::emulator::running) pykern::emulator::touch(address, bytes, kind, true, false, pc);
}

inline void see_unaligned(const void* address, size_t bytes, Access kind, const void* pc) {
  if (pykern::emulator::running) pykern::emulator::touch(address, bytes, kind, false, false, pc);
}

// A thread that polls a flag must let the others run; before it looks, so that what it then sees is checked.
inline void see_volatile(const void* address, size_t bytes, Access kind, bool aligned, const void* pc) {
  const pykern::emulator::Thread* const thread = pykern::emulator::running;
  if (!thread) return;
  const auto on_stack = [&](const void* p) { return p >= thread->stack_begin && p < thread->stack_end; };
  if (kind == Access::read && on_stack(__builtin_frame_address(0)) && !on_stack(address))
    pykern::emulator::give_way(pc);
  pykern::emulator::touch(address, bytes, kind, aligned, true, pc);
}

}  // namespace

extern "C" {

void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

#define PYKERN_HOOKS(bytes)                                                             \
  void __tsan_read##bytes(void* p) {                                                    \
    see(p, bytes, Access::read, __builtin_return_address(0));                           \
  }                                                                                     \
  void __tsan_write##bytes(void* p) {                                                   \
    see(p, bytes, Access::write, __builtin_return_address(0));                          \
  }                                                                                     \
  void __tsan_unaligned_read##bytes(void* p) {                                          \
    see_unaligned(p, bytes, Access::read, __builtin_return_address(0));                 \
  }                                                                                     \
  void __tsan_unaligned_write##bytes(void* p) {                                         \
    see_unaligned(p, bytes, Access::write, __builtin_return_address(0));                \
  }                                                                                     \
  void __tsan_volatile_read##bytes(void* p) {                                           \
    see_volatile(p, bytes, Access::read, true, __builtin_return_address(0));            \
  }                                                                                     \
  void __tsan_volatile_write##bytes(void* p) {                                          \
    see_volatile(p, bytes, Access::write, true, __builtin_return_address(0));           \
  }                                                                                     \
  void __tsan_unaligned_volatile_read##bytes(void* p) {                                 \
    see_volatile(p, bytes, Access::read, false, __builtin_return_address(0));           \
  }                                                                                     \
  void __tsan_unaligned_volatile_write##bytes(void* p) {                                \
    see_volatile(p, bytes, Access::write, false, __builtin_return_address(0));          \
  }
PYKERN_HOOKS(1)
PYKERN_HOOKS(2)
PYKERN_HOOKS(4)
PYKERN_HOOKS(8)
PYKERN_HOOKS(16)

void __tsan_read_range(void* p, size_t bytes) { see_unaligned(p, bytes, Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { see_unaligned(p, bytes, Access::write, __builtin_return_address(0)); }

// g++ turns std::atomic and the reference counts of launchers into these. Nothing uses those of 16 bytes.
#define PYKERN_ATOMIC_RMW(bits, type, name)                                                  \
  type __tsan_atomic##bits##_##name(volatile type* p, type value, int) {                     \
    see(const_cast<type*>(p), sizeof(type), Access::atomic, __builtin_return_address(0));    \
    return __atomic_##name(p, value, __ATOMIC_SEQ_CST);                                      \
  }
#define PYKERN_ATOMIC_CAS(bits, type, name, weak)                                                    \
  int __tsan_atomic##bits##_compare_exchange_##name(                                                 \
      volatile type* p, type* expected, type desired, int, int) {                                    \
    see(const_cast<type*>(p), sizeof(type), Access::atomic, __builtin_return_address(0));            \
    return __atomic_compare_exchange_n(p, expected, desired, weak, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
#define PYKERN_ATOMIC(bits, type)                                                                              \
  type __tsan_atomic##bits##_load(const volatile type* p, int) {                                               \
    see_volatile(const_cast<const type*>(p), sizeof(type), Access::read, true, __builtin_return_address(0));   \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                               \
  }                                                                                                            \
  void __tsan_atomic##bits##_store(volatile type* p, type value, int) {                                        \
    see_volatile(const_cast<type*>(p), sizeof(type), Access::write, true, __builtin_return_address(0));        \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                            \
  type __tsan_atomic##bits##_exchange(volatile type* p, type value, int) {                                     \
    see(const_cast<type*>(p), sizeof(type), Access::atomic, __builtin_return_address(0));                      \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                            \
  type __tsan_atomic##bits##_compare_exchange_val(volatile type* p, type expected, type desired, int, int) {   \
    see(const_cast<type*>(p), sizeof(type), Access::atomic, __builtin_return_address(0));                      \
    __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);             \
    return expected;                                                                                           \
  }                                                                                                            \
  PYKERN_ATOMIC_CAS(bits, type, strong, false)                                                                 \
  PYKERN_ATOMIC_CAS(bits, type, weak, true)                                                                    \
  PYKERN_ATOMIC_RMW(bits, type, fetch_add)                                                                     \
  PYKERN_ATOMIC_RMW(bits, type, fetch_sub)                                                                     \
  PYKERN_ATOMIC_RMW(bits, type, fetch_and)                                                                     \
  PYKERN_ATOMIC_RMW(bits, type, fetch_or)                                                                      \
  PYKERN_ATOMIC_RMW(bits, type, fetch_xor)                                                                     \
  PYKERN_ATOMIC_RMW(bits, type, fetch_nand)
PYKERN_ATOMIC(8, unsigned char)
PYKERN_ATOMIC(16, unsigned short)
PYKERN_ATOMIC(32, unsigned)
PYKERN_ATOMIC(64, unsigned long)

void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
void __tsan_atomic_signal_fence(int) { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

}  // extern "C"

#pragma GCC visibility pop
