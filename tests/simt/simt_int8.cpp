// The int8 kernels of csrc/cuda/kernels.h, run on the host, for ctypes (host_int8.py).
#include <string>

#include "cuda/kernels.h"
#include "executor.h"
#include "simt_interface.h"

namespace {

std::string message;

// Null, or why not.  Forgets the arrays that simt_watch() named.
template <typename Run>
const char* message_of(const Run& run) {
  simt::clear_error();
  const cudaError_t error = run();
  simt_forget();
  message.clear();
  if (simt::error())
    message = simt::error();
  else if (error != cudaSuccess)
    message = "cudaError_t " + std::to_string(int(error));
  return message.empty() ? nullptr : message.c_str();
}

}  // namespace

extern "C" {

EXPORTED int simt_int8_tiles() { return adderops::cuda::kInt8.tiles; }

EXPORTED const char* simt_forward_int8(const adderops::Int8Args* args, const adderops::cuda::Device* device,
                                       const adderops::cuda::Choice* choice) {
  return message_of([&] { return adderops::cuda::kInt8.run(*args, *device, *choice, nullptr, nullptr); });
}

EXPORTED const char* simt_quantize(const adderops::QuantizeArgs* args) {
  return message_of([&] { return adderops::cuda::kQuantize.run(*args, {}, adderops::cuda::kAutomatic, nullptr, nullptr); });
}
}
