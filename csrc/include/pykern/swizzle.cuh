// Tiles in shared memory without bank conflicts.

#pragma once

#include "device.cuh"

namespace pykern {

// A tile with rows of kCols elements of T, without gaps, in which every row's 16-byte chunks are permuted by XOR with
// bits of the row's number. Eight threads that access one chunk of eight consecutive rows, as ldmatrix does, or all
// chunks of 128 contiguous bytes, then meet all 32 banks once.
//
// For rows of 32, 64 and 128 bytes these are the patterns of Hopper's tensor maps (CU_TENSOR_MAP_SWIZZLE_32B, _64B,
// _128B) and wgmma descriptors, if the tile begins at a multiple of 256, 512 or 1024 bytes. A longer row has no such
// counterpart: for TMA split it into panels of 128 bytes.
template <class T, int kCols>
struct Swizzle {
  static constexpr int kRowBytes = kCols * static_cast<int>(sizeof(T));
  static constexpr int kInChunk = 16 / static_cast<int>(sizeof(T));
  static_assert(
      kRowBytes == 32 || kRowBytes == 64 || kRowBytes % 128 == 0, "rows must have 32, 64 or a multiple of 128 bytes");

  // Where element (row, col) is, in elements. The elements of a chunk stay together.
  __host__ __device__ static constexpr int at(int row, int col) {
    const int chunk = col / kInChunk ^ row / kRowsInLine % kPermuted;
    return row * kCols + chunk * kInChunk + col % kInChunk;
  }

 private:
  static constexpr int kRowsInLine = kRowBytes < 128 ? 128 / kRowBytes : 1;  // a line is all banks once
  static constexpr int kPermuted = kRowBytes < 128 ? kRowBytes / 16 : 8;
};

}  // namespace pykern
