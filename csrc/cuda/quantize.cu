// Host side of quantize.
#include "launch.cuh"
#include "quantize.cuh"

namespace adderops {
namespace cuda {

cudaError_t launch_quantize(const QuantizeArgs& args, cudaStream_t stream) {
  const int64_t channels = blocks(args.C, kQuantizeChannels);
  const dim3 grid((unsigned)blocks(args.N * args.H * args.W, kQuantizePixels),
                  (unsigned)(channels < 65535 ? channels : 65535));
  with_tiled_type(args.type, [&](auto element) {
    LAUNCH((quantize_kernel<decltype(element)>), grid, dim3(kQuantizeThreads), stream, args);
  });
  return cudaGetLastError();
}

}  // namespace cuda
}  // namespace adderops
