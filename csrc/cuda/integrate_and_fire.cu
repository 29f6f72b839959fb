// Host side of integrate-and-fire neurons: which calls are whole, aligned vectors.
#include "integrate_and_fire.cuh"
#include "launch.cuh"

namespace adderops {
namespace cuda {
namespace {

cudaError_t run(const IntegrateAndFireArgs& args, const Device&, const Choice&, void*, cudaStream_t stream) {
  const int64_t count = 16 / element_bytes(args.type), step = product(args.size[0], args.size[1], args.size[2]);
  const auto address = [](const void* data) { return reinterpret_cast<uintptr_t>(data); };
  const uintptr_t all = address(args.x) | address(args.spikes) | address(args.counts) | address(args.membrane);
  const bool vectors =
      args.type != ElementType::kFloat64 && step % count == 0 && args.x_step % count == 0 && all % 16 == 0;
  const dim3 grid(direct_grid(vectors ? step / count : step)), block(kDirectThreads);
  if (vectors) {
    with_tiled_type(args.type, [&](auto element) {
      LAUNCH((integrate_and_fire_kernel<decltype(element)>), grid, block, stream, args);
    });
  } else {
    with_type(args.type, [&](auto element) {
      LAUNCH((direct_integrate_and_fire_kernel<decltype(element)>), grid, block, stream, args);
    });
  }
  return cudaGetLastError();
}

}  // namespace

extern const Pass<IntegrateAndFireArgs> kIntegrateAndFire = {nullptr, run, 0};

}  // namespace cuda
}  // namespace adderops
