// What each lane of a warp holds of the operands of mma.sync in registers: D (16 x 8) = A (16 x K) B (K x 8) + C, where
// a row of A has 32 bytes: K is 16 for fp16 and bf16, 8 for tf32.
//
// Elements are numbered as in the PTX ISA ("Matrix Fragments for mma.m16n8k16 with floating point type", and for
// mma.m16n8k8 with .tf32): element e is in register e / 2 for 16-bit types, the lower half first, and in register e for
// 32-bit types. With g = lane / 4, t = lane % 4:
//
//   A, 16 bits  e     0    1    2    3    4    5    6    7       A, tf32  e     0    1    2    3
//               row   g    g   g+8  g+8   g    g   g+8  g+8               row   g   g+8   g   g+8
//               col   2t  2t+1  2t  2t+1 2t+8 2t+9 2t+8 2t+9              col   t    t   t+4  t+4
//   B, 16 bits  e     0    1    2    3                           B, tf32  e     0    1
//               row   2t  2t+1 2t+8 2t+9                                  row   t   t+4
//               col   g    g    g    g                                    col   g    g
//   C, D        e     0    1    2    3
//               row   g    g   g+8  g+8
//               col   2t  2t+1  2t  2t+1
//
// tests/test_fragments.py holds row() and col() against CuTe's tables.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>

#include <cstdint>

namespace pykern {

// Marks operands of 1 sign, 8 exponent and 10 mantissa bits in 32; the instruction ignores the lower 13.
struct Tf32 {
  uint32_t bits;
};

template <class T>
struct FragmentA {
  static constexpr int kRows = 16, kCols = 32 / sizeof(T);
  static constexpr int kElements = 16 / sizeof(T), kInRegister = 4 / sizeof(T);

  __host__ __device__ static constexpr int row(int lane, int e) { return lane / 4 + 8 * (e / kInRegister % 2); }
  __host__ __device__ static constexpr int col(int lane, int e) {
    return kInRegister * (lane % 4) + e % kInRegister + kCols / 2 * (e / kInRegister / 2);
  }

  uint32_t reg[4];
};

template <class T>
struct FragmentB {
  static constexpr int kRows = 32 / sizeof(T), kCols = 8;
  static constexpr int kElements = 8 / sizeof(T), kInRegister = 4 / sizeof(T);

  __host__ __device__ static constexpr int row(int lane, int e) {
    return kInRegister * (lane % 4) + e % kInRegister + kRows / 2 * (e / kInRegister);
  }
  __host__ __device__ static constexpr int col(int lane, int) { return lane / 4; }

  uint32_t reg[2];
};

struct LayoutC {
  static constexpr int kRows = 16, kCols = 8, kElements = 4;

  __host__ __device__ static constexpr int row(int lane, int e) { return lane / 4 + 8 * (e / 2); }
  __host__ __device__ static constexpr int col(int lane, int e) { return 2 * (lane % 4) + e % 2; }
};

// The accumulators: of float, or of __half in pairs.
template <class T>
struct FragmentC;

template <>
struct FragmentC<float> : LayoutC {
  float x[4];
};

template <>
struct FragmentC<__half> : LayoutC {
  uint32_t reg[2];
};

}  // namespace pykern
