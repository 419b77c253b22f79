// pykern._introspect: what the compiler and the processor say of themselves. Host only; no tensor crosses it.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

namespace py = pybind11;

namespace {

std::map<std::string, std::string> build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "g++ " __VERSION__;
#endif
  return {
      {"compiler", compiler},
      {"pybind11", PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR)},
      {"python", PY_VERSION},
  };
}

std::map<std::string, bool> cpu_features() {
  std::map<std::string, bool> features;
#if defined(__x86_64__)
#define FEATURE(name) features[name] = __builtin_cpu_supports(name)
  FEATURE("avx2");
  FEATURE("fma");
  FEATURE("f16c");
  FEATURE("avx512f");
  FEATURE("avx512bw");
  FEATURE("avx512dq");
  FEATURE("avx512vl");
  FEATURE("avx512vnni");
  FEATURE("avx512bf16");
#undef FEATURE
#endif
  return features;
}

}  // namespace

PYBIND11_MODULE(_introspect, m) {
  m.doc() = "What the compiler and the processor say of themselves.";
  m.def("build_info", &build_info, "Compiler and versions that this module was built with.");
  m.def("cpu_features", &cpu_features, "Instruction sets that kernels may use, and whether this processor has them.");
}
