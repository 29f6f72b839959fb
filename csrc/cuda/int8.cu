// Host side of the int8 convolution: which kernel, which tile, what grid.
#include "int8.cuh"
#include "launch.cuh"

namespace adderops {
namespace cuda {
namespace {

constexpr TileSize kTiles[] = {{128, 128}, {64, 128}, {32, 128}, {16, 128}, {64, 64}};
using Tile0 = Tile<128, 128, 8, 8, 2>;
using Tile1 = Tile<64, 128, 8, 8, 3>;
using Tile2 = Tile<32, 128, 4, 8, 4>;
using Tile3 = Tile<16, 128, 4, 4, 5>;
using Tile4 = Tile<64, 64, 8, 4, 4>;

// Is this for the direct kernel?  Groups too narrow for a tile, sizes beyond its 32-bit coordinates.
bool is_direct_int8(const Conv2dProblem& p) {
  const int64_t C = p.C_in / p.groups, M = p.C_out / p.groups, most = 0x3fffff00;
  const bool narrow = p.groups > 1 && (M < 4 || product(C, M) < 64);
  const int64_t rows = sum(p.H, product(p.KH - 1, p.dilation_h)), columns = sum(p.W, product(p.KW - 1, p.dilation_w));
  const bool large = product(p.N, p.OH, p.OW) > most || sum(p.H, p.pad_top) > most || sum(p.W, p.pad_left) > most ||
                     product(p.OH, p.stride_h) > most || product(p.OW, p.stride_w) > most || rows > most ||
                     columns > most || product(sum(product(rows, p.W), columns), p.C_in) > most || p.groups > 65535 ||
                     ceil_div(M, 16) > 65535;
  return narrow || large;
}

// The widest copy that never straddles two taps and is never misaligned.
int copy_bytes(const Int8Args& args) {
  const auto fits = [&](int64_t bytes) {
    return args.problem.C_in / args.problem.groups % bytes == 0 && reinterpret_cast<uintptr_t>(args.x) % bytes == 0 &&
           reinterpret_cast<uintptr_t>(args.w) % bytes == 0;
  };
  return fits(16) ? 16 : fits(4) ? 4 : 1;
}

Divisor divisor(int64_t d) { return {(int)d, d == 1 ? 0xffffffffu : (uint32_t)(((int64_t)1 << 32) / d)}; }

Int8Params params_of(const Int8Args& args, int bytes) {
  const Conv2dProblem& p = args.problem;
  const int slab = bytes == 16 ? 4 : 16;  // copies
  Int8Params f{};
  f.stride_h = (int)(p.W * p.C_in), f.stride_w = (int)p.C_in;
  f.H = (int)p.H, f.W = (int)p.W, f.KH = (int)p.KH;
  f.C = (int)(p.C_in / p.groups), f.M = (int)(p.C_out / p.groups), f.K = (int)(p.KH * p.KW) * f.C;
  f.dilation_h = (int)p.dilation_h, f.dilation_w = (int)p.dilation_w;
  const int64_t copies = ceil_div(f.C, bytes == 1 ? 4 : bytes);  // of a tap
  f.slabs = (int)ceil_div(p.KH * p.KW * copies, slab);
  f.by_copies = divisor(copies), f.by_KW = divisor(p.KW);
  f.padding = args.padding * 0x01010101u;
  const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
  f.vector_epilogue = f.M % 4 == 0 && aligned(args.y) && aligned(args.residual);
  return f;
}

// The largest tile has no registers for narrower copies: they take the next one.
template <typename Tile>
void launch(const Int8Args& args, int bytes, dim3 grid, cudaStream_t stream) {
  const Int8Params params = params_of(args, bytes);
  const dim3 block(Tile::kThreads);
  if (bytes == 16) LAUNCH((forward_int8_kernel<Tile, 16>), grid, block, stream, args, params);
  if constexpr (Tile::kThreads <= 128) {
    if (bytes == 4) LAUNCH((forward_int8_kernel<Tile, 4>), grid, block, stream, args, params);
    if (bytes == 1) LAUNCH((forward_int8_kernel<Tile, 1>), grid, block, stream, args, params);
  }
}

cudaError_t run(const Int8Args& args, const Device& device, const Choice& choice, void*, cudaStream_t stream) {
  const Conv2dProblem& p = args.problem;
  const int64_t M = p.C_out / p.groups, P = product(p.N, p.OH, p.OW);
  if (is_direct_int8(p)) {
    LAUNCH((direct_int8_kernel), dim3(direct_grid(product(P, p.C_out))), dim3(kDirectThreads), stream, args);
    return cudaGetLastError();
  }
  const int bytes = copy_bytes(args), picked = pick_tile(kTiles, M, P, p.groups, device, choice);
  const int tile = bytes < 16 && picked == 0 ? 1 : picked;
  const TileSize size = kTiles[tile];
  const dim3 grid((unsigned)ceil_div(P, size.n), (unsigned)ceil_div(M, size.m), (unsigned)p.groups);
  switch (tile) {
    case 0: launch<Tile0>(args, bytes, grid, stream); break;
    case 1: launch<Tile1>(args, bytes, grid, stream); break;
    case 2: launch<Tile2>(args, bytes, grid, stream); break;
    case 3: launch<Tile3>(args, bytes, grid, stream); break;
    case 4: launch<Tile4>(args, bytes, grid, stream); break;
  }
  return cudaGetLastError();
}

}  // namespace

extern const Pass<Int8Args> kInt8 = {nullptr, run, sizeof(kTiles) / sizeof(kTiles[0])};

}  // namespace cuda
}  // namespace adderops
