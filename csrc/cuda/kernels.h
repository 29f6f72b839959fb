// The contract between the CUDA binding and the kernels.  The kernels allocate nothing and do not synchronise: the
// binding hands them a workspace and a stream.  What a call computes depends on the problem and the device alone.
//
// With ADDEROPS_SIMT the same sources run on the host (tests/simt): the stream is not used and all pointers are host
// pointers.
#pragma once
#include <stddef.h>

#include "../args/conv2d.h"
#include "../args/int8.h"
#include "../args/integrate_and_fire.h"
#include "../args/match.h"
#include "../args/moments.h"
#include "../args/quantize.h"
#if !defined(ADDEROPS_SIMT)
#include <cuda_runtime_api.h>
#else
#include "simt.h"
#endif

namespace adderops {
namespace cuda {

struct Device {
  int capability;  // 10 * major + minor of the architecture whose code the device runs
  int multiprocessors;
};

// Test overrides; -1 keeps the automatic choice.  A pass ignores the members that do not apply to it.
struct Choice {
  int tile;     // below Pass::tiles; clamped to the last tile of the element type
  int layout;   // tile.cuh: 0 kStrided, 1 kChannelsLast where the tensor is
  int formula;  // forward.cuh: 0 kDistance, 1 kMinimum
};
constexpr Choice kAutomatic = {-1, -1, -1};

// One computation of an operator, with its own struct of arguments.
template <typename Args>
struct Pass {
  // Bytes that run() needs; null: none.
  int64_t (*workspace)(const Args& args, const Device& device, const Choice& choice);
  // Queues the kernels.
  cudaError_t (*run)(const Args& args, const Device& device, const Choice& choice, void* workspace,
                     cudaStream_t stream);
  int tiles;
};

extern const Pass<Conv2dArgs> kForward, kGradX, kGradW;
extern const Pass<Int8Args> kInt8;
extern const Pass<IntegrateAndFireArgs> kIntegrateAndFire;
extern const Pass<QuantizeArgs> kQuantize;
extern const Pass<List<MomentsArgs>> kMoments, kMomentsGradient;
extern const Pass<List<MeanAbsArgs>> kMeanAbs;
extern const Pass<List<MatchArgs>> kMatch;

// The passes by the names that the binding uses on every device (ops.h).
struct Kernels {
  const Pass<Conv2dArgs>*forward = &kForward, *grad_x = &kGradX, *grad_w = &kGradW;
  const Pass<Int8Args>* int8 = &kInt8;
  const Pass<IntegrateAndFireArgs>* integrate_and_fire = &kIntegrateAndFire;
  const Pass<QuantizeArgs>* quantize = &kQuantize;
  const Pass<List<MomentsArgs>>*moments = &kMoments, *moments_gradient = &kMomentsGradient;
  const Pass<List<MeanAbsArgs>>* mean_abs = &kMeanAbs;
  const Pass<List<MatchArgs>>* match = &kMatch;
};

}  // namespace cuda
}  // namespace adderops
