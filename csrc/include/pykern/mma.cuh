// mma.sync: matrix products of one warp on tensor cores (sm_80 and later). All 32 lanes must call together. Fragments
// come from ldmatrix (matrix.cuh) or are filled by hand; fragment.cuh says which lane holds what.
//
//   FragmentA<__nv_bfloat16> a;  FragmentB<__nv_bfloat16> b;  FragmentC<float> c = {};
//   …;  mma(c, a, b);            // c += a b
//
// The emulator multiplies exactly and adds in fp32, k ascending, C first. Tensor cores add in an order of their own and
// truncate there: results agree to some fp32 roundings, not to the bit.
//
// Hopper's wgmma takes its operands from shared memory, 64 rows a warpgroup, and is asynchronous; its accumulators are
// rows of FragmentC<float>. It stands in a header of its own.

#pragma once

#include "instruction.cuh"

#include "fragment.cuh"

#include <cstring>
#include <type_traits>

namespace pykern {

// Two numbers as one register of a fragment, rounded to nearest even.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t reg;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&reg, &pair, sizeof reg);
  } else {
    static_assert(std::is_same_v<T, __nv_bfloat16>, "16-bit operands are __half and __nv_bfloat16");
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&reg, &pair, sizeof reg);
  }
  return reg;
}

// A register of a tf32 fragment: x rounded to nearest, ties away from zero. mma truncates where it is given more bits.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t reg;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(reg) : "f"(x));
  return reg;
#else
  return emulator::round_to_tf32(x);
#endif
}

// Accumulators of two products side by side as the A of the next, as P in softmax(Q K) V: no data moves between lanes.
template <class T>
__device__ __forceinline__ FragmentA<T> to_a(const FragmentC<float>& left, const FragmentC<float>& right) {
  return {
      {pack<T>(left.x[0], left.x[1]), pack<T>(left.x[2], left.x[3]), pack<T>(right.x[0], right.x[1]),
       pack<T>(right.x[2], right.x[3])}};
}

// c += a b for T of __half, __nv_bfloat16 (m16n8k16) and Tf32 (m16n8k8).
template <class T>
__device__ __forceinline__ void mma(
    FragmentC<float>& c, const FragmentA<T>& a, const FragmentB<T>& b PYKERN_CALLER) {
#ifdef __CUDACC__
#define PYKERN_MMA(shape_and_types)                                                                           \
  asm volatile("mma.sync.aligned." shape_and_types " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])                                       \
               : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]))
  if constexpr (std::is_same_v<T, __half>) {
    PYKERN_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    PYKERN_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  } else {
    static_assert(std::is_same_v<T, Tf32>, "operands are __half, __nv_bfloat16 or Tf32");
    PYKERN_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  }
#undef PYKERN_MMA
#else
  constexpr auto kOperand = std::is_same_v<T, __half> ? emulator::Operand::f16
      : std::is_same_v<T, __nv_bfloat16>              ? emulator::Operand::bf16
                                                      : emulator::Operand::tf32;
  emulator::mma(kOperand, c.x, a.reg, b.reg, place);
#endif
}

// The same with accumulators of fp16.
__device__ __forceinline__ void mma(
    FragmentC<__half>& c, const FragmentA<__half>& a, const FragmentB<__half>& b PYKERN_CALLER) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
               : "+r"(c.reg[0]), "+r"(c.reg[1])
               : "r"(a.reg[0]), "r"(a.reg[1]), "r"(a.reg[2]), "r"(a.reg[3]), "r"(b.reg[0]), "r"(b.reg[1]));
#else
  emulator::mma_half(c.reg, a.reg, b.reg, place);
#endif
}

}  // namespace pykern
