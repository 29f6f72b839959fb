// The passes of csrc/cuda/kernels.h, run on the host, for ctypes (host.py).
#include <stdlib.h>
#include <string.h>

#include <string>

#include "cuda/kernels.h"
#include "executor.h"
#include "race_checker.h"
#include "simt_interface.h"

namespace {

using adderops::Conv2dArgs;
using adderops::cuda::Choice;
using adderops::cuda::Device;
using Pass = adderops::cuda::Pass<Conv2dArgs>;

const Pass* pass_named(int pass) {
  const Pass* const passes[] = {&adderops::cuda::kForward, &adderops::cuda::kGradX, &adderops::cuda::kGradW};
  return pass >= 0 && pass < 3 ? passes[pass] : nullptr;
}

// Exactly as long as asked for, the padding around it out of bounds.
struct Workspace {
  char *memory, *data;
  size_t bytes;
  explicit Workspace(size_t bytes) : bytes(bytes) {
    memory = static_cast<char*>(aligned_alloc(256, (bytes + 2 * simt::kPadding + 255) / 256 * 256));
    data = memory + simt::kPadding;
    memset(memory, simt::settings.poison, bytes + 2 * simt::kPadding);
    simt_watch("workspace", data, int64_t(bytes), 1, 0, nullptr);
  }
  bool overrun() const {
    return simt::written(memory, data, simt::settings.poison) ||
           simt::written(data + bytes, data + bytes + simt::kPadding, simt::settings.poison);
  }
  ~Workspace() { free(memory); }
};

std::string message;

}  // namespace

extern "C" {

EXPORTED int simt_tiles(int pass) { return pass_named(pass) ? pass_named(pass)->tiles : -1; }

EXPORTED int64_t simt_workspace(int pass, const Conv2dArgs* args, const Device* device, const Choice* choice) {
  return pass_named(pass)->workspace(*args, *device, *choice);
}

// Null, or why not.  Forgets the arrays that simt_watch() named.
EXPORTED const char* simt_run(int pass, const Conv2dArgs* args, const Device* device, const Choice* choice) {
  const int64_t bytes = simt_workspace(pass, args, device, choice);
  Workspace workspace((size_t(bytes)));
  simt::clear_error();
  const cudaError_t error = pass_named(pass)->run(*args, *device, *choice, workspace.data, nullptr);
  simt_forget();
  message.clear();
  if (simt::error())
    message = simt::error();
  else if (error != cudaSuccess)
    message = "cudaError_t " + std::to_string(int(error));
  else if (workspace.overrun())
    message = "writes beyond the workspace of " + std::to_string(bytes) + " bytes";
  return message.empty() ? nullptr : message.c_str();
}
}
