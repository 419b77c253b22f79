// The values of a 4-bit weight, in its order.

#include "../dequantize_4bit.h"

#include "decode_4bit.h"

namespace pykern {
namespace {

template <class T>
void dequantize(const Weight4bit& weight, int64_t begin, int64_t end, void* out, bool past_caches) {
  decode(weight, begin, end, static_cast<T*>(out) + begin, past_caches);
}

}  // namespace
}  // namespace pykern

extern "C" const pykern::Dequantize4bitKernels PYKERN_TABLE(dequantize_4bit) = {
    {pykern::dequantize<float>, pykern::dequantize<pykern::f16>, pykern::dequantize<pykern::bf16>},
};
