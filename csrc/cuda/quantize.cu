// Host side of quantize.
#include "launch.cuh"
#include "quantize.cuh"

namespace adderops {
namespace cuda {
namespace {

cudaError_t run(const QuantizeArgs& args, const Device&, const Choice&, void*, cudaStream_t stream) {
  const int64_t channels = ceil_div(args.C, kQuantizeChannels);
  const dim3 grid((unsigned)ceil_div(args.N * args.H * args.W, kQuantizePixels),
                  (unsigned)(channels < 65535 ? channels : 65535));
  with_tiled_type(args.type, [&](auto element) {
    LAUNCH((quantize_kernel<decltype(element)>), grid, dim3(kQuantizeThreads), stream, args);
  });
  return cudaGetLastError();
}

}  // namespace

extern const Pass<QuantizeArgs> kQuantize = {nullptr, run, 0};

}  // namespace cuda
}  // namespace adderops
