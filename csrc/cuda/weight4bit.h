// 4-bit weights as CUDA's launchers take them.

#pragma once

#include <pykern/weight4bit.cuh>

#include <optional>
#include <type_traits>

#include "../weight4bit_ops.h"
#include "element.h"
#include "launch.h"

namespace pykern {

// A weight that kernels may read, its codes 16 bytes at a time: unaligned ones are copied.
class DeviceWeight {
 public:
  DeviceWeight(const Device& device, const WeightOf& given) : weight(given.weight) {
    for (const WeightOf::Named& named : given.tensors) device.in(named.tensor, named.name);
    if (reinterpret_cast<uintptr_t>(weight.codes) % 16 == 0) return;
    const Tensor& codes = given.tensors.front().tensor;
    copy_ = device.empty_bytes(codes.sizes());
    torch::stable::copy_(*copy_, codes);
    weight.codes = static_cast<const uint8_t*>(device.in(*copy_, "codes"));
  }

  Weight4bit weight;

 private:
  std::optional<Tensor> copy_;
};

// choose(scaling, S()), scaling the weight's as an integral_constant, S as Scales takes it.
template <class Choose>
auto by_scales(const Weight4bit& weight, const Choose& choose) {
  if (weight.scaling == Scaling::blocks) return choose(std::integral_constant<Scaling, Scaling::blocks>(), float());
  if (weight.scaling == Scaling::nested) return choose(std::integral_constant<Scaling, Scaling::nested>(), float());
  return by_element(weight.scale_type, [&](auto type) {
    return choose(std::integral_constant<Scaling, Scaling::groups>(), type);
  });
}

// Whether every chunk of 32 elements has one scale and lies in one row, so that Scales::load_chunk serves.
inline bool chunks_have_one_scale(const Weight4bit& weight) {
  if (weight.scaling != Scaling::groups) return weight.columns % kChunk == 0;
  return weight.columns % kChunk == 0 && weight.columns < 1 << 20 &&
      (weight.blocksize % kChunk == 0 || weight.blocksize >= weight.columns);
}

}  // namespace pykern
