// The kernels of packed attention for keys in pages.

#include "attention_varlen.h"

namespace pykern {

PackedForwardKernel paged_forward_kernel(DType dtype, int size, bool softcap) {
  return dtype == DType::f16 ? packed_forward_of<__half, true>(size, softcap)
                             : packed_forward_of<__nv_bfloat16, true>(size, softcap);
}

}  // namespace pykern
