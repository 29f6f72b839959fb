// The contract between the CUDA binding and the kernels.  The kernels allocate nothing and synchronise nothing: the
// binding hands them a workspace and a stream.  What a call computes depends on the problem and the device alone.
//
// With ADDEROPS_SIMT the same sources run on the host (tests/simt): the stream is not used and all pointers are the host's.
#pragma once
#include <stddef.h>

#include "../conv2d_problem.h"
#if !defined(ADDEROPS_SIMT)
#include <cuda_runtime_api.h>
#else
#include "simt.h"
#endif

namespace adderops {
namespace cuda {

struct Device {
  int capability;       // 10 * major + minor
  int multiprocessors;
};

// A choice of the tile instead of the table's: for tests, which run them all.  -1: the table's.
struct Choice {
  int tile;
  int layout;  // tile.cuh: kPlanes serves any strides; kChannels only where supports_channels() says so
  int form;    // forward, float32: 0 direct, 1 minimum
};
constexpr Choice kAutomatic = {-1, -1, -1};

struct Pass {
  // Bytes that run() needs, or -1: no tile serves the problem on this device, which `why` then says.
  int64_t (*workspace)(const Conv2dArgs& args, const Device& device, const Choice& choice, const char** why);
  cudaError_t (*run)(const Conv2dArgs& args, const Device& device, const Choice& choice, void* workspace,
                     cudaStream_t stream);
  int tiles;  // how many `Choice::tile` may name
};

extern const Pass kForward, kGradX, kGradW;

}  // namespace cuda
}  // namespace adderops
