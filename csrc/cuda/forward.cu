// Host side of the forward pass: which kernel, which tile, what grid.
#include "forward.cuh"
#include "forward_half.cuh"
#include "launch.cuh"

namespace adderops {
namespace cuda {
namespace {

constexpr TileSize kTiles[] = {{128, 128}, {64, 128}, {32, 128}, {16, 128}, {64, 64}};
// The halves, tiled so on sm_75 alone, pass through registers on their way to shared memory.
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
  Form form;
  Layout layout;
  int tile;
  dim3 grid;
  Packed packed;
  int* flags;  // one a tile
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
  // min and add run on different pipes; where there are twice as many float lanes (8.6, 9.0, ...) nothing is gained
  const bool minimum = choice.form >= 0 ? choice.form == (int)Form::kMinimum : device.capability <= 80;
  f.form = minimum && device.capability <= 80 ? Form::kMinimum : Form::kDirect;
  f.layout = pick_layout(supports_channels(args.x, C, bytes), choice);
  Carver carve{static_cast<char*>(workspace), 0};
  TileSize size;
  if (f.mma) {
    f.tile = pick_tile(kMmaTiles, M, P, p.groups, device, choice);
    size = kMmaTiles[f.tile];
  } else {
    f.tile = pick_tile(kTiles, M, P, p.groups, device, choice);
    size = kTiles[f.tile];
  }
  f.grid = dim3((unsigned)blocks(P, size.columns), (unsigned)blocks(M, size.lanes), (unsigned)p.groups);
  f.packed = f.mma ? make_packed(p, M, C, size.lanes, kMmaSlab, 2, &carve)
                   : make_packed(p, M, C, size.lanes, kSlab, 4, &carve);
  f.flags = carve.take<int>(product(f.grid.x, f.grid.y, f.grid.z));
  f.bytes = carve.used;
  return f;
}

Walk walk_of(const Conv2dArgs& args, int slab, int64_t slab_bytes) {
  const Conv2dProblem& p = args.problem;
  const int64_t bytes = element_bytes(args.type);
  const int64_t* stride = args.x.stride;
  Walk w{};
  w.source = args.x.data;
  w.image = stride[0] * bytes, w.channel = stride[1] * bytes, w.row = stride[2] * bytes, w.column = stride[3] * bytes;
  w.H = (int)p.H, w.W = (int)p.W, w.channels = (int)(p.C_in / p.groups);
  w.taps_h = (int)p.KH, w.taps_w = (int)p.KW;
  w.step_h = (int)p.dilation_h, w.step_w = (int)p.dilation_w;
  const int64_t slabs = blocks(w.channels, slab);
  set_steps(&w, slab, slab_bytes, p.KW * slabs, slabs);
  return w;
}

// `form` is the plan's, or, behind its minimum form, the direct one for the flagged tiles.
template <typename T, typename Tile, Layout L>
void launch_form(const Conv2dArgs& args, const ForwardPlan& f, Form form, cudaStream_t stream) {
  const PackedWeights& weights = f.packed.weights;
  const Walk walk = walk_of(args, kSlab, kSlab * (int64_t)weights.pitch * 4);
  const dim3 block(Tile::kThreads);
  if (form == Form::kMinimum)
    LAUNCH((forward_kernel<T, Tile, L, Form::kMinimum>), f.grid, block, stream, args, walk, weights, f.flags, false);
  else
    LAUNCH((forward_kernel<T, Tile, L, Form::kDirect>), f.grid, block, stream, args, walk, weights, f.flags,
           form != f.form);
}
template <typename T, typename Tile>
void launch_tile(const Conv2dArgs& args, const ForwardPlan& f, Form form, cudaStream_t stream) {
  if (f.layout == Layout::kPlanes)
    launch_form<T, Tile, Layout::kPlanes>(args, f, form, stream);
  else
    launch_form<T, Tile, Layout::kChannels>(args, f, form, stream);
}
template <typename T>
void launch_tiles(const Conv2dArgs& args, const ForwardPlan& f, Form form, cudaStream_t stream) {
  switch (f.tile) {
    case 0: return launch_tile<T, Tile0<T>>(args, f, form, stream);
    case 1: return launch_tile<T, Tile1>(args, f, form, stream);
    case 2: return launch_tile<T, Tile2>(args, f, form, stream);
    case 3: return launch_tile<T, Tile3>(args, f, form, stream);
    case 4: return launch_tile<T, Tile4>(args, f, form, stream);
  }
}

template <typename T, typename Tile>
void launch_mma_tile(const Conv2dArgs& args, const ForwardPlan& f, cudaStream_t stream) {
  const PackedWeights& weights = f.packed.weights;
  const Walk walk = walk_of(args, kMmaSlab, kMmaSlab * (int64_t)weights.pitch * 2);
  if (f.layout == Layout::kPlanes)
    LAUNCH((forward_half_kernel<T, Tile, Layout::kPlanes>), f.grid, dim3(Tile::kThreads), stream, args, walk, weights,
           f.flags);
  else
    LAUNCH((forward_half_kernel<T, Tile, Layout::kChannels>), f.grid, dim3(Tile::kThreads), stream, args, walk, weights,
           f.flags);
  LAUNCH((forward_repair_kernel<T>), f.grid, dim3(kRepairThreads), stream, args, Tile::kLanes, Tile::kColumns, f.flags);
}

template <typename T>
void launch(const Conv2dArgs& args, const ForwardPlan& f, cudaStream_t stream) {
  if constexpr (sizeof(T) == 2) {
    if (f.mma) {
      pack<T, Packing::kMma>(args, f.packed, stream);
      if (f.tile == 0) launch_mma_tile<T, MmaTile0>(args, f, stream);
      if (f.tile == 1) launch_mma_tile<T, MmaTile1>(args, f, stream);
      if (f.tile == 2) launch_mma_tile<T, MmaTile2>(args, f, stream);
      return;
    }
  }
  pack<T, Packing::kForward>(args, f.packed, stream);
  launch_tiles<T>(args, f, f.form, stream);
  if (f.form == Form::kMinimum) launch_tiles<T>(args, f, Form::kDirect, stream);
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
      LAUNCH((direct_kernel<decltype(element), Gradient::kNone>), dim3(direct_grid(p.N * p.C_out * p.OH * p.OW)),
             dim3(kDirectThreads), stream, args, p.N, p.C_out, p.OH, p.OW);
    });
  else
    with_tiled_type(args.type, [&](auto element) { launch<decltype(element)>(args, f, stream); });
  return cudaGetLastError();
}

}  // namespace

extern const Pass<Conv2dArgs> kForward = {workspace, run, sizeof(kTiles) / sizeof(kTiles[0])};

}  // namespace cuda
}  // namespace adderops
