// Host side of the gradient of the weights: which tile, how many splits of the sum over pixels.
#include "grad_w.cuh"
#include "launch.cuh"

namespace adderops {
namespace cuda {
namespace {

constexpr TileSize kTiles[] = {{128, 128}, {64, 128}, {32, 128}, {16, 128}};
// The halves reach shared memory through registers: fewer blocks fit.
template <typename T>
using Tile0 = Tile<128, 128, 8, 8, sizeof(T) == 4 ? 2 : 1>;
template <typename T>
using Tile1 = Tile<64, 128, 8, 8, 2>;
template <typename T>
using Tile2 = Tile<32, 128, 4, 8, 3>;
template <typename T>
using Tile3 = Tile<16, 128, 4, 4, 3>;

constexpr int64_t kLongestSplit = 16384;       // pixels: bounds the rounding of a float32 sum
constexpr int64_t kShortestSplit = 256;        // pixels: bounds the cost of starting and ending a block
constexpr int64_t kPartialBytes = 32ll << 20;  // of the partial sums, where the longest split allows it

struct GradWPlan {
  bool direct;
  int tile;
  TileSize size;
  dim3 grid;
  GradWParams params;
  void *grad_y, *x;  // copies with contiguous channels, or null where the tensor has them
  float *partial, *partial_sum;
  int64_t bytes;
};

// The tensor itself where its channels are contiguous, else the copy that channels_kernel will make, with `padded`
// channels per group.
ChannelsLast channels_last(const Operand& o, bool in_place, void* copy, int64_t H, int64_t W, int64_t channels,
                           int64_t padded, int64_t groups, int64_t bytes) {
  if (in_place) return {o.data, o.stride[3] * bytes, o.stride[2] * bytes, o.stride[0] * bytes, channels * bytes};
  const int64_t pixel = groups * padded * bytes;
  return {copy, pixel, W * pixel, H * W * pixel, padded * bytes};
}

GradWPlan plan(const Conv2dArgs& args, const Device& device, const Choice& choice, void* workspace) {
  const Conv2dProblem& p = args.problem;
  const int64_t M = p.C_out / p.groups, P = product(p.N, p.OH, p.OW);
  const int64_t bytes = element_bytes(args.type), vector = 16 / bytes;
  const int64_t C = round_up(p.C_in / p.groups, vector), K = product(C, p.KH, p.KW);
  GradWPlan f{};
  f.direct = is_direct(args);
  if (f.direct) return f;
  f.tile = pick_tile(kTiles, M, K, product(p.groups, ceil_div(P, kLongestSplit)), device, choice);
  f.size = kTiles[f.tile];
  // enough blocks for two waves of the device; fewer where the partial sums would take much memory
  const int64_t tiles = product(ceil_div(M, f.size.m), ceil_div(K, f.size.n), p.groups);
  int64_t splits = ceil_div(4 * device.multiprocessors, tiles);
  const int64_t affordable = kPartialBytes / product(p.C_out, K + 1, 4) + 1;
  if (splits > affordable) splits = affordable;
  if (splits > ceil_div(P, kShortestSplit)) splits = ceil_div(P, kShortestSplit);
  if (splits < ceil_div(P, kLongestSplit)) splits = ceil_div(P, kLongestSplit);
  if (splits > 65535 / p.groups) splits = 65535 / p.groups;
  const int64_t slabs = ceil_div(ceil_div(P, splits), kSlab);
  splits = ceil_div(P, slabs * kSlab);
  Arena arena{static_cast<char*>(workspace), 0};
  const bool strided = choice.layout == (int)Layout::kStrided;
  const bool grad_y_in_place = !strided && supports_channels(args.grad_y, M, bytes);
  const bool x_in_place = !strided && supports_channels(args.x, p.C_in / p.groups, bytes);
  f.grad_y = grad_y_in_place ? nullptr : arena.take<char>(product(P, p.groups, round_up(M, vector), bytes));
  f.x = x_in_place ? nullptr : arena.take<char>(product(p.N, p.H, p.W, p.groups, C, bytes));
  f.params = {(int)K, (int)C, (int)M, (int)splits, (int)slabs};
  GradWParams& g = f.params;
  g.grad_y = channels_last(args.grad_y, grad_y_in_place, f.grad_y, p.OH, p.OW, M, round_up(M, vector), p.groups, bytes);
  g.x = channels_last(args.x, x_in_place, f.x, p.H, p.W, p.C_in / p.groups, C, p.groups, bytes);
  // two slabs of pixels further, as images, rows and columns
  const int64_t on = 2 * kSlab, dn = on / (p.OH * p.OW), dh = on / p.OW % p.OH, dw = on % p.OW;
  g.advance_h = (int)dh, g.advance_w = (int)dw;
  g.advance_grad_y = dn * g.grad_y.stride_n + dh * g.grad_y.stride_h + dw * g.grad_y.stride_w;
  g.next_row_grad_y = g.grad_y.stride_h - p.OW * g.grad_y.stride_w;
  g.next_image_grad_y = g.grad_y.stride_n - p.OH * g.grad_y.stride_h;
  g.advance_x = dn * g.x.stride_n + dh * p.stride_h * g.x.stride_h + dw * p.stride_w * g.x.stride_w;
  g.next_row_x = p.stride_h * g.x.stride_h - p.OW * p.stride_w * g.x.stride_w;
  g.next_image_x = g.x.stride_n - p.OH * p.stride_h * g.x.stride_h;
  f.grid = dim3((unsigned)ceil_div(K, f.size.n), (unsigned)ceil_div(M, f.size.m), (unsigned)(p.groups * splits));
  f.partial = arena.take<float>(product(splits, p.C_out, K));
  f.partial_sum = arena.take<float>(product(splits, p.C_out));
  f.bytes = arena.used;
  return f;
}

template <typename T, typename Tile>
void launch_tile(const Conv2dArgs& args, const GradWPlan& f, cudaStream_t stream) {
  LAUNCH((grad_w_kernel<T, Tile>), f.grid, dim3(Tile::kThreads), stream, args, f.params, f.partial, f.partial_sum);
}

template <typename T>
void copy_channels(const Operand& in, void* out, int64_t N, int64_t H, int64_t W, int64_t channels, int64_t groups,
                   cudaStream_t stream) {
  const int64_t padded = round_up(channels, 16 / (int64_t)sizeof(T));
  const dim3 grid((unsigned)ceil_div(N * H * W, kChannelsTile), (unsigned)ceil_div(padded, kChannelsTile),
                  (unsigned)groups);
  LAUNCH((channels_kernel<T>), grid, dim3(kChannelsThreads), stream, in, static_cast<T*>(out), N * H * W, H, W,
         (int)channels, (int)padded);
}

template <typename T>
void launch(const Conv2dArgs& args, const GradWPlan& f, cudaStream_t stream) {
  const Conv2dProblem& p = args.problem;
  if (f.grad_y) copy_channels<T>(args.grad_y, f.grad_y, p.N, p.OH, p.OW, p.C_out / p.groups, p.groups, stream);
  if (f.x) copy_channels<T>(args.x, f.x, p.N, p.H, p.W, p.C_in / p.groups, p.groups, stream);
  if (f.tile == 0) launch_tile<T, Tile0<T>>(args, f, stream);
  if (f.tile == 1) launch_tile<T, Tile1<T>>(args, f, stream);
  if (f.tile == 2) launch_tile<T, Tile2<T>>(args, f, stream);
  if (f.tile == 3) launch_tile<T, Tile3<T>>(args, f, stream);
  const int64_t filters = args.problem.C_out < 65535 ? args.problem.C_out : 65535;
  LAUNCH((grad_w_finish_kernel<T>), dim3((unsigned)ceil_div(f.params.K, kFinishThreads), (unsigned)filters),
         dim3(kFinishThreads), stream, args, f.params, f.partial, f.partial_sum);
}

int64_t workspace(const Conv2dArgs& args, const Device& device, const Choice& choice) {
  return plan(args, device, choice, nullptr).bytes;
}

cudaError_t run(const Conv2dArgs& args, const Device& device, const Choice& choice, void* workspace,
                cudaStream_t stream) {
  const Conv2dProblem& p = args.problem;
  const GradWPlan f = plan(args, device, choice, workspace);
  if (f.direct)
    with_type(args.type, [&](auto element) {
      const int64_t C = p.C_in / p.groups, filters = p.C_out < 65535 ? p.C_out : 65535;
      LAUNCH((direct_grad_w_kernel<decltype(element)>), dim3((unsigned)(C * p.KH * p.KW), (unsigned)filters),
             dim3(kDirectThreads), stream, args, (int)C, (int)(p.C_out / p.groups));
    });
  else
    with_tiled_type(args.type, [&](auto element) { launch<decltype(element)>(args, f, stream); });
  return cudaGetLastError();
}

}  // namespace

extern const Pass<Conv2dArgs> kGradW = {workspace, run, sizeof(kTiles) / sizeof(kTiles[0])};

}  // namespace cuda
}  // namespace adderops
