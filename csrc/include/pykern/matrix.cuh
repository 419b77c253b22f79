// ldmatrix and stmatrix: a warp moves 1, 2 or 4 matrices of 8 x 8 elements of 16 bits between shared memory and
// registers. All 32 lanes must call together. (PTX ISA, "Warp-level matrix load instruction: ldmatrix", and stmatrix.)
//
// A row of a matrix is 16 bytes anywhere in shared memory, 16-byte aligned. Lane l names row l % 8 of matrix l / 8: for
// one matrix lanes 0-7 do, for two lanes 0-15. Register m of lane l holds of matrix m, lower half first,
//   ldmatrix, stmatrix              (l / 4, 2 (l % 4)) and (l / 4, 2 (l % 4) + 1)
//   ldmatrix_trans, stmatrix_trans  (2 (l % 4), l / 4) and (2 (l % 4) + 1, l / 4)
// Of 32-bit elements a matrix has 8 x 4, and without _trans lane l gets (l / 4, l % 4): so ldmatrix serves tf32 too.
//
// What a lane must name for the operands of mma.cuh, with K = 16, as (row, col) of the tile in shared memory:
//
//   fragment                      tile        instruction                       address
//   FragmentA                     [m][k]      ldmatrix(a.reg, …)                tall(lane)
//   FragmentA                     [k][m]      ldmatrix_trans(a.reg, …)          wide(lane)
//   FragmentB of columns n, n+8   [n][k]      ldmatrix(b0.reg, b1.reg, …)       wide(lane)
//   FragmentB of columns n, n+8   [k][n]      ldmatrix_trans(b0.reg, b1.reg, …) tall(lane)
//   one FragmentB                 [n][k]      ldmatrix(b.reg, …)                wide(lane % 16)
//   one FragmentB                 [k][n]      ldmatrix_trans(b.reg, …)          tall(lane % 16)
//
// For tf32, K = 8, halve the columns in the lines without _trans.

#pragma once

#include "instruction.cuh"

namespace pykern {

struct Coordinate {
  int row, col;
};

// Four matrices in a 16 x 16 tile of 16-bit elements, numbered down first: 0 2     and across first: 0 1
__host__ __device__ constexpr Coordinate tall(int lane) {  //               1 3                       2 3
  return {lane % 16, lane / 16 * 8};
}
__host__ __device__ constexpr Coordinate wide(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8}; }

#ifdef __CUDACC__
#define PYKERN_LDMATRIX(suffix)                                                                                \
  if constexpr (kCount == 1)                                                                                   \
    asm volatile("ldmatrix.sync.aligned.m8n8.x1" suffix ".shared.b16 {%0}, [%1];"                              \
                 : "=r"(reg[0])                                                                                \
                 : "r"(shared_address(row))                                                                    \
                 : "memory");                                                                                  \
  else if constexpr (kCount == 2)                                                                              \
    asm volatile("ldmatrix.sync.aligned.m8n8.x2" suffix ".shared.b16 {%0, %1}, [%2];"                          \
                 : "=r"(reg[0]), "=r"(reg[1])                                                                  \
                 : "r"(shared_address(row))                                                                    \
                 : "memory");                                                                                  \
  else                                                                                                         \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" suffix ".shared.b16 {%0, %1, %2, %3}, [%4];"                  \
                 : "=r"(reg[0]), "=r"(reg[1]), "=r"(reg[2]), "=r"(reg[3])                                      \
                 : "r"(shared_address(row))                                                                    \
                 : "memory")
#define PYKERN_STMATRIX(suffix)                                                                                \
  if constexpr (kCount == 1)                                                                                   \
    asm volatile("stmatrix.sync.aligned.m8n8.x1" suffix ".shared.b16 [%0], {%1};"                              \
                 :: "r"(shared_address(row)), "r"(reg[0])                                                      \
                 : "memory");                                                                                  \
  else if constexpr (kCount == 2)                                                                              \
    asm volatile("stmatrix.sync.aligned.m8n8.x2" suffix ".shared.b16 [%0], {%1, %2};"                          \
                 :: "r"(shared_address(row)), "r"(reg[0]), "r"(reg[1])                                         \
                 : "memory");                                                                                  \
  else                                                                                                         \
    asm volatile("stmatrix.sync.aligned.m8n8.x4" suffix ".shared.b16 [%0], {%1, %2, %3, %4};"                  \
                 :: "r"(shared_address(row)), "r"(reg[0]), "r"(reg[1]), "r"(reg[2]), "r"(reg[3])               \
                 : "memory")
#endif

template <int kCount>
__device__ __forceinline__ void ldmatrix(uint32_t (&reg)[kCount], const void* row PYKERN_CALLER) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
  PYKERN_LDMATRIX("");
#else
  emulator::ldmatrix(reg, kCount, false, row, place);
#endif
}

template <int kCount>
__device__ __forceinline__ void ldmatrix_trans(uint32_t (&reg)[kCount], const void* row PYKERN_CALLER) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
  PYKERN_LDMATRIX(".trans");
#else
  emulator::ldmatrix(reg, kCount, true, row, place);
#endif
}

// Four matrices into two fragments of B.
__device__ __forceinline__ void ldmatrix(
    uint32_t (&first)[2], uint32_t (&second)[2], const void* row PYKERN_CALLER) {
  uint32_t reg[4];
  ldmatrix(reg, row PYKERN_PASS_CALLER);
  first[0] = reg[0], first[1] = reg[1], second[0] = reg[2], second[1] = reg[3];
}

__device__ __forceinline__ void ldmatrix_trans(
    uint32_t (&first)[2], uint32_t (&second)[2], const void* row PYKERN_CALLER) {
  uint32_t reg[4];
  ldmatrix_trans(reg, row PYKERN_PASS_CALLER);
  first[0] = reg[0], first[1] = reg[1], second[0] = reg[2], second[1] = reg[3];
}

// stmatrix for GPUs before sm_90, which lack it: the lanes learn the rows' addresses from each other.
template <bool kTrans, int kCount>
__device__ __forceinline__ void store_elements(void* row, const uint32_t (&reg)[kCount]) {
  const int lane = lane_id();
  const SharedAddress own = shared_address(row);
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    if constexpr (kTrans) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const SharedAddress to = __shfl_sync(kFullWarp, own, 8 * m + 2 * (lane % 4) + half);
        static_cast<uint16_t*>(shared_pointer(to))[lane / 4] = static_cast<uint16_t>(reg[m] >> 16 * half);
      }
    } else {
      const SharedAddress to = __shfl_sync(kFullWarp, own, 8 * m + lane / 4);
      static_cast<uint32_t*>(shared_pointer(to))[lane % 4] = reg[m];
    }
  }
}

template <int kCount>
__device__ __forceinline__ void stmatrix(void* row, const uint32_t (&reg)[kCount] PYKERN_CALLER) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "stmatrix stores 1, 2 or 4 matrices");
#if !defined(__CUDACC__)
  emulator::stmatrix(reg, kCount, false, row, place);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  store_elements<false>(row, reg);
#else
  PYKERN_STMATRIX("");
#endif
}

template <int kCount>
__device__ __forceinline__ void stmatrix_trans(void* row, const uint32_t (&reg)[kCount] PYKERN_CALLER) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "stmatrix stores 1, 2 or 4 matrices");
#if !defined(__CUDACC__)
  emulator::stmatrix(reg, kCount, true, row, place);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  store_elements<true>(row, reg);
#else
  PYKERN_STMATRIX(".trans");
#endif
}

#undef PYKERN_LDMATRIX
#undef PYKERN_STMATRIX

}  // namespace pykern
