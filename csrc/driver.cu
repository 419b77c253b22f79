// Whether CUDA kernels can run on this machine, found out without making a context on any device.

#include <cuda_runtime.h>

#include <string>

namespace {

std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }

std::string problem() {
  int driver = 0, runtime = 0, count = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) return "no NVIDIA driver was found";
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) return "the CUDA runtime does not answer";
  // A driver serves every runtime of its own major version.
  if (driver / 1000 < runtime / 1000)
    return "the NVIDIA driver supports CUDA " + version(driver) + ", but pykern was built with CUDA " +
        version(runtime) + ": a newer driver is needed (CUDA 13 takes 580 or later)";
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no CUDA device can be used: ") + cudaGetErrorString(error);
  std::string seen;
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (major >= 8) return "";
    seen += (device ? ", " : "") + std::to_string(major) + "." + std::to_string(minor);
  }
  return "kernels need a device of compute capability 8.0 or later, not " + seen;
}

}  // namespace

// Null if they can, else the reason. The text lives as long as the process, and the answer does not change.
extern "C" __attribute__((visibility("default"))) const char* pykern_cuda_problem() {
  static const std::string text = problem();
  return text.empty() ? nullptr : text.c_str();
}
