// Sums over the threads that share a row, always added in the same order: the same inputs give the same bits.

#pragma once

#include "device.cuh"

namespace pykern {

// The threads of a block that share a row. Blocks are cut into teams of one size: a power of two up to a warp, or whole
// warps.
class Team {
 public:
  __device__ explicit Team(int size) : size(size), index(threadIdx.x / size), thread(threadIdx.x % size) {}

  const int size;
  const int index;   // of the team in its block
  const int thread;  // of this thread in its team
  unsigned turn = 0;  // how many sums across warps there have been
};

// Every lane ends with the same bits: at each step both lanes of a pair add the same two numbers.
template <int kCount>
__device__ void sum_over_lanes(float (&values)[kCount], int lanes) {
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kFullWarp, values[i], distance);
  }
}

// Each of the values summed over the team. All threads of the block must come here, and do so equally often.
template <int kCount>
__device__ void sum_over_team(float (&values)[kCount], Team& team) {
  sum_over_lanes(values, min(team.size, kWarp));
  if (team.size <= kWarp) return;
  // Two buffers by turns, so that one barrier a sum is enough: who writes the first one for the third sum has passed
  // the second sum's barrier, and there everybody had read the first sum.
  PYKERN_SHARED(sums, float[2][kCount][kWarp]);
  float(&buffer)[kCount][kWarp] = sums[team.turn++ % 2];
  const int lane = threadIdx.x % kWarp;
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) buffer[i][threadIdx.x / kWarp] = values[i];
  }
  __syncthreads();
  const int warps = team.size / kWarp;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = lane < warps ? buffer[i][team.index * warps + lane] : 0.f;
  sum_over_lanes(values, kWarp);
}

}  // namespace pykern
