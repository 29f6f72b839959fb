#include "device.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <unordered_map>

#if !defined(ADDEROPS_CUDA_ARCHS)
#error "ADDEROPS_CUDA_ARCHS: the architectures of the kernels, as TORCH_CUDA_ARCH_LIST names them (setup.py)"
#endif

namespace adderops {
namespace cuda {

std::string archs() { return ADDEROPS_CUDA_ARCHS; }

int64_t code_for(const std::string& archs, int64_t capability) {
  int64_t machine_code = 0, ptx = 0;
  for (size_t at = 0; at < archs.size();) {
    const size_t end = std::min(archs.find(';', at), archs.size());
    const std::string arch = archs.substr(at, end - at);
    at = end + 1;
    const size_t dot = arch.find('.');
    if (dot == std::string::npos) continue;
    const int64_t major = std::atoll(arch.c_str()), code = 10 * major + (arch[dot + 1] - '0');
    const bool exact = dot + 2 < arch.size() && arch[dot + 2] != '+';  // 9.0a: this one capability only
    if (code > capability || (exact && code != capability)) continue;
    if (major == capability / 10) machine_code = std::max(machine_code, code);
    if (arch.find("+PTX") != std::string::npos) ptx = std::max(ptx, code);
  }
  return machine_code ? machine_code : ptx;
}

int64_t version() { return CUDART_VERSION; }

void check(const char* op, cudaError_t status) {
  REQUIRE(status == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(status));
}

// Cached per device: a call takes microseconds, and so would the queries.
Device properties(const char* op, int index) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  int major = 0, minor = 0, multiprocessors = 0;
  check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  check(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  check(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  // Some kernels are empty in the code for some architectures: the code that runs counts, not the device.
  const int64_t code = code_for(ADDEROPS_CUDA_ARCHS, 10 * major + minor);
  REQUIRE(code, op, ": x: expected a device that runs kernels for ", ADDEROPS_CUDA_ARCHS, ", got one of ", major, ".",
          minor, "; build adderops with TORCH_CUDA_ARCH_LIST=", major, ".", minor);
  return known[index] = {static_cast<int>(code), multiprocessors};
}

// Not torch::stable::accelerator::Stream, which gives access to its cudaStream_t only from torch 2.13 on.
cudaStream_t current_stream(int index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace cuda
}  // namespace adderops
