// Memory of one call, or of one thread of it.

#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace pykern {

// Uninitialised floats that begin at a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 127) / 64 * 64))) {
    STD_TORCH_CHECK(memory_, "no memory for ", floats, " floats");
  }
  float* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(float* memory) const { std::free(memory); }
  };
  std::unique_ptr<float, Free> memory_;
};

}  // namespace pykern
