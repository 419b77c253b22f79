// Faults for compute-sanitizer to find on a GPU: only a tool that sees the one it is for has said something by silence.
// They are plain ones, which no compiler undoes; what the emulator has to see stands in faults.cu.

#include <cuda/launch.h>
#include <pykern/device.cuh>

namespace pykern {
namespace {

constexpr int kThreads = 128;

// Writes behind the end of y.
__global__ void memcheck_kernel(const float* x, float* y, int n) { y[n + threadIdx.x] = x[threadIdx.x]; }

// Reads what another warp may not have written yet.
__global__ void racecheck_kernel(const float* x, float* y, int) {
  PYKERN_SHARED(tile, float[kThreads]);
  tile[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Half of each warp goes past the barrier.
__global__ void synccheck_kernel(const float* x, float* y, int) {
  if (threadIdx.x % 2 == 0) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}

// Reads its own output, which nobody has written.
__global__ void initcheck_kernel(const float* x, float* y, int) { y[threadIdx.x] += x[threadIdx.x]; }

template <void (*kKernel)(const float*, float*, int)>
Tensor run(const Tensor& x) {
  const Device device(x);
  Tensor y = device.empty(x.sizes(), DType::f32);
  device.launch(
      kKernel, 1, kThreads, 0, static_cast<const float*>(device.in(x, "x")), static_cast<float*>(device.out(y, "y")),
      static_cast<int>(x.numel()));
  return y;
}

}  // namespace
}  // namespace pykern

PYKERN_SCHEMAS(m) {
  m.def("memcheck(Tensor x) -> Tensor");
  m.def("racecheck(Tensor x) -> Tensor");
  m.def("synccheck(Tensor x) -> Tensor");
  m.def("initcheck(Tensor x) -> Tensor");
}

PYKERN_KERNELS(m) {
  m.impl("memcheck", TORCH_BOX(&pykern::run<pykern::memcheck_kernel>));
  m.impl("racecheck", TORCH_BOX(&pykern::run<pykern::racecheck_kernel>));
  m.impl("synccheck", TORCH_BOX(&pykern::run<pykern::synccheck_kernel>));
  m.impl("initcheck", TORCH_BOX(&pykern::run<pykern::initcheck_kernel>));
}
