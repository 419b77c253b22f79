// Three CUDA kernels for the ledger. Each has a macro that costs what a ledger must notice.

#include <cstdint>

#ifdef FAULT_SPILL
constexpr int kThreads = 1024;  // leaves 64 registers to a thread
#else
constexpr int kThreads = 128;
#endif

__global__ void __launch_bounds__(kThreads) reverse(const float* x, float* y) {  // which may overlap
  float values[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) values[i] = x[i * kThreads + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) y[i * kThreads + threadIdx.x] = values[95 - i] * values[0];
}

#ifdef FAULT_SCALAR
using Access = float;
#else
using Access = float4;
#endif

__global__ void copy(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) reinterpret_cast<Access*>(y)[i] = reinterpret_cast<const Access*>(x)[i];
}

__global__ void multiply(const uint4* __restrict__ a, const uint2* __restrict__ b, float4* __restrict__ c) {
  const uint4 left = a[threadIdx.x];
  const uint2 right = b[threadIdx.x];
  float4 sum = c[threadIdx.x];
#ifdef FAULT_TENSOR
  sum.x += __uint_as_float(left.x) * __uint_as_float(right.x) + __uint_as_float(left.y) * __uint_as_float(right.y);
  sum.y += __uint_as_float(left.z) * __uint_as_float(right.x) + __uint_as_float(left.w) * __uint_as_float(right.y);
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum.x), "+f"(sum.y), "+f"(sum.z), "+f"(sum.w)
      : "r"(left.x), "r"(left.y), "r"(left.z), "r"(left.w), "r"(right.x), "r"(right.y));
#endif
  c[threadIdx.x] = sum;
}
