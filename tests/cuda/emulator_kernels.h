// What emulator_language.cu and emulator_memory.cu share: kernels of any types, to be started by their names.

#pragma once

#include <cuda/launch.h>

#include <functional>
#include <map>
#include <string>

namespace pykern {

using Start = std::function<void(const Device&, dim3 grid, dim3 block, size_t shared, const void* x, void* y, int n)>;
using Kernels = std::map<std::string, Start>;

template <class X, class Y>
Start start(void (*kernel)(const X*, Y*, int)) {
  return [kernel](const Device& device, dim3 grid, dim3 block, size_t shared, const void* x, void* y, int n) {
    device.launch(kernel, grid, block, shared, static_cast<const X*>(x), static_cast<Y*>(y), n);
  };
}

const Kernels& memory_kernels();  // of emulator_memory.cu

}  // namespace pykern
