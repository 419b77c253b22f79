// Kernels in which the emulator must find what is wrong with their memory, kernels near to those that are right, and
// kernels whose traffic it must count. `// fault: NAME` marks the lines that the message may name when NAME runs;
// emulator_language.cu has the op that runs them.

#include <cuda/launch.h>
#include <pykern/barrier.cuh>
#include <pykern/copy_async.cuh>
#include <pykern/device.cuh>

#include "emulator_kernels.h"

namespace pykern {
namespace memory {

constexpr int kThreads = 128;

// Bounds, rights and initialisation.

__global__ void copy16(const float4* x, float4* y, int n) {
  const int i = threadIdx.x;
  if (4 * i < n) y[i] = x[i];  // fault: copy16
}

__global__ void before_start(const float* x, float* y, int) {
  y[threadIdx.x] = x[static_cast<int>(threadIdx.x) - 1];  // fault: before_start
}

__global__ void null(const float*, float* y, int n) {
  y[threadIdx.x] = *reinterpret_cast<const float*>(static_cast<uintptr_t>(n));  // fault: null
}

float variable = 1;  // what a GPU would have no address for

__global__ void host_variable(const float*, float* y, int) {
  y[threadIdx.x] = *const_cast<const float*>(&variable);  // fault: host_variable
}

__global__ void adds(const float* x, float* y, int) {
  y[threadIdx.x] += x[threadIdx.x];  // fault: adds
}

__global__ void atomic_adds(const float* x, float* y, int) {
  atomicAdd(y, x[threadIdx.x]);  // fault: atomic_adds
}

__global__ void atomic_on_input(float* x, float*, int) {
  atomicAdd(x, 1.0f);  // fault: atomic_on_input
}

__global__ void misaligned_atomic(const float*, float* y, int) {
  atomicAdd(reinterpret_cast<double*>(y + 1), 1.0);  // fault: misaligned_atomic
}

// A pointer to thread 0's own variable, for thread n.
__global__ void local_memory(const float* x, unsigned long long* y, int n) {
  float mine[4] = {1, 2, 3, x[threadIdx.x]};
  if (threadIdx.x == 0) atomicExch(y, reinterpret_cast<unsigned long long>(&mine));
  __syncthreads();
  const float* const of_first = reinterpret_cast<const float*>(y[0]);
  if (static_cast<int>(threadIdx.x) == n) y[1] = of_first[x[0] > 0 ? 3 : 2];  // fault: local_memory
  __syncthreads();
}

// Shared memory.

__global__ void past_tile(const float* x, float* y, int) {
  PYKERN_SHARED(tile, float[kThreads]);
  PYKERN_SHARED(other, float[kThreads]);
  float* const shifted = tile + 1;
  const int i = threadIdx.x;
  other[i] = 0;
  shifted[i] = x[i];  // fault: past_tile
  __syncthreads();
  y[i] = shifted[i] + other[i];
}

__global__ void past_dynamic(const float* x, float* y, int n) {
  float* const tile = dynamic_shared<float>() + n;
  tile[threadIdx.x] = x[threadIdx.x];  // fault: past_dynamic
  y[threadIdx.x] = tile[threadIdx.x];
}

__global__ void static_limit(const float* x, float* y, int) {
  PYKERN_SHARED(first, float[8 * 1024]);
  PYKERN_SHARED(second, float[4 * 1024 + 1]);  // fault: static_limit
  first[threadIdx.x] = second[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = first[threadIdx.x];
}

__global__ void static_beside_dynamic(const float* x, float* y, int) {
  PYKERN_SHARED(tile, float[1024]);  // fault: static_beside_dynamic
  dynamic_shared<float>()[threadIdx.x] = x[threadIdx.x];
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[threadIdx.x] + dynamic_shared<float>()[threadIdx.x];
}

// Neighbours of 2 bytes in one word.
__global__ void halves(const float* x, float* y, int) {
  PYKERN_SHARED(tile, short[kThreads]);
  const int i = threadIdx.x;
  tile[i] = static_cast<short>(x[i]);
  tile[i] += 1;
  __syncthreads();
  y[i] = tile[i ^ 1];
}

// All read what thread n then overwrites.
template <bool kBarrier>
__global__ void write_after_read(const float* x, float* y, int n) {
  PYKERN_SHARED(box, float);
  const int i = threadIdx.x;
  if (i == 0) box = x[0];
  __syncthreads();
  y[i] = box;  // fault: write_after_read
  if constexpr (kBarrier) __syncthreads();
  if (i == n) box = x[1];  // fault: write_after_read
}

// Single bytes of one thread, which another reads 16 at a time.
template <bool kBarrier>
__global__ void bytes_and_vectors(const float*, float* y, int) {
  PYKERN_SHARED(tile, float4[8]);
  const int i = threadIdx.x;
  tile[i] = make_float4(1, 1, 1, 1);
  __syncthreads();
  for (int k = 0; k < 16; ++k) reinterpret_cast<char*>(&tile[i])[k] = 0;  // fault: bytes_and_vectors
  if constexpr (kBarrier) __syncthreads();
  y[i] = tile[7 - i].x;  // fault: bytes_and_vectors
}

// Values that go round the warp; without one __syncwarp a lane may overwrite what its neighbour has not read.
template <bool kSync>
__global__ void warp_ring(const float* x, float* y, int) {
  PYKERN_SHARED(ring, float[kWarp]);
  const int lane = threadIdx.x;
  ring[lane] = x[lane];
  for (int k = 0; k < 4; ++k) {
    __syncwarp();
    const float value = ring[(lane + 1) % kWarp];  // fault: warp_ring
    if (kSync || k != 2) __syncwarp();
    ring[lane] = value;  // fault: warp_ring
  }
  y[lane] = ring[lane];
}

// Half of the block hands a box to the other half; kLate: it writes after it has said so.
template <bool kLate>
__global__ void named_barrier_once(const float* x, float* y, int) {
  PYKERN_SHARED(box, float[64]);
  const int i = threadIdx.x;
  if (i < 64) box[i] = 0;
  __syncthreads();
  if (i < 64) {
    if constexpr (!kLate) box[i] = x[i];
    named_barrier_arrive(1, 128);
    if constexpr (kLate) box[i] = x[i];  // fault: named_barrier_late
  } else {
    named_barrier_sync(1, 128);
    y[i - 64] = box[127 - i];  // fault: named_barrier_late
  }
}

// The last warp lacks lanes, and counts as a whole one.
__global__ void partial_warp(const float* x, float* y, int) {
  PYKERN_SHARED(box, float[40]);
  box[threadIdx.x] = x[threadIdx.x];
  named_barrier_sync(1, 64);
  y[threadIdx.x] = box[39 - threadIdx.x];
}

// The box is filled twice, without a word that it is empty; each time has a barrier of its own.
__global__ void named_barrier_twice(const float* x, float* y, int) {
  PYKERN_SHARED(box, float[64]);
  const int i = threadIdx.x;
  for (int k = 0; k < 2; ++k) {
    if (i < 64) {
      box[i] = x[i];  // fault: named_barrier_twice
      named_barrier_arrive(1 + k, 128);
    } else {
      named_barrier_sync(1 + k, 128);
      y[i - 64] = box[127 - i];  // fault: named_barrier_twice
    }
  }
}

// Races between blocks.

__global__ void same_output(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];  // fault: same_output
}

template <bool kAtomic>
__global__ void count_blocks(const float*, int* y, int) {
  if (threadIdx.x > 0) return;
  if constexpr (kAtomic) atomicAdd(y, 1);
  else *y = *y + 1;  // fault: count_plainly
}

// A plain look at what others change by atomics.
__global__ void look_at_counter(const float*, int* y, int) {
  atomicAdd(y, 1);  // fault: look_at_counter
  y[1 + blockIdx.x * blockDim.x + threadIdx.x] = y[0] >= 0;  // fault: look_at_counter
}

// The block that comes last sums the partial sums of all. y: a counter, the sum, then a partial sum a block.
template <bool kRelease, bool kAcquire>
__global__ void last_block(const float* x, float* y, int) {
  PYKERN_SHARED(last, bool);
  float* const part = y + 2 + blockIdx.x;
  if (threadIdx.x == 33) *part = x[2 * blockIdx.x] + x[2 * blockIdx.x + 1];  // fault: last_no_release, last_no_acquire
  __syncthreads();
  if (threadIdx.x == 0) {
    if constexpr (kRelease) __threadfence();
    last = atomicAdd(reinterpret_cast<unsigned*>(y), 1u) == gridDim.x - 1;
    if constexpr (kAcquire) __threadfence();
  }
  __syncthreads();
  if (!last || threadIdx.x != 32) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += y[2 + b];  // fault: last_no_release, last_no_acquire
  y[1] = sum;
}

// The first block gives the second a number. y: a flag, the number, and the number again.
template <bool kFence>
__global__ void flag(const float* x, float* y, int) {
  volatile int* const raised = reinterpret_cast<volatile int*>(y);
  if (blockIdx.x == 0) {
    y[1] = x[0];  // fault: flag_no_fence
    if constexpr (kFence) __threadfence();
    *raised = 1;
  } else {
    while (*raised == 0) {
    }
    __threadfence();
    y[2] = y[1];  // fault: flag_no_fence
  }
}

// cp.async.

enum class Async { right, offset, uninitialised, no_barrier, again, overwritten, to_global, from_shared };

// Reads what the neighbours copied, from x + n.
template <Async kCase>
__global__ void async(const float* x, float* y, int n) {
  PYKERN_SHARED(tile, float[4 * kThreads]);
  const int i = threadIdx.x;
  float* const own = tile + 4 * i;
  for (int k = 0; k < 4; ++k) own[k] = 0;
  __syncthreads();
  if constexpr (kCase == Async::to_global) cp_async<16>(y + 4 * i, x + 4 * i);  // fault: async_to_global
  if constexpr (kCase == Async::from_shared) cp_async<16>(own, own);  // fault: async_from_shared
  const float* const from = (kCase == Async::uninitialised || kCase == Async::overwritten ? y : x) + n + 4 * i;
  cp_async<16>(own, from);  // fault: async_offset, async_uninitialised, async_overwritten, async_no_barrier
  if constexpr (kCase == Async::overwritten) y[4 * i] = i + 1;
  cp_async_wait_all();
  if constexpr (kCase == Async::again) cp_async<16>(own, x + 4 * i);  // fault: async_again
  if constexpr (kCase != Async::no_barrier) __syncthreads();
  y[i] = tile[(4 * i + 7) % (4 * kThreads)];  // fault: async_again, async_no_barrier
}

// A thread writes to where its copy lands.
__global__ void async_under_write(const float* x, float* y, int) {
  PYKERN_SHARED(tile, float[4]);
  cp_async<16>(tile, x);  // fault: async_under_write
  tile[0] = 1;  // fault: async_under_write
  cp_async_wait_all();
  y[0] = tile[0];
}

// What is counted.

__global__ void stride2(const float* x, float* y, int) { y[threadIdx.x] = x[2 * threadIdx.x]; }

__global__ void broadcast(const float* x, float* y, int) { y[threadIdx.x] = x[0]; }

// 32 x 32 by one warp; rows of shared memory have kPad floats more.
template <int kPad>
__global__ void transpose(const float* x, float* y, int) {
  PYKERN_SHARED(tile, float[kWarp * (kWarp + kPad)]);
  const int i = threadIdx.x;
  for (int row = 0; row < kWarp; ++row) tile[row * (kWarp + kPad) + i] = x[row * kWarp + i];
  __syncthreads();
  for (int row = 0; row < kWarp; ++row) y[row * kWarp + i] = tile[i * (kWarp + kPad) + row];
}

__global__ void shared16(const float4* x, float4* y, int) {
  PYKERN_SHARED(tile, float4[kWarp]);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

// Doubles 16 bytes apart: half of the banks.
__global__ void shared8(const float* x, float* y, int) {
  PYKERN_SHARED(tile, double[2 * kWarp]);
  tile[2 * threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = tile[2 * (threadIdx.x ^ 1)];
}

// Lanes leave the loop one after another.
__global__ void diverges(const float* x, float* y, int) {
  const int i = threadIdx.x;
  float sum = 0;
  for (int k = 0; k <= i % 4; ++k) sum += x[kWarp * k + i];
  y[i] = sum;
}

__global__ void reads_often(const float* x, float* y, int n) {
  float sum = 0;
  for (int k = 0; k < n; ++k) sum += x[k * kThreads + threadIdx.x];
  y[threadIdx.x] = sum;
}

}  // namespace memory

const Kernels& memory_kernels() {
  using namespace memory;
  static const Kernels kernels = {
      {"copy16", start(copy16)},
      {"before_start", start(before_start)},
      {"null", start(null)},
      {"host_variable", start(host_variable)},
      {"adds", start(adds)},
      {"atomic_adds", start(atomic_adds)},
      {"atomic_on_input",
       [](const Device& device, dim3 grid, dim3 block, size_t shared, const void* x, void* y, int n) {
         float* const in = const_cast<float*>(static_cast<const float*>(x));
         device.launch(atomic_on_input, grid, block, shared, in, static_cast<float*>(y), n);
       }},
      {"misaligned_atomic", start(misaligned_atomic)},
      {"local_memory", start(local_memory)},
      {"past_tile", start(past_tile)},
      {"past_dynamic", start(past_dynamic)},
      {"static_limit", start(static_limit)},
      {"static_beside_dynamic", start(static_beside_dynamic)},
      {"halves", start(halves)},
      {"write_after_read", start(write_after_read<false>)},
      {"write_after_read_right", start(write_after_read<true>)},
      {"bytes_and_vectors", start(bytes_and_vectors<false>)},
      {"bytes_and_vectors_right", start(bytes_and_vectors<true>)},
      {"warp_ring", start(warp_ring<false>)},
      {"warp_ring_right", start(warp_ring<true>)},
      {"named_barrier_late", start(named_barrier_once<true>)},
      {"named_barrier_right", start(named_barrier_once<false>)},
      {"partial_warp", start(partial_warp)},
      {"named_barrier_twice", start(named_barrier_twice)},
      {"same_output", start(same_output)},
      {"count_plainly", start(count_blocks<false>)},
      {"count_right", start(count_blocks<true>)},
      {"look_at_counter", start(look_at_counter)},
      {"last_no_release", start(last_block<false, true>)},
      {"last_no_acquire", start(last_block<true, false>)},
      {"last_right", start(last_block<true, true>)},
      {"flag_no_fence", start(flag<false>)},
      {"flag_right", start(flag<true>)},
      {"async_right", start(async<Async::right>)},
      {"async_offset", start(async<Async::offset>)},
      {"async_uninitialised", start(async<Async::uninitialised>)},
      {"async_no_barrier", start(async<Async::no_barrier>)},
      {"async_again", start(async<Async::again>)},
      {"async_overwritten", start(async<Async::overwritten>)},
      {"async_to_global", start(async<Async::to_global>)},
      {"async_from_shared", start(async<Async::from_shared>)},
      {"async_under_write", start(async_under_write)},
      {"stride2", start(stride2)},
      {"broadcast", start(broadcast)},
      {"transpose", start(transpose<0>)},
      {"transpose_padded", start(transpose<1>)},
      {"shared16", start(shared16)},
      {"shared8", start(shared8)},
      {"diverges", start(diverges)},
      {"reads_often", start(reads_often)},
  };
  return kernels;
}

}  // namespace pykern
