// Device queries, and CUDA as a device of the operators (ops.h).
#pragma once
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"
#include "kernels.h"

namespace adderops {
namespace cuda {

// The architectures of the kernels, as TORCH_CUDA_ARCH_LIST names them: "8.0;9.0a;12.0+PTX".
std::string archs();

// Which of the architectures in a list a device of this capability runs, as 10 * major + minor, or 0: machine code of
// its generation, else the PTX nearest below it.  The driver chooses; this is its documented rule.
int64_t code_for(const std::string& archs, int64_t capability);

// The CUDA runtime in the library, 13000 for 13.0.
int64_t version();

// Raises a status that is not success.
void check(const char* op, cudaError_t status);

// The device with this index; raises where none of the kernels runs on it.
Device properties(const char* op, int index);

// The stream on which torch queues work for the device with this index.
cudaStream_t current_stream(int index);

struct Cuda {
  using Kernels = cuda::Kernels;
  static constexpr const char* kName = "a CUDA device";

  // Queues a pass on the current stream of x's device.  The workspace is freed while the kernels may still run: torch's
  // allocator hands its memory only to work queued later on the same stream.
  template <typename Args>
  static void run(const char* op, const Tensor& x, const Pass<Args>* Kernels::* pass, const Args& args) {
    const int index = x.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(index);
    const Device device = properties(op, index);
    const Pass<Args>& p = *(Kernels().*pass);
    const int64_t bytes = p.workspace ? p.workspace(args, device, kAutomatic) : 0;
    std::optional<Tensor> workspace;
    if (bytes) workspace = empty(op, x, {bytes}, ScalarType::Byte);
    check(op, p.run(args, device, kAutomatic, workspace ? workspace->data_ptr() : nullptr, current_stream(index)));
  }
};

}  // namespace cuda
}  // namespace adderops
