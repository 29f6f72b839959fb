// Host side of the moments: which side of a tile for a layer, how many splits of the pixels, which layers in a launch.
#include "launch_lists.cuh"
#include "moments.cuh"

namespace adderops {
namespace cuda {
namespace {

constexpr int kSides[] = {32, 64, 128};
constexpr int64_t kLongestSum = 2048;  // pixels that one thread adds up: bounds the rounding of a float32 sum
constexpr int64_t kShortestSplit = 4;  // slabs: bounds the cost of starting and ending a block

// The features of a pixel, with the zeros that a tile of this side wants.
int64_t padded_features(const MomentsArgs& args, int side) {
  const int width = side / kMomentsWarps;
  return sum(round_up(args.C[0], width), round_up(args.C[1], width));
}

// The smallest side that holds all features, or the largest; at least that of the choice.
int pick_side(const MomentsArgs& args, const Choice& choice) {
  const int least = choice.tile < 0 ? 0 : choice.tile < 2 ? choice.tile : 2;
  for (int i = least; i < 2; ++i)
    if (padded_features(args, kSides[i]) <= kSides[i]) return kSides[i];
  return kSides[2];
}

int64_t tile_count(const MomentsArgs& args, int side) {
  const int64_t across = ceil_div(padded_features(args, side), side);
  return product(across, across + 1) / 2;
}

// The kernel for a layer: the side of its tiles, whether they are several, the layout.
int kind_of(const MomentsArgs& args, const Choice& choice) {
  const int side = pick_side(args, choice), several = tile_count(args, side) > 1;
  return 2 * (side == 32 ? 0 : side == 64 ? 1 : 2 + several) + (pick_layout(args, choice) == Layout::kChannelsLast);
}

// Calls launch(a list, its blocks, its blocks of the finishing kernel) for the layers of a kind.
template <int Side, typename Launch>
void for_lists(const List<MomentsArgs>& all, int kind, const Device& device, const Choice& choice, Arena* arena,
               const Launch& launch) {
  using M = MomentsTile<Side>;
  double work = 0;  // pixels of all tiles
  for (int64_t i = 0; i < all.count; ++i)
    if (kind_of(all.items[i], choice) == kind)
      work += (double)pixels_of(all.items[i]).count * (double)tile_count(all.items[i], Side);
  MomentsList list;
  list.count = 0;
  int64_t blocks = 0, finished = 0;
  for (int64_t i = 0; i < all.count; ++i) {
    const MomentsArgs& args = all.items[i];
    if (kind_of(args, choice) != kind) continue;
    MomentsLayer& layer = list.layers[list.count++];
    for (int k = 0; k < 2; ++k) layer.y[k] = feature_of(args, k, M::kWidth);
    layer.pixels = pixels_of(args);
    const int64_t P = layer.pixels.count, D = padded_features(args, Side), tiles = tile_count(args, Side);
    // two waves of the device for all layers together, each its share
    int64_t splits = (int64_t)(2. * M::Products::kBlocks * device.multiprocessors * (double)P / work) + 1;
    const int64_t slabs = ceil_div(P, M::kPixels);
    if (splits > ceil_div(slabs, kShortestSplit)) splits = ceil_div(slabs, kShortestSplit);
    if (splits < ceil_div(P, kLongestSum * M::kGroups)) splits = ceil_div(P, kLongestSum * M::kGroups);
    layer.slabs = (int)ceil_div(slabs, splits), layer.splits = (int)ceil_div(slabs, layer.slabs);
    layer.partial = arena->take<float>(product(layer.splits, tiles, Side * Side));
    layer.sums = arena->take<float>(product(layer.splits, D));
    layer.out = args.out, layer.D = (int)D, layer.tiles = (int)tiles;
    layer.first = (int)blocks, layer.first_finished = (int)finished;
    blocks += layer.splits * tiles;
    finished += ceil_div(tiles * Side * Side + D, kMomentsThreads);
    list.exponential = args.exponential;
    if (list.count == kMomentsLayers) launch(list, blocks, finished), list.count = 0, blocks = finished = 0;
  }
  if (list.count) launch(list, blocks, finished);
}

// Lists the layers of each kind; launches their kernels, or only counts the workspace.
struct Lists {
  const List<MomentsArgs>& all;
  const Device& device;
  const Choice& choice;
  Arena arena;
  bool launches;
  cudaStream_t stream;

  template <int Side, bool Several, Layout L>
  void launch() {
    const int kind = 2 * (Side == 32 ? 0 : Side == 64 ? 1 : 2 + Several) + (L == Layout::kChannelsLast);
    for_lists<Side>(all, kind, device, choice, &arena, [&](const MomentsList& list, int64_t blocks, int64_t finished) {
      if (!launches) return;
      LAUNCH((moments_kernel<Side, Several, L>), dim3((unsigned)blocks), dim3(kMomentsThreads), stream, list);
      LAUNCH((moments_finish_kernel<Side>), dim3((unsigned)finished), dim3(kMomentsThreads), stream, list);
    });
  }
  void launch_all() {
    launch<32, false, Layout::kStrided>(), launch<32, false, Layout::kChannelsLast>();
    launch<64, false, Layout::kStrided>(), launch<64, false, Layout::kChannelsLast>();
    launch<128, false, Layout::kStrided>(), launch<128, false, Layout::kChannelsLast>();
    launch<128, true, Layout::kStrided>(), launch<128, true, Layout::kChannelsLast>();
  }
};

int64_t workspace(const List<MomentsArgs>& all, const Device& device, const Choice& choice) {
  Lists lists{all, device, choice, {nullptr, 0}, false, nullptr};
  lists.launch_all();
  return lists.arena.used;
}

cudaError_t run(const List<MomentsArgs>& all, const Device& device, const Choice& choice, void* workspace,
                cudaStream_t stream) {
  Lists lists{all, device, choice, {static_cast<char*>(workspace), 0}, true, stream};
  lists.launch_all();
  return cudaGetLastError();
}

}  // namespace

extern const Pass<List<MomentsArgs>> kMoments = {workspace, run, sizeof(kSides) / sizeof(kSides[0])};

}  // namespace cuda
}  // namespace adderops
