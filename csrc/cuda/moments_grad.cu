// Host side of the gradient through the moments: which tile for a layer, which layers in a launch.
#include "launch_lists.cuh"
#include "moments_grad.cuh"

namespace adderops {
namespace cuda {
namespace {

constexpr TileSize kTiles[] = {{16, 128}, {32, 128}, {64, 128}};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);
using Tile0 = Tile<16, 128, 4, 4, 4>;
using Tile1 = Tile<32, 128, 4, 8, 4>;
using Tile2 = Tile<64, 128, 8, 8, 3>;

// The smallest tile that holds all channels of the student, or the largest.
int pick(const MomentsArgs& args, const Choice& choice) {
  if (choice.tile >= 0) return choice.tile < kTileCount ? choice.tile : kTileCount - 1;
  int tile = 0;
  while (tile + 1 < kTileCount && args.C[0] > kTiles[tile].m) ++tile;
  return tile;
}

// Calls launch(a list, its blocks, its blocks of the kernel of the weights) for the layers with this tile and layout.
template <typename Launch>
void for_lists(const List<MomentsArgs>& all, const Choice& choice, int tile, Layout layout, Arena* arena,
               const Launch& launch) {
  MomentsGradList list;
  list.count = 0;
  int64_t blocks = 0, of_weights = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    const MomentsArgs& args = all.items[i];
    if (pick(args, choice) != tile || pick_layout(args, choice) != layout) continue;
    MomentsGradLayer& layer = list.layers[list.count++];
    for (int k = 0; k < 2; ++k) layer.y[k] = feature_of(args, k, kSlab);
    layer.pixels = pixels_of(args);
    const int64_t features = layer.y[0].padded + layer.y[1].padded, pitch = round_up(args.C[0], kTiles[tile].m);
    const Operand& out = args.grad_y;
    layer.grad = args.grad;
    layer.weights = arena->take<float>(product(features + 1, pitch));
    layer.out = static_cast<char*>(out.data);
    layer.stride_n = (uint32_t)out.stride[0], layer.stride_c = (uint32_t)out.stride[1];
    layer.stride_h = (uint32_t)out.stride[2], layer.stride_w = (uint32_t)out.stride[3];
    layer.pitch = (int)pitch, layer.tiles = (int)(pitch / kTiles[tile].m);
    layer.first = (int)blocks, layer.first_weights = (int)of_weights;
    blocks += product(layer.tiles, ceil_div(layer.pixels.count, kTiles[tile].n));
    of_weights += ceil_div((features + 1) * pitch, kWeightsThreads);
    list.exponential = args.exponential;
    if (list.count == kMomentsGradLayers) launch(list, blocks, of_weights), list.count = 0, blocks = of_weights = 0;
  }
  if (list.count) launch(list, blocks, of_weights);
}

template <typename Tile, Layout L>
void launch_lists(const List<MomentsArgs>& all, const Choice& choice, int tile, Arena* arena, cudaStream_t stream) {
  for_lists(all, choice, tile, L, arena, [&](const MomentsGradList& list, int64_t blocks, int64_t of_weights) {
    LAUNCH((moments_weights_kernel), dim3((unsigned)of_weights), dim3(kWeightsThreads), stream, list);
    LAUNCH((moments_grad_kernel<Tile, L>), dim3((unsigned)blocks), dim3(Tile::kThreads), stream, list);
  });
}

int64_t workspace(const List<MomentsArgs>& all, const Device&, const Choice& choice) {
  Arena arena{nullptr, 0};
  for (int tile = 0; tile < kTileCount; ++tile)
    for (int layout = 0; layout < 2; ++layout)
      for_lists(all, choice, tile, (Layout)layout, &arena, [](const MomentsGradList&, int64_t, int64_t) {});
  return arena.used;
}

cudaError_t run(const List<MomentsArgs>& all, const Device&, const Choice& choice, void* workspace,
                cudaStream_t stream) {
  Arena arena{static_cast<char*>(workspace), 0};
  launch_lists<Tile0, Layout::kStrided>(all, choice, 0, &arena, stream);
  launch_lists<Tile0, Layout::kChannelsLast>(all, choice, 0, &arena, stream);
  launch_lists<Tile1, Layout::kStrided>(all, choice, 1, &arena, stream);
  launch_lists<Tile1, Layout::kChannelsLast>(all, choice, 1, &arena, stream);
  launch_lists<Tile2, Layout::kStrided>(all, choice, 2, &arena, stream);
  launch_lists<Tile2, Layout::kChannelsLast>(all, choice, 2, &arena, stream);
  return cudaGetLastError();
}

}  // namespace

extern const Pass<List<MomentsArgs>> kMomentsGradient = {workspace, run, kTileCount};

}  // namespace cuda
}  // namespace adderops
