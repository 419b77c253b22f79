// Kernels that the emulator must run as a GPU does, and kernels in which it must find what is wrong with their threads
// or their arithmetic. `// fault: NAME` marks the lines that the message may name when the kernel NAME runs.
//
// This file and emulator_memory.cu are one library with one op: run(x, y, "NAME", …) launches any kernel of theirs.

#include <cuda/launch.h>
#include <pykern/barrier.cuh>
#include <pykern/device.cuh>

#include <climits>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator_kernels.h"

namespace pykern {

// Named, since messages and counters call a kernel by its symbol.
namespace language {

// y[block] = the sum of its part of x.
__global__ void block_sum(const float* x, float* y, int) {
  PYKERN_SHARED(sums, float[kWarp]);
  float sum = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float total = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) total += sums[w];
  y[blockIdx.x] = total;
}

// y[i] = how many lanes of its warp are left when all threads from n on have gone.
__global__ void early_exit(const int*, int* y, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
  y[threadIdx.x] = __popc(__ballot_sync(kFullWarp, 1));
  __syncwarp();
  __syncthreads();
}

// Every block reads what another wrote before they all met. y: a counter, then a number a block written, and one read.
template <bool kAtomic>
__global__ void grid_barrier(const int*, unsigned* y, int) {
  unsigned* const written = y + 1;
  unsigned* const read = written + gridDim.x;
  if (threadIdx.x == 0) {
    written[blockIdx.x] = 10 * blockIdx.x;
    __threadfence();
    atomicAdd(y, 1u);
    if constexpr (kAtomic) {
      while (atomicAdd(y, 0u) < gridDim.x) __nanosleep(20);
    } else {
      while (*static_cast<volatile unsigned*>(y) < gridDim.x) {
      }
    }
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) read[blockIdx.x] = written[gridDim.x - 1 - blockIdx.x];
}

// y[1] counts the warps; y[0] is the lock that guards it.
__global__ void lock(const int*, int* y, int) {
  if (threadIdx.x % kWarp) return;
  while (atomicCAS(y, 0, 1) != 0) {
  }
  __threadfence();
  y[1] += 1;
  __threadfence();
  atomicExch(y, 0);
}

// The first warp fills a box four times, the second empties it: barrier 1 says that it is full, 2 that it is empty.
__global__ void producer_consumer(const int* x, int* y, int) {
  PYKERN_SHARED(box, int[kWarp]);
  const int lane = threadIdx.x % kWarp;
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x < kWarp) {
      if (i) named_barrier_sync(2, 64);
      box[lane] = x[i * kWarp + lane];
      named_barrier_arrive(1, 64);
    } else {
      named_barrier_sync(1, 64);
      y[i * kWarp + lane] = box[kWarp - 1 - lane];
      if (i < 3) named_barrier_arrive(2, 64);
    }
  }
}

// y[width][kind][lane]; n is the source lane, the distance or the lane mask.
template <class T>
__global__ void shuffles(const T* x, T* y, int n) {
  const T value = x[threadIdx.x];
  for (int width = 1; width <= kWarp; width *= 2, y += 4 * kWarp) {
    y[threadIdx.x] = __shfl_sync(kFullWarp, value, n, width);
    y[threadIdx.x + kWarp] = __shfl_up_sync(kFullWarp, value, n, width);
    y[threadIdx.x + 2 * kWarp] = __shfl_down_sync(kFullWarp, value, n, width);
    y[threadIdx.x + 3 * kWarp] = __shfl_xor_sync(kFullWarp, value, n, width);
  }
}

// Lanes meet in pairs, one of each pair behind a branch, and then all at once.
__global__ void nested_masks(const int* x, int* y, int) {
  const int lane = threadIdx.x;
  const unsigned pair = 3u << (lane & 30);
  int value;
  if (lane & 1) value = __shfl_xor_sync(pair, x[lane], 1);
  else value = __shfl_xor_sync(pair, 2 * x[lane], 1);
  y[lane] = __shfl_sync(kFullWarp, value, 31 - lane);
}

// y[kind][lane] among the lanes of the mask n.
__global__ void votes(const int* x, int* y, int n) {
  const unsigned mask = n, lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  y[lane] = __ballot_sync(mask, x[lane]);
  y[lane + kWarp] = __any_sync(mask, x[lane]);
  y[lane + 2 * kWarp] = __all_sync(mask, x[lane]);
}

__global__ void matches(const int* x, int* y, int n) {
  const unsigned mask = n, lane = threadIdx.x;
  if (!(mask >> lane & 1)) return;
  int same = -1;
  y[lane] = __match_any_sync(mask, x[lane]);
  y[lane + kWarp] = __match_all_sync(mask, x[lane], &same);
  y[lane + 2 * kWarp] = same;
}

__global__ void reductions(const int* x, int* y, int n) {
  const unsigned mask = n, lane = threadIdx.x, bits = x[lane];
  if (!(mask >> lane & 1)) return;
  y[lane] = __reduce_add_sync(mask, x[lane]);
  y[lane + kWarp] = __reduce_min_sync(mask, x[lane]);
  y[lane + 2 * kWarp] = __reduce_max_sync(mask, x[lane]);
  y[lane + 3 * kWarp] = __reduce_min_sync(mask, bits);
  y[lane + 4 * kWarp] = __reduce_max_sync(mask, bits);
  y[lane + 5 * kWarp] = __reduce_and_sync(mask, bits);
  y[lane + 6 * kWarp] = __reduce_or_sync(mask, bits);
  y[lane + 7 * kWarp] = __reduce_xor_sync(mask, bits);
}

__global__ void block_votes(const int* x, int* y, int) {
  const int predicate = x[threadIdx.x];
  y[threadIdx.x] = __syncthreads_count(predicate);
  y[threadIdx.x + blockDim.x] = __syncthreads_and(predicate);
  y[threadIdx.x + 2 * blockDim.x] = __syncthreads_or(predicate);
}

// y[operation][i] of x[i] and its right neighbour.
__global__ void bits(const unsigned* x, unsigned* y, int n) {
  const int i = threadIdx.x;
  const unsigned a = x[i], b = x[(i + 1) % n];
  const unsigned results[] = {
      __brev(a),
      static_cast<unsigned>(__clz(a)),
      static_cast<unsigned>(__ffs(a)),
      static_cast<unsigned>(__popc(a)),
      __byte_perm(a, b, 0x7531),
      __byte_perm(a, b, 0xba98),
      __funnelshift_l(a, b, i),
      __funnelshift_r(a, b, i),
      __funnelshift_lc(a, b, i),
      __funnelshift_rc(a, b, i),
      __umulhi(a, b),
      static_cast<unsigned>(__mulhi(static_cast<int>(a), static_cast<int>(b)))};
  for (int k = 0; k < 12; ++k) y[k * n + i] = results[k];
}

// y[rounding][i].
__global__ void integers(const float* x, long long* y, int n) {
  const float value = x[threadIdx.x];
  y += threadIdx.x;
  y[0] = __float2int_rn(value);
  y[n] = __float2int_rz(value);
  y[2 * n] = __float2int_rd(value);
  y[3 * n] = __float2int_ru(value);
  y[4 * n] = __float2uint_rn(value);
  y[5 * n] = __float2ll_rz(value);
}

// y[operation][i] of x[i] and its right neighbour.
__global__ void arithmetic(const float* x, float* y, int n) {
  const float a = x[threadIdx.x], b = x[(threadIdx.x + 1) % n];
  y += threadIdx.x;
  y[0] = min(a, b);
  y[n] = max(a, b);
  y[2 * n] = __saturatef(a);
  y[3 * n] = __fmaf_rn(a, b, -a);
  y[4 * n] = rsqrtf(a * a);
  y[5 * n] = __uint_as_float(__float_as_uint(a) ^ 0x80000000u);
}

__device__ void convert(float x, __half& y) { y = __float2half_rn(x); }
__device__ void convert(__half x, float& y) { y = __half2float(x); }
__device__ void convert(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }
__device__ void convert(__nv_bfloat16 x, float& y) { y = __bfloat162float(x); }
__device__ void convert(float x, __nv_fp8_e4m3& y) { y = __nv_fp8_e4m3(x); }
__device__ void convert(__nv_fp8_e4m3 x, float& y) { y = static_cast<float>(x); }
__device__ void convert(float x, __nv_fp8_e5m2& y) { y = __nv_fp8_e5m2(x); }
__device__ void convert(__nv_fp8_e5m2 x, float& y) { y = static_cast<float>(x); }

template <class From, class To>
__global__ void converted(const From* x, To* y, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) convert(x[i], y[i]);
}

// An operation each on y[0] to y[7].
__global__ void integer_atomics(const int*, int* y, int) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned* const u = reinterpret_cast<unsigned*>(y);
  atomicSub(y, 1);
  atomicMin(y + 1, -i);
  atomicMax(y + 2, i);
  atomicAnd(u + 3, ~(1u << i % 31));
  atomicOr(u + 4, 1u << i % 32);
  atomicXor(u + 5, 1u << i % 32);
  atomicInc(u + 6, 10u);
  atomicDec(u + 7, 10u);
}

// y[0] = twice the number of threads, by compare and swap; y[2 + i] = the thread that came as number i.
__global__ void tickets(const int*, int* y, int) {
  for (int old = atomicAdd(y, 0), seen; (seen = atomicCAS(y, old, old + 2)) != old; old = seen) {
  }
  y[2 + atomicAdd(y + 1, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

template <class T>
__global__ void atomic_sum(const T* x, T* y, int) {
  atomicAdd(y, x[blockIdx.x * blockDim.x + threadIdx.x]);
}

__constant__ constexpr float kTable[4] = {1, 2, 3, 4};

__global__ void vectors(const float4* x, float4* y, int) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const float4 a = __ldg(x + i), b = x[i];
  const float4 sum = make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + kTable[i % 4]);
  if (i % 2) __stcs(y + i, sum);
  else y[i] = sum;
}

// Reverses each block's part of x, through dynamic shared memory, and adds n, through a static variable.
__global__ void shared_memory(const int* x, int* y, int n) {
  PYKERN_SHARED(addend, int);
  int* const all = dynamic_shared<int>();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  all[threadIdx.x] = x[i];
  if (threadIdx.x == 0) addend = n;
  __syncthreads();
  y[i] = all[blockDim.x - 1 - threadIdx.x] + addend;
}

// y[i] = i, x fastest.
__global__ void indices(const int*, int* y, int) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  y[i] = i;
}

// Faults of threads among each other.

__global__ void deadlock(const int*, int* y, int) {
  if (threadIdx.x >= 64 && threadIdx.x < 80) return;
  if (threadIdx.x < 16) __syncwarp(0x0001ffffu);  // fault: deadlock
  __syncthreads();  // fault: deadlock
  y[threadIdx.x] = 1;
}

__global__ void crossed_barriers(const int*, int* y, int) {
  named_barrier_sync(threadIdx.x < 32 ? 1 : 2, 64);  // fault: crossed_barriers
  y[threadIdx.x] = 1;
}

__global__ void polls_for_ever(const int*, int* y, int) {
  while (*static_cast<volatile int*>(y) == 0) {  // fault: polls_for_ever
  }
}

__global__ void barrier_kinds(const int*, int* y, int) {
  y[threadIdx.x] = threadIdx.x < 32 ? __syncthreads_and(1) : __syncthreads_or(1);  // fault: barrier_kinds
}

__global__ void own_lane(const int*, int* y, int) {
  y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 1);  // fault: own_lane
}

__global__ void own_lane_votes(const int*, int* y, int) {
  y[threadIdx.x] = __any_sync(0x0000ffffu, 1);  // fault: own_lane_votes
}

__global__ void own_lane_syncs(const int*, int*, int) {
  __syncwarp(0x0000ffffu);  // fault: own_lane_syncs
}

__global__ void source_outside(const int*, int* y, int) {
  if (threadIdx.x >= 16) return;
  y[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1, 8);  // fault: source_outside
}

__global__ void source_exited(const int*, int* y, int) {
  if (threadIdx.x >= 20) return;
  y[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1, 16);  // fault: source_exited
}

__global__ void source_missing(const int*, int* y, int) {
  y[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1, 16);  // fault: source_missing
}

__global__ void different_calls(const int*, int* y, int) {
  y[threadIdx.x] = threadIdx.x & 1 ? __any_sync(kFullWarp, 1) : __all_sync(kFullWarp, 1);  // fault: different_calls
}

__global__ void different_masks(const int*, int* y, int) {
  y[threadIdx.x] = __any_sync(threadIdx.x < 16 ? kFullWarp : 0xffff0001u, 1);  // fault: different_masks
}

__global__ void wrong_width(const int*, int* y, int) {
  y[threadIdx.x] = __shfl_sync(kFullWarp, 1, 0, 12);  // fault: wrong_width
}

__global__ void barrier_counts(const int*, int*, int) {
  named_barrier_sync(3, threadIdx.x < 32 ? 64 : 96);  // fault: barrier_counts
}

__global__ void barrier_short(const int*, int*, int) {
  if (threadIdx.x < 32) named_barrier_sync(3, 64);  // fault: barrier_short
}

__global__ void barrier_number(const int*, int*, int) {
  named_barrier_sync(16, 32);  // fault: barrier_number
}

__global__ void barrier_threads(const int*, int*, int) {
  named_barrier_sync(1, 40);  // fault: barrier_threads
}

// Faults of one thread.

__global__ void asserts(const int*, int*, int n) {
  assert(static_cast<int>(threadIdx.x) != n);  // fault: asserts
}

__global__ void traps(const int*, int*, int n) {
  if (static_cast<int>(threadIdx.x) == n) __trap();  // fault: traps
}

__global__ void throws(const int*, int*, int n) {
  if (static_cast<int>(threadIdx.x) == n) throw std::runtime_error("no luck");
}

__global__ void endless(const int*, int* y, int n) {
  unsigned i = 1;
  if (static_cast<int>(threadIdx.x) == n)
    for (; i != 0; i *= 3) asm volatile("" : "+r"(i));  // fault: endless
  y[threadIdx.x] = i;
}

__global__ void sum_overflows(const int*, int* y, int n) {
  y[threadIdx.x] = n + 1;  // fault: sum_overflows
}

__global__ void difference_overflows(const int*, int* y, int n) {
  y[threadIdx.x] = -2 - n;  // fault: difference_overflows
}

__global__ void product_overflows(const int*, int* y, int n) {
  y[threadIdx.x] = n * n;  // fault: product_overflows
}

__global__ void negation_overflows(const int*, int* y, int n) {
  y[threadIdx.x] = -n;  // fault: negation_overflows
}

__global__ void shift_too_far(const int*, int* y, int n) {
  y[threadIdx.x] = 1 << n;  // fault: shift_too_far
}

__global__ void divides(const int*, int* y, int n) {
  y[threadIdx.x] = 5 / n;  // fault: divides
}

__global__ void quotient_overflows(const int*, int* y, int n) {
  y[threadIdx.x] = INT_MIN / n;  // fault: quotient_overflows
}

__global__ void index_outside(const int*, int* y, int n) {
  PYKERN_SHARED(tile, int[32]);
  tile[threadIdx.x + n] = 1;  // fault: index_outside
  y[threadIdx.x] = 1;
}

const Kernels kernels = {
    {"block_sum", start(block_sum)},
    {"early_exit", start(early_exit)},
    {"grid_barrier", start(grid_barrier<false>)},
    {"grid_barrier_atomic", start(grid_barrier<true>)},
    {"lock", start(lock)},
    {"producer_consumer", start(producer_consumer)},
    {"shuffles_int", start(shuffles<int>)},
    {"shuffles_long", start(shuffles<long long>)},
    {"shuffles_float", start(shuffles<float>)},
    {"shuffles_double", start(shuffles<double>)},
    {"shuffles_half", start(shuffles<__half>)},
    {"shuffles_bfloat16", start(shuffles<__nv_bfloat16>)},
    {"shuffles_half2", start(shuffles<__half2>)},
    {"shuffles_bfloat162", start(shuffles<__nv_bfloat162>)},
    {"nested_masks", start(nested_masks)},
    {"votes", start(votes)},
    {"matches", start(matches)},
    {"reductions", start(reductions)},
    {"block_votes", start(block_votes)},
    {"bits", start(bits)},
    {"integers", start(integers)},
    {"arithmetic", start(arithmetic)},
    {"to_float16", start(converted<float, __half>)},
    {"from_float16", start(converted<__half, float>)},
    {"to_bfloat16", start(converted<float, __nv_bfloat16>)},
    {"from_bfloat16", start(converted<__nv_bfloat16, float>)},
    {"to_float8_e4m3fn", start(converted<float, __nv_fp8_e4m3>)},
    {"from_float8_e4m3fn", start(converted<__nv_fp8_e4m3, float>)},
    {"to_float8_e5m2", start(converted<float, __nv_fp8_e5m2>)},
    {"from_float8_e5m2", start(converted<__nv_fp8_e5m2, float>)},
    {"integer_atomics", start(integer_atomics)},
    {"tickets", start(tickets)},
    {"sum_float32", start(atomic_sum<float>)},
    {"sum_float64", start(atomic_sum<double>)},
    {"sum_int64", start(atomic_sum<unsigned long long>)},
    {"sum_float16", start(atomic_sum<__half>)},
    {"sum_bfloat16", start(atomic_sum<__nv_bfloat16>)},
    {"sum_half2", start(atomic_sum<__half2>)},
    {"vectors", start(vectors)},
    {"shared_memory", start(shared_memory)},
    {"indices", start(indices)},
    {"deadlock", start(deadlock)},
    {"crossed_barriers", start(crossed_barriers)},
    {"polls_for_ever", start(polls_for_ever)},
    {"barrier_kinds", start(barrier_kinds)},
    {"own_lane", start(own_lane)},
    {"own_lane_votes", start(own_lane_votes)},
    {"own_lane_syncs", start(own_lane_syncs)},
    {"source_outside", start(source_outside)},
    {"source_exited", start(source_exited)},
    {"source_missing", start(source_missing)},
    {"different_calls", start(different_calls)},
    {"different_masks", start(different_masks)},
    {"wrong_width", start(wrong_width)},
    {"barrier_counts", start(barrier_counts)},
    {"barrier_short", start(barrier_short)},
    {"barrier_number", start(barrier_number)},
    {"barrier_threads", start(barrier_threads)},
    {"asserts", start(asserts)},
    {"traps", start(traps)},
    {"throws", start(throws)},
    {"endless", start(endless)},
    {"sum_overflows", start(sum_overflows)},
    {"difference_overflows", start(difference_overflows)},
    {"product_overflows", start(product_overflows)},
    {"negation_overflows", start(negation_overflows)},
    {"shift_too_far", start(shift_too_far)},
    {"divides", start(divides)},
    {"quotient_overflows", start(quotient_overflows)},
    {"index_outside", start(index_outside)},
};

}  // namespace language

namespace {

dim3 extent(const std::vector<int64_t>& sizes) {
  unsigned of[3] = {1, 1, 1};
  for (size_t i = 0; i < sizes.size(); ++i) of[i] = static_cast<unsigned>(sizes[i]);
  return {of[0], of[1], of[2]};
}

// `filled`: y holds something that the kernel may read.
void run(
    const Tensor& x, const Tensor& y, std::string kernel, std::vector<int64_t> grid, std::vector<int64_t> block,
    int64_t shared, int64_t n, bool filled) {
  const auto found = language::kernels.find(kernel);
  const Device device(x);
  const void* const from = device.in(x, "x");
  if (filled) device.in(y, "y");
  (found == language::kernels.end() ? memory_kernels().at(kernel) : found->second)(
      device, extent(grid), extent(block), shared, from, device.out(y, "y"), static_cast<int>(n));
}

}  // namespace
}  // namespace pykern

PYKERN_SCHEMAS(m) {
  m.def("run(Tensor x, Tensor(a!) y, str kernel, int[] grid, int[] block, int shared, int n, bool filled) -> ()");
}

PYKERN_KERNELS(m) { m.impl("run", TORCH_BOX(&pykern::run)); }
