#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "norm.h"

namespace pykern {

namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "none"};

bool machine_has(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::avx512)
    return machine_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
  return isa == Isa::baseline;
}

// The build links a set for every family or for none, so one family tells for all.
bool library_has(Isa isa) {
  const NormKernels* const tables[] = {&norm_baseline, &norm_avx2, &norm_avx512};
  return tables[static_cast<int>(isa)] != nullptr;
}

Isa find_isa() {
  const char* const wanted = std::getenv("PYKERN_ISA");
  Isa best = Isa::none;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (!machine_has(isa) || !library_has(isa)) continue;
    if (wanted && !std::strcmp(wanted, kNames[static_cast<int>(isa)])) return isa;
    best = isa;
  }
  return best;
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = find_isa();
  return isa;
}

}  // namespace pykern

extern "C" __attribute__((visibility("default"))) const char* pykern_isa() {
  return pykern::kNames[static_cast<int>(pykern::chosen_isa())];
}
