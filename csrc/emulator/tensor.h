// Tensor-core and asynchronous-copy instructions on the emulator. Device code reaches them through the wrappers of
// include/pykern, which document them. They are compiled without the hooks: they read other lanes' registers.

#pragma once

#include "runtime.h"

namespace pykern::emulator {

[[gnu::const]] int lane_id();  // a thread never changes it

enum class Operand : uint8_t { f16, bf16, tf32 };

// c += a b; of each the running lane's registers.
void mma(Operand operand, float* c, const uint32_t* a, const uint32_t* b, Place caller);
void mma_half(uint32_t* c, const uint32_t* a, const uint32_t* b, Place caller);

void ldmatrix(uint32_t* reg, unsigned count, bool transposed, const void* row, Place caller);
void stmatrix(const uint32_t* reg, unsigned count, bool transposed, void* row, Place caller);

void cp_async(void* to, const void* from, int bytes, int filled);

uint32_t round_to_tf32(float x);

}  // namespace pykern::emulator
