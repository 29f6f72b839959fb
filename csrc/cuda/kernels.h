// The contract between the CUDA binding and the kernels.  The kernels allocate nothing and synchronise nothing: the
// binding hands them a workspace and a stream.  What a call computes depends on the problem and the device alone.
//
// With ADDEROPS_SIMT the same sources run on the host (tests/simt): the stream is not used and all pointers are the
// host's.
#pragma once
#include <stddef.h>

#include "../args/conv2d.h"
#include "../args/int8.h"
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

// What a test may choose in place of the tables; -1: the table's.
struct Choice {
  int tile;    // below Pass::tiles; one beyond a type's last is its last
  int layout;  // tile.cuh: 0 kPlanes, which serves any strides
  int form;    // forward.cuh: 0 kDirect, 1 kMinimum
};
constexpr Choice kAutomatic = {-1, -1, -1};

struct Pass {
  int64_t (*workspace)(const Conv2dArgs& args, const Device& device, const Choice& choice);  // bytes that run() needs
  cudaError_t (*run)(const Conv2dArgs& args, const Device& device, const Choice& choice, void* workspace,
                     cudaStream_t stream);
  int tiles;
};

extern const Pass kForward, kGradX, kGradW;

// They need no workspace.  Of `choice` the int8 convolution knows the tile, below kForwardInt8Tiles.
cudaError_t launch_forward_int8(const Int8Args& args, const Device& device, const Choice& choice, cudaStream_t stream);
extern const int kForwardInt8Tiles;
cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream);

}  // namespace cuda
}  // namespace adderops
