// The passes of csrc/cuda/kernels.h, run on the host, for ctypes (host.py).
#include <stdlib.h>
#include <string.h>

#include <string>

#include "cuda/kernels.h"
#include "executor.h"
#include "race_checker.h"
#include "simt_interface.h"

namespace adderops {
namespace cuda {
// A library holds the passes that a test needs: the others are null.
extern const Pass<Conv2dArgs> kForward __attribute__((weak)), kGradX __attribute__((weak)),
    kGradW __attribute__((weak));
extern const Pass<Int8Args> kInt8 __attribute__((weak));
extern const Pass<IntegrateAndFireArgs> kIntegrateAndFire __attribute__((weak));
extern const Pass<QuantizeArgs> kQuantize __attribute__((weak));
extern const Pass<List<MomentsArgs>> kMoments __attribute__((weak)), kMomentsGradient __attribute__((weak));
extern const Pass<List<MeanAbsArgs>> kMeanAbs __attribute__((weak));
extern const Pass<List<MatchArgs>> kMatch __attribute__((weak));
}  // namespace cuda
}  // namespace adderops

namespace {

using namespace adderops;
using adderops::cuda::Choice;
using adderops::cuda::Device;

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

template <typename Args>
std::string run(const cuda::Pass<Args>* pass, const void* pass_args, const Device& device, const Choice& choice) {
  if (!pass) return "the library has no such pass";
  const Args& args = *static_cast<const Args*>(pass_args);
  const int64_t bytes = pass->workspace ? pass->workspace(args, device, choice) : 0;
  Workspace workspace((size_t(bytes)));
  simt::clear_error();
  const cudaError_t error = pass->run(args, device, choice, workspace.data, nullptr);
  simt_forget();
  if (simt::error()) return simt::error();
  if (error != cudaSuccess) return "cudaError_t " + std::to_string(int(error));
  if (workspace.overrun()) return "writes beyond the workspace of " + std::to_string(bytes) + " bytes";
  return "";
}

// f(the pass of a number): PASSES of host.py.
template <typename F>
auto with_pass(int pass, const F& f) {
  switch (pass) {
    case 0: return f(&cuda::kForward);
    case 1: return f(&cuda::kGradX);
    case 2: return f(&cuda::kGradW);
    case 3: return f(&cuda::kInt8);
    case 4: return f(&cuda::kQuantize);
    case 5: return f(&cuda::kMoments);
    case 6: return f(&cuda::kMomentsGradient);
    case 7: return f(&cuda::kMeanAbs);
    case 8: return f(&cuda::kMatch);
    default: return f(&cuda::kIntegrateAndFire);
  }
}

}  // namespace

extern "C" {

EXPORTED int simt_tiles(int pass) {
  return with_pass(pass, [](const auto* p) { return p ? p->tiles : -1; });
}

// Runs a pass on its struct of arguments.  Null, or the error.  Forgets the arrays that simt_watch() named.
EXPORTED const char* simt_run(int pass, const void* args, const Device* device, const Choice* choice) {
  static std::string message;
  message = with_pass(pass, [&](const auto* p) { return run(p, args, *device, *choice); });
  return message.empty() ? nullptr : message.c_str();
}

EXPORTED void simt_set_epilogue_bounds(Int8Args* args, int relu, int zero_point, int quant_max) {
  set_epilogue_bounds(args, relu, zero_point, quant_max);
}

// The size of a struct that host.py copies field by field; -1 for another name.
EXPORTED int simt_sizeof(const char* name) {
#define ADDEROPS_SIZE(type) \
  if (!strcmp(name, #type)) return sizeof(type);
  ADDEROPS_SIZE(Conv2dProblem)
  ADDEROPS_SIZE(Operand)
  ADDEROPS_SIZE(Conv2dArgs)
  ADDEROPS_SIZE(Int8Args)
  ADDEROPS_SIZE(QuantizeArgs)
  ADDEROPS_SIZE(NeuronParameter)
  ADDEROPS_SIZE(IntegrateAndFireArgs)
  ADDEROPS_SIZE(MomentsArgs)
  ADDEROPS_SIZE(MeanAbsArgs)
  ADDEROPS_SIZE(MatchArgs)
  if (!strcmp(name, "List")) return sizeof(List<MatchArgs>);
  ADDEROPS_SIZE(Device)
  ADDEROPS_SIZE(Choice)
#undef ADDEROPS_SIZE
  return -1;
}
}
