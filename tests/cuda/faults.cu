// One small kernel for each fault that a check must catch; `broken` puts the fault in, without it the kernel is right.

#include <cuda/launch.h>
#include <pykern/device.cuh>

namespace pykern {
namespace {

constexpr int kThreads = 128;

// y = 2 x. Broken: the last thread's mask is off by one.
template <bool kBroken>
__global__ void mask_kernel(const float* x, float* y, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kBroken ? i <= n : i < n) y[i] = 2 * x[i];
}

// y[i] = x[i ^ 1] through shared memory, a block each. Broken: no barrier between writing and reading it.
template <bool kBroken>
__global__ void barrier_kernel(const float* x, float* y, int) {
  PYKERN_SHARED(tile, float[kThreads]);
  const int i = blockIdx.x * kThreads + threadIdx.x;
  tile[threadIdx.x] = 0;
  __syncthreads();
  tile[kThreads - 1 - threadIdx.x] = x[i];
  if (!kBroken) __syncthreads();
  y[i] = tile[kThreads - 1 - (threadIdx.x ^ 1)];
}

// y = x. Broken: half of the threads meet at another barrier.
template <bool kBroken>
__global__ void divergent_kernel(const float* x, float* y, int) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (kBroken && threadIdx.x % 2) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[i] = x[i];
}

// The sum of each warp's values. Broken: the mask leaves out lanes that it reads.
template <bool kBroken>
__global__ void shuffle_kernel(const float* x, float* y, int) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float sum = x[i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kBroken ? 0xffffu : kFullWarp, sum, offset);
  y[i] = sum;
}

// y = x for rows that are `stride` apart. Broken: the offset is computed in 32 bits.
template <bool kBroken>
__global__ void offset_kernel(const float* x, float* y, int rows, int64_t stride) {
  const int row = blockIdx.x * kThreads + threadIdx.x;
  if (row >= rows) return;
  y[row] = x[kBroken ? row * static_cast<int>(stride) : row * stride];
}

// y = x through shared memory. Broken: a part of it is never written.
template <bool kBroken>
__global__ void uninitialised_kernel(const float* x, float* y, int) {
  PYKERN_SHARED(tile, float[kThreads]);
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (!kBroken || threadIdx.x < kThreads - 1) tile[threadIdx.x] = x[i];
  __syncthreads();
  y[i] = tile[threadIdx.x];
}

// y = 2 x. Broken: it doubles its input on the way.
template <bool kBroken>
__global__ void in_place_kernel(float* x, float* y, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= n) return;
  const float twice = 2 * x[i];
  if (kBroken) x[i] = twice;
  y[i] = twice;
}

// y = x. Broken: it reads 16 bytes from addresses that are multiples of 4.
template <bool kBroken>
__global__ void alignment_kernel(const float* x, float* y, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= n) return;
  if (kBroken && i + 4 <= n) {
    const float4 four = *reinterpret_cast<const float4*>(x + i);
    y[i] = four.w == four.w ? four.x : 0;
  } else {
    y[i] = x[i];
  }
}

// y[0] = the sum of x. Broken: each block adds its part when it gets there.
template <bool kBroken>
__global__ void atomic_kernel(const float* x, float* y, int n) {
  if (kBroken) {
    float sum = 0;
    for (int i = threadIdx.x; i < kThreads; i += 1) sum += x[blockIdx.x * kThreads + i];
    atomicAdd(y, sum);
  } else if (blockIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < n; ++i) sum += x[i];
    y[0] = sum;
  }
}

__global__ void zero_kernel(float* y) { *y = 0; }

// Every block waits for all others. Broken: there are more of them than fit.
__global__ void resident_kernel(unsigned* arrived, float* y) {
  if (threadIdx.x > 0) return;
  atomicAdd(arrived, 1u);
  while (*static_cast<volatile unsigned*>(arrived) < gridDim.x) __nanosleep(10);
  y[blockIdx.x] = 1;
}

// y[row] = the sum of the row, (rows, n) to (rows,). Broken: in bf16.
template <bool kBroken>
__global__ void accumulate_kernel(const __nv_bfloat16* x, __nv_bfloat16* y, int n) {
  const __nv_bfloat16* const row = x + static_cast<int64_t>(blockIdx.x) * n;
  float sum = 0;
  for (int i = 0; i < n; ++i) {
    sum += __bfloat162float(row[i]);
    if (kBroken) sum = __bfloat162float(__float2bfloat16(sum));
  }
  y[blockIdx.x] = __float2bfloat16(sum);
}

// y = x. Broken: the last block leaves its part as it was.
template <bool kBroken>
__global__ void unwritten_kernel(const float* x, float* y, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < n && (!kBroken || blockIdx.x + 1 < gridDim.x)) y[i] = x[i];
}

int blocks(int64_t n) { return static_cast<int>((n + kThreads - 1) / kThreads); }

using Elementwise = void (*)(const float*, float*, int);

template <Elementwise kRight, Elementwise kWrong>
Tensor elementwise(const Tensor& x, bool broken) {
  const Device device(x);
  Tensor y = device.empty(x.sizes(), DType::f32);
  const int n = static_cast<int>(x.numel());
  device.launch(
      broken ? kWrong : kRight, blocks(n), kThreads, 0, static_cast<const float*>(device.in(x, "x")),
      static_cast<float*>(device.out(y, "y")), n);
  return y;
}

Tensor in_place(const Tensor& x, bool broken) {
  const Device device(x);
  Tensor y = device.empty(x.sizes(), DType::f32);
  const int n = static_cast<int>(x.numel());
  float* const in = const_cast<float*>(static_cast<const float*>(device.in(x, "x")));
  device.launch(
      broken ? in_place_kernel<true> : in_place_kernel<false>, blocks(n), kThreads, 0, in,
      static_cast<float*>(device.out(y, "y")), n);
  return y;
}

Tensor offset(const Tensor& x, bool broken) {
  const Device device(x);
  Tensor y = device.empty(x.sizes(), DType::f32);
  const int rows = static_cast<int>(x.sizes()[0]);
  device.launch(
      broken ? offset_kernel<true> : offset_kernel<false>, blocks(rows), kThreads, 0,
      static_cast<const float*>(device.in(x, "x")), static_cast<float*>(device.out(y, "y")), rows, x.strides()[0]);
  return y;
}

Tensor atomic(const Tensor& x, bool broken) {
  const Device device(x);
  const int64_t one = 1;
  Tensor y = device.empty(Sizes(&one, 1), DType::f32);
  float* const out = static_cast<float*>(device.out(y, "y"));
  const int n = static_cast<int>(x.numel());
  device.launch(zero_kernel, 1, 1, 0, out);
  device.launch(
      broken ? atomic_kernel<true> : atomic_kernel<false>, blocks(n), 1, 0,
      static_cast<const float*>(device.in(x, "x")), out, n);
  return y;
}

__global__ void clear_kernel(unsigned* arrived) { *arrived = 0; }

Tensor resident(const Tensor& x, bool broken) {
  const Device device(x);
  constexpr int kFull = 1024;  // threads; then a multiprocessor holds two blocks
  const int fit = device.multiprocessors() * device.blocks_per_multiprocessor(resident_kernel, kFull, 0);
  const int64_t grid = broken ? fit + 1 : fit, one = 1;
  Tensor y = device.empty(Sizes(&grid, 1), DType::f32), arrived = device.empty(Sizes(&one, 1), DType::f32);
  unsigned* const count = static_cast<unsigned*>(device.out(arrived, "arrived"));
  device.launch(clear_kernel, 1, 1, 0, count);
  device.launch(resident_kernel, static_cast<unsigned>(grid), kFull, 0, count, static_cast<float*>(device.out(y, "y")));
  return y;
}

Tensor accumulate(const Tensor& x, bool broken) {
  const Device device(x);
  const int64_t rows = x.sizes()[0];
  Tensor y = device.empty(Sizes(&rows, 1), DType::bf16);
  device.launch(
      broken ? accumulate_kernel<true> : accumulate_kernel<false>, static_cast<unsigned>(rows), 1, 0,
      static_cast<const __nv_bfloat16*>(device.in(x, "x")), static_cast<__nv_bfloat16*>(device.out(y, "y")),
      static_cast<int>(x.sizes()[1]));
  return y;
}

}  // namespace
}  // namespace pykern

PYKERN_SCHEMAS(m) {
  for (const char* name :
       {"mask", "barrier", "divergent", "shuffle", "offset", "uninitialised", "in_place", "alignment", "atomic",
        "resident", "accumulate", "unwritten"})
    m.def((std::string(name) + "(Tensor x, bool broken) -> Tensor").c_str());
}

PYKERN_KERNELS(m) {
  using namespace pykern;
  m.impl("mask", TORCH_BOX((&elementwise<mask_kernel<false>, mask_kernel<true>>)));
  m.impl("barrier", TORCH_BOX((&elementwise<barrier_kernel<false>, barrier_kernel<true>>)));
  m.impl("divergent", TORCH_BOX((&elementwise<divergent_kernel<false>, divergent_kernel<true>>)));
  m.impl("shuffle", TORCH_BOX((&elementwise<shuffle_kernel<false>, shuffle_kernel<true>>)));
  m.impl("uninitialised", TORCH_BOX((&elementwise<uninitialised_kernel<false>, uninitialised_kernel<true>>)));
  m.impl("alignment", TORCH_BOX((&elementwise<alignment_kernel<false>, alignment_kernel<true>>)));
  m.impl("unwritten", TORCH_BOX((&elementwise<unwritten_kernel<false>, unwritten_kernel<true>>)));
  m.impl("in_place", TORCH_BOX(&in_place));
  m.impl("offset", TORCH_BOX(&offset));
  m.impl("atomic", TORCH_BOX(&atomic));
  m.impl("resident", TORCH_BOX(&resident));
  m.impl("accumulate", TORCH_BOX(&accumulate));
}
