// Host side of the gradient of the input: phases, which tile, what grid.
#include "grad_x.cuh"
#include "launch.cuh"

namespace adderops {
namespace cuda {
namespace {

constexpr TileSize kTiles[] = {{64, 128}, {32, 128}, {16, 128}};
using Tile0 = Tile<64, 128, 8, 8, 2>;
using Tile1 = Tile<32, 128, 4, 8, 3>;
using Tile2 = Tile<16, 128, 4, 4, 4>;

struct GradXPlan {
  bool direct;
  Layout layout;
  int tile;
  TileSize size;
  PackedWeights weights;
  int* flags;
  int64_t bytes;
};

GradXPlan plan(const Conv2dArgs& args, const Device& device, const Choice& choice, void* workspace) {
  const Conv2dProblem& p = args.problem;
  const int64_t M = p.C_out / p.groups, C = p.C_in / p.groups;
  GradXPlan f{};
  f.direct = is_direct(args);
  if (f.direct) return f;
  f.layout = pick_layout(supports_channels(args.grad_y, M, element_bytes(args.type)), choice);
  const int64_t pixels = p.N * ceil_div(p.H, p.stride_h) * ceil_div(p.W, p.stride_w);  // of the largest phase
  f.tile = pick_tile(kTiles, C, pixels, p.groups, device, choice);
  f.size = kTiles[f.tile];
  Arena arena{static_cast<char*>(workspace), 0};
  f.weights = plan_packed(p, C, M, f.size.m, kSlab, 4, &arena);
  f.flags = arena.take<int>(product(ceil_div(pixels, f.size.n), ceil_div(C, f.size.m), p.groups));
  f.bytes = arena.used;
  return f;
}

// One axis of a phase: the taps k with k*dilation = remainder (mod stride), and the pixels i with i + pad = remainder.
struct Axis {
  int taps, first_tap, tap_step;      // taps first_tap, first_tap + tap_step, ...
  int step;                           // from tap to tap in dY
  int pixels, first_pixel, quotient;  // of tap 0 of the first pixel in dY
};
Axis axis_of(int64_t remainder, int64_t stride, int64_t dilation, int64_t kernel, int64_t pad, int64_t size) {
  Axis a{};
  for (int64_t k = 0; k < kernel; ++k)
    if (k * dilation % stride == remainder) {
      if (a.taps == 0) a.first_tap = (int)k;
      if (a.taps == 1) a.tap_step = (int)k - a.first_tap;
      ++a.taps;
    }
  a.step = -(int)(a.tap_step * dilation / stride);
  a.first_pixel = (int)(((remainder - pad) % stride + stride) % stride);
  a.pixels = a.first_pixel < size ? (int)((size - 1 - a.first_pixel) / stride + 1) : 0;
  a.quotient = (int)((a.first_pixel + pad) / stride - a.first_tap * dilation / stride);
  return a;
}

template <typename T, typename Tile>
void launch_phase(const Conv2dArgs& args, const GradXPlan& f, const Phase& phase, const GemmParams& params, dim3 grid,
                  cudaStream_t stream) {
  if (f.layout == Layout::kStrided)
    LAUNCH((grad_x_kernel<T, Tile, Layout::kStrided>), grid, dim3(Tile::kThreads), stream, args, phase, params,
           f.weights, f.flags);
  else
    LAUNCH((grad_x_kernel<T, Tile, Layout::kChannelsLast>), grid, dim3(Tile::kThreads), stream, args, phase, params,
           f.weights, f.flags);
}

template <typename T>
void launch(const Conv2dArgs& args, const GradXPlan& f, cudaStream_t stream) {
  const Conv2dProblem& p = args.problem;
  const int64_t channels = p.C_out / p.groups, slabs = ceil_div(channels, kSlab);
  pack<T, Packing::kGradX>(args, f.weights, stream);
  for (int64_t rh = 0; rh < p.stride_h; ++rh)
    for (int64_t rw = 0; rw < p.stride_w; ++rw) {
      const Axis h = axis_of(rh, p.stride_h, p.dilation_h, p.KH, p.pad_top, p.H);
      const Axis w = axis_of(rw, p.stride_w, p.dilation_w, p.KW, p.pad_left, p.W);
      const int64_t pixels = p.N * h.pixels * w.pixels;
      if (!pixels) continue;
      const Phase phase = {h.pixels,        w.pixels,   h.first_pixel, w.first_pixel, (int)p.stride_h,
                           (int)p.stride_w, h.quotient, w.quotient,    pixels};
      GemmParams params = gemm_params(args.grad_y, sizeof(T), p.OH, p.OW, channels);
      params.taps_h = h.taps, params.taps_w = w.taps, params.dilation_h = h.step, params.dilation_w = w.step;
      set_slabs(&params, kSlab, kSlab * (int64_t)f.weights.pitch * 4, h.tap_step * p.KW * slabs, w.tap_step * slabs);
      params.first_weights = (h.first_tap * p.KW + w.first_tap) * slabs * params.next_weights;
      const dim3 grid((unsigned)ceil_div(pixels, f.size.n), (unsigned)ceil_div(p.C_in / p.groups, f.size.m),
                      (unsigned)p.groups);
      if (f.tile == 0) launch_phase<T, Tile0>(args, f, phase, params, grid, stream);
      if (f.tile == 1) launch_phase<T, Tile1>(args, f, phase, params, grid, stream);
      if (f.tile == 2) launch_phase<T, Tile2>(args, f, phase, params, grid, stream);
      LAUNCH((grad_x_repair_kernel<T>), grid, dim3(kRepairThreads), stream, args, phase, f.size.m, f.size.n, f.flags);
    }
}

int64_t workspace(const Conv2dArgs& args, const Device& device, const Choice& choice) {
  return plan(args, device, choice, nullptr).bytes;
}

cudaError_t run(const Conv2dArgs& args, const Device& device, const Choice& choice, void* workspace,
                cudaStream_t stream) {
  const Conv2dProblem& p = args.problem;
  const GradXPlan f = plan(args, device, choice, workspace);
  if (f.direct)
    with_type(args.type, [&](auto element) {
      LAUNCH((direct_grad_x_kernel<decltype(element)>), dim3(direct_grid(p.N * p.C_in * p.H * p.W)),
             dim3(kDirectThreads), stream, args);
    });
  else
    with_tiled_type(args.type, [&](auto element) { launch<decltype(element)>(args, f, stream); });
  return cudaGetLastError();
}

}  // namespace

extern const Pass<Conv2dArgs> kGradX = {workspace, run, sizeof(kTiles) / sizeof(kTiles[0])};

}  // namespace cuda
}  // namespace adderops
