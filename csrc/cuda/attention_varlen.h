// What attention_varlen.cu asks of attention_varlen_pages.cu, a file of its own so that both compile at the same time.

#pragma once

#include <pykern/attention_varlen.cuh>

namespace pykern {

using PackedForwardKernel = void (*)(const PackedForwardArgs);

template <class T, bool kPaged>
PackedForwardKernel packed_forward_of(int size, bool softcap) {
  const auto either = [&]<int kSize>(std::integral_constant<int, kSize>) -> PackedForwardKernel {
    return softcap ? &attention_varlen_forward<T, kSize, true, kPaged>
                   : &attention_varlen_forward<T, kSize, false, kPaged>;
  };
  switch (size) {
    case 32: return either(std::integral_constant<int, 32>());
    case 64: return either(std::integral_constant<int, 64>());
    case 128: return either(std::integral_constant<int, 128>());
    default: return either(std::integral_constant<int, 256>());
  }
}

PackedForwardKernel paged_forward_kernel(DType dtype, int size, bool softcap);

}  // namespace pykern
