// What a launcher needs of the device that its inputs are on: memory, size, and the start of kernels on the inputs'
// device and its current stream. Compiled by nvcc it is that GPU; by the emulator's g++ it is the emulator.

#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../tensors.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
// Null with a CPU build of torch, where no launcher runs.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#define PYKERN_DEVICE_KEY CUDA
#else
#include "../emulator/launch.h"
#include "../emulator/runtime.h"
#define PYKERN_DEVICE_KEY CPU
#endif

// The body registers kernels: PYKERN_KERNELS(m) { m.impl("layer_norm", TORCH_BOX(&layer_norm)); }
#define PYKERN_KERNELS(m) PYKERN_KERNELS_OF(PYKERN_NAMESPACE, PYKERN_DEVICE_KEY, m)
#define PYKERN_KERNELS_OF(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
// The body declares schemas, once a library: PYKERN_SCHEMAS(m) { m.def("layer_norm(Tensor x, …) -> …"); }
#define PYKERN_SCHEMAS(m) PYKERN_SCHEMAS_OF(PYKERN_NAMESPACE, m)
#define PYKERN_SCHEMAS_OF(ns, m) STABLE_TORCH_LIBRARY(ns, m)

namespace pykern {

class Device {
 public:
  // The device of `like` is current until this is gone.
  explicit Device(const Tensor& like);
  Device(const Device&) = delete;
  ~Device();

  Tensor empty(Sizes sizes, DType dtype) const;
  Tensor empty_bytes(Sizes sizes) const;
  Tensor empty_of(Sizes sizes, int32_t dtype) const;  // a dtype's code in torch

  // The pointer through which kernels read a tensor, and the one through which they write one that empty() made. The
  // emulator lets kernels touch nothing else; the name is for its messages.
  const void* in(const Tensor& tensor, const char* name) const;
  void* out(const Tensor& tensor, const char* name) const;

  int multiprocessors() const;
  // The most shared memory, static and dynamic, that a block may have.
  size_t shared_bytes() const;
  // How many blocks of this size one multiprocessor can hold at a time.
  template <class... Params>
  int blocks_per_multiprocessor(void (*kernel)(Params...), int threads, size_t shared_bytes) const;

  template <class... Params, class... Args>
  void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) const;

 private:
#ifdef __CUDACC__
  int attribute(cudaDeviceAttr which) const;

  int32_t index_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_;
#endif
};

#ifdef __CUDACC__

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

inline Device::Device(const Tensor& like) : index_(like.get_device_index()) {
  guard_.emplace(index_);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

inline Device::~Device() = default;

inline Tensor Device::empty(Sizes sizes, DType dtype) const {
  return pykern::empty(sizes, dtype, aoti_torch_device_type_cuda(), index_);
}

inline Tensor Device::empty_bytes(Sizes sizes) const {
  return pykern::empty_bytes(sizes, aoti_torch_device_type_cuda(), index_);
}

inline Tensor Device::empty_of(Sizes sizes, int32_t dtype) const {
  return pykern::empty_of(sizes, dtype, aoti_torch_device_type_cuda(), index_);
}

inline const void* Device::in(const Tensor& tensor, const char*) const { return tensor.data_ptr(); }
inline void* Device::out(const Tensor& tensor, const char*) const { return tensor.data_ptr(); }

inline int Device::attribute(cudaDeviceAttr which) const {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, index_), "cudaDeviceGetAttribute");
  return value;
}

inline int Device::multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
inline size_t Device::shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

// Dynamic shared memory past 48 KiB has to be asked for, once a kernel and device.
inline void allow_shared(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "shared memory");
}

template <class... Params>
int Device::blocks_per_multiprocessor(void (*kernel)(Params...), int threads, size_t shared_bytes) const {
  const void* const function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, shared_bytes);
  int count = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, threads, shared_bytes),
      "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return std::max(count, 1);
}

template <class... Params, class... Args>
void Device::launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) const {
  const void* const function = reinterpret_cast<const void*>(kernel);
  allow_shared(function, shared_bytes);
  std::tuple<Params...> values(args...);
  std::apply(
      [&](Params&... value) {
        void* pointers[] = {static_cast<void*>(&value)..., nullptr};
        check_cuda(cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream_), "kernel launch");
      },
      values);
}

#else

inline Device::Device(const Tensor&) { emulator::session_begin(); }
inline Device::~Device() { emulator::session_end(); }

inline Tensor Device::empty(Sizes sizes, DType dtype) const {
  poison_memory = true;
  return pykern::empty(sizes, dtype);
}

inline Tensor Device::empty_bytes(Sizes sizes) const {
  poison_memory = true;
  return pykern::empty_bytes(sizes);
}

inline Tensor Device::empty_of(Sizes sizes, int32_t dtype) const {
  poison_memory = true;
  return pykern::empty_of(sizes, dtype, aoti_torch_device_type_cpu(), 0);
}

inline void add_region(const Tensor& tensor, bool writable, const char* name) {
  const Sizes sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;  // the last element's offset
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return;
    last += (sizes[d] - 1) * strides[d];
  }
  const size_t granule = tensor.element_size();
  emulator::add_region(tensor.data_ptr(), (last + 1) * granule, granule, writable, !writable, name);
}

inline const void* Device::in(const Tensor& tensor, const char* name) const {
  add_region(tensor, false, name);
  return tensor.data_ptr();
}

inline void* Device::out(const Tensor& tensor, const char* name) const {
  add_region(tensor, true, name);
  return tensor.data_ptr();
}

inline int Device::multiprocessors() const { return emulator::settings().multiprocessors; }
inline size_t Device::shared_bytes() const { return emulator::kMaxSharedBytes; }

template <class... Params>
int Device::blocks_per_multiprocessor(void (*)(Params...), int threads, size_t shared_bytes) const {
  return emulator::blocks_per_multiprocessor(threads, shared_bytes);
}

template <class... Params, class... Args>
void Device::launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, const Args&... args) const {
  // Every thread gets its own copy of the arguments, as on a GPU. Making it is none of the kernel's accesses.
  const std::tuple<Params...> values(args...);
  const auto call = [kernel](const Params&... value) __attribute__((no_sanitize("thread"))) { kernel(value...); };
  emulator::launch(
      reinterpret_cast<const void*>(kernel), grid, block, shared_bytes, [&] { std::apply(call, values); });
}

#endif

}  // namespace pykern
