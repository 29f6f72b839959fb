// Host side of the forward pass: which kernel, which tile, what grid.
#include "forward.cuh"
#include "forward_half.cuh"
#include "launch.cuh"

namespace adderops {
namespace cuda {
namespace {

constexpr TileSize kTiles[] = {{128, 128}, {64, 128}, {32, 128}, {16, 128}, {64, 64}};
// The halves use these on sm_75 only, where they reach shared memory through registers: fewer blocks fit.
template <typename T>
using Tile0 = Tile<128, 128, 8, 8, sizeof(T) == 4 ? 2 : 1>;
using Tile1 = Tile<64, 128, 8, 8, 3>;
using Tile2 = Tile<32, 128, 4, 8, 4>;
using Tile3 = Tile<16, 128, 4, 4, 6>;
using Tile4 = Tile<64, 64, 8, 4, 5>;

// Tiles for the halves, from sm_80 on.
constexpr TileSize kMmaTiles[] = {{64, 128}, {32, 128}, {16, 128}};
using MmaTile0 = MmaTile<64, 128, 64, 32, 3>;
using MmaTile1 = MmaTile<32, 128, 32, 32, 4>;
using MmaTile2 = MmaTile<16, 128, 16, 32, 4>;

struct ForwardPlan {
  bool direct, mma;
  Formula formula;
  Layout layout;
  int tile;
  dim3 grid;
  PackedWeights weights;
  int* flags;  // one per tile
  int64_t bytes;
};

ForwardPlan plan(const Conv2dArgs& args, const Device& device, const Choice& choice, void* workspace) {
  const Conv2dProblem& p = args.problem;
  const int64_t M = p.C_out / p.groups, C = p.C_in / p.groups, P = product(p.N, p.OH, p.OW);
  const int64_t bytes = element_bytes(args.type);
  ForwardPlan f{};
  f.direct = is_direct(args);
  if (f.direct) return f;
  f.mma = bytes == 2 && device.capability >= 80;
  // min and add run on different pipes: no gain where there are twice as many FP32 units (8.6, 9.0, ...)
  const bool minimum = choice.formula >= 0 ? choice.formula == (int)Formula::kMinimum : device.capability <= 80;
  f.formula = minimum && device.capability <= 80 ? Formula::kMinimum : Formula::kDistance;
  f.layout = pick_layout(supports_channels(args.x, C, bytes), choice);
  Arena arena{static_cast<char*>(workspace), 0};
  TileSize size;
  if (f.mma) {
    f.tile = pick_tile(kMmaTiles, M, P, p.groups, device, choice);
    size = kMmaTiles[f.tile];
  } else {
    f.tile = pick_tile(kTiles, M, P, p.groups, device, choice);
    size = kTiles[f.tile];
  }
  f.grid = dim3((unsigned)ceil_div(P, size.n), (unsigned)ceil_div(M, size.m), (unsigned)p.groups);
  f.weights =
      f.mma ? plan_packed(p, M, C, size.m, kMmaSlab, 2, &arena) : plan_packed(p, M, C, size.m, kSlab, 4, &arena);
  f.flags = arena.take<int>(product(f.grid.x, f.grid.y, f.grid.z));
  f.bytes = arena.used;
  return f;
}

GemmParams params_of(const Conv2dArgs& args, int slab, int64_t slab_bytes) {
  const Conv2dProblem& p = args.problem;
  GemmParams params = gemm_params(args.x, element_bytes(args.type), p.H, p.W, p.C_in / p.groups);
  params.taps_h = (int)p.KH, params.taps_w = (int)p.KW;
  params.dilation_h = (int)p.dilation_h, params.dilation_w = (int)p.dilation_w;
  const int64_t slabs = ceil_div(params.channels, slab);
  set_slabs(&params, slab, slab_bytes, p.KW * slabs, slabs);
  return params;
}

// `formula`: the plan's, or, launched after its minimum formula, kDistance for the flagged tiles.
template <typename T, typename Tile, Layout L>
void launch_formula(const Conv2dArgs& args, const ForwardPlan& f, Formula formula, cudaStream_t stream) {
  const GemmParams params = params_of(args, kSlab, kSlab * (int64_t)f.weights.pitch * 4);
  const dim3 block(Tile::kThreads);
  if (formula == Formula::kMinimum)
    LAUNCH((forward_kernel<T, Tile, L, Formula::kMinimum>), f.grid, block, stream, args, params, f.weights, f.flags,
           false);
  else
    LAUNCH((forward_kernel<T, Tile, L, Formula::kDistance>), f.grid, block, stream, args, params, f.weights, f.flags,
           formula != f.formula);
}
template <typename T, typename Tile>
void launch_tile(const Conv2dArgs& args, const ForwardPlan& f, Formula formula, cudaStream_t stream) {
  if (f.layout == Layout::kStrided)
    launch_formula<T, Tile, Layout::kStrided>(args, f, formula, stream);
  else
    launch_formula<T, Tile, Layout::kChannelsLast>(args, f, formula, stream);
}
template <typename T>
void launch_tiles(const Conv2dArgs& args, const ForwardPlan& f, Formula formula, cudaStream_t stream) {
  switch (f.tile) {
    case 0: return launch_tile<T, Tile0<T>>(args, f, formula, stream);
    case 1: return launch_tile<T, Tile1>(args, f, formula, stream);
    case 2: return launch_tile<T, Tile2>(args, f, formula, stream);
    case 3: return launch_tile<T, Tile3>(args, f, formula, stream);
    case 4: return launch_tile<T, Tile4>(args, f, formula, stream);
  }
}

template <typename T, typename Tile>
void launch_mma_tile(const Conv2dArgs& args, const ForwardPlan& f, cudaStream_t stream) {
  const GemmParams params = params_of(args, kMmaSlab, kMmaSlab * (int64_t)f.weights.pitch * 2);
  if (f.layout == Layout::kStrided)
    LAUNCH((forward_half_kernel<T, Tile, Layout::kStrided>), f.grid, dim3(Tile::kThreads), stream, args, params,
           f.weights, f.flags);
  else
    LAUNCH((forward_half_kernel<T, Tile, Layout::kChannelsLast>), f.grid, dim3(Tile::kThreads), stream, args, params,
           f.weights, f.flags);
  LAUNCH((forward_repair_kernel<T>), f.grid, dim3(kRepairThreads), stream, args, Tile::kM, Tile::kN, f.flags);
}

template <typename T>
void launch(const Conv2dArgs& args, const ForwardPlan& f, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (f.mma) {
      pack<T, Packing::kMma>(args, f.weights, stream);
      if (f.tile == 0) launch_mma_tile<T, MmaTile0>(args, f, stream);
      if (f.tile == 1) launch_mma_tile<T, MmaTile1>(args, f, stream);
      if (f.tile == 2) launch_mma_tile<T, MmaTile2>(args, f, stream);
      return;
    }
  }
  pack<T, Packing::kForward>(args, f.weights, stream);
  launch_tiles<T>(args, f, f.formula, stream);
  if (f.formula == Formula::kMinimum) launch_tiles<T>(args, f, Formula::kDistance, stream);
}

int64_t workspace(const Conv2dArgs& args, const Device& device, const Choice& choice) {
  return plan(args, device, choice, nullptr).bytes;
}

cudaError_t run(const Conv2dArgs& args, const Device& device, const Choice& choice, void* workspace,
                cudaStream_t stream) {
  const Conv2dProblem& p = args.problem;
  const ForwardPlan f = plan(args, device, choice, workspace);
  if (f.direct)
    with_type(args.type, [&](auto element) {
      LAUNCH((direct_forward_kernel<decltype(element)>), dim3(direct_grid(p.N * p.C_out * p.OH * p.OW)),
             dim3(kDirectThreads), stream, args);
    });
  else
    with_tiled_type(args.type, [&](auto element) { launch<decltype(element)>(args, f, stream); });
  return cudaGetLastError();
}

}  // namespace

extern const Pass<Conv2dArgs> kForward = {workspace, run, sizeof(kTiles) / sizeof(kTiles[0])};

}  // namespace cuda
}  // namespace adderops
