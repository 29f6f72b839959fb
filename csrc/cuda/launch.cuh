// What the host sides of the passes share: launches, grids, the division of the workspace, the choice of tiles.
#pragma once
#include "../sizes.h"
#include "direct.cuh"
#include "implicit_gemm.cuh"
#include "kernels.h"
#include "pack.cuh"

#if !defined(ADDEROPS_SIMT)
// kernel in parentheses: LAUNCH((forward_kernel<float, Tile>), grid, block, stream, arguments...)
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace adderops {
namespace cuda {

inline int64_t ceil_div(int64_t size, int64_t step) { return (size + step - 1) / step; }
inline int64_t round_up(int64_t size, int64_t step) { return product(ceil_div(size, step), step); }
inline unsigned direct_grid(int64_t outputs) {
  const int64_t count = ceil_div(outputs, kDirectThreads);
  return (unsigned)(count < 0x7fffffff ? count : 0x7fffffff);
}

// Divides the workspace: each take() is the next part, 256-byte aligned.  With a null base it only counts.
struct Arena {
  char* base;
  int64_t used;
  template <typename T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used = sum(used, round_up(product(count, (int64_t)sizeof(T)), 256));
    return p;
  }
};

// Is this for a direct kernel (direct.cuh)?  Float64, groups too narrow for a tile, sizes beyond 32-bit coordinates.
inline bool is_direct(const Conv2dArgs& args) {
  const Conv2dProblem& p = args.problem;
  const int64_t C = p.C_in / p.groups, M = p.C_out / p.groups, taps = product(p.KH, p.KW), most = 0x3fffff00;
  const bool narrow = C < 2 || (p.groups > 1 && product(C, M) < 64);
  const bool large = product(p.N, p.OH, p.OW) > most || product(p.N, p.H, p.W) > most || sum(p.H, p.pad_top) > most ||
                     sum(p.W, p.pad_left) > most || product(p.OH, p.stride_h) > most ||
                     product(p.OW, p.stride_w) > most || product(p.KH - 1, p.dilation_h) >= 1 << 15 ||
                     product(p.KW - 1, p.dilation_w) >= 1 << 15 || product(taps, C + 128) > most ||
                     product(taps, M + 128) > most || product(p.stride_h, p.stride_w) > 4096 || p.groups > 65535 ||
                     ceil_div(M, 16) > 65535 || ceil_div(C, 16) > 65535;
  return args.type == ElementType::kFloat64 || narrow || large;
}

// May neighbouring threads read 16 bytes along the channels of every group?
inline bool supports_channels(const Operand& o, int64_t channels, int64_t element_bytes) {
  const int64_t vector = 16 / element_bytes;
  return o.stride[1] == 1 && channels % vector == 0 && o.stride[0] % vector == 0 && o.stride[2] % vector == 0 &&
         o.stride[3] % vector == 0 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
}
inline int64_t element_bytes(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}
inline Layout pick_layout(bool channels_last, const Choice& choice) {
  return channels_last && choice.layout != (int)Layout::kStrided ? Layout::kChannelsLast : Layout::kStrided;
}

// kM x kN of a Tile, for the host.
struct TileSize {
  int m, n;
};
// The tile that lets the busiest multiprocessor finish first, for `m` x `n` outputs `batch` times; a tile costs its
// area and, for its loads, four times its border.
template <int Count>
int pick_tile(const TileSize (&tiles)[Count], int64_t m, int64_t n, int64_t batch, const Device& device,
              const Choice& choice) {
  if (choice.tile >= 0) return choice.tile < Count ? choice.tile : Count - 1;
  int best = 0;
  double least = 0;
  for (int i = 0; i < Count; ++i) {
    const int64_t count = product(ceil_div(m, tiles[i].m), ceil_div(n, tiles[i].n), batch);
    const double cost =
        (double)ceil_div(count, device.multiprocessors) * (tiles[i].m * tiles[i].n + 4 * (tiles[i].m + tiles[i].n));
    if (i == 0 || cost < least) best = i, least = cost;
  }
  return best;
}

// Calls f(T{}) with the element type; float64 has no tiled kernels.
template <typename F>
void with_tiled_type(ElementType type, const F& f) {
  if (type == ElementType::kFloat32) f(float{});
  if (type == ElementType::kBFloat16) f(BFloat16{});
  if (type == ElementType::kFloat16) f(Float16{});
}
template <typename F>
void with_type(ElementType type, const F& f) {
  if (type == ElementType::kFloat64) f(double{});
  with_tiled_type(type, f);
}

// The source of an implicit matrix product; taps and their distances are still to be set.
inline GemmParams gemm_params(const Operand& source, int64_t element_bytes, int64_t H, int64_t W, int64_t channels) {
  const int64_t* const stride = source.stride;
  GemmParams params{};
  params.source = source.data;
  params.stride_n = stride[0] * element_bytes, params.stride_c = stride[1] * element_bytes;
  params.stride_h = stride[2] * element_bytes, params.stride_w = stride[3] * element_bytes;
  params.H = (int)H, params.W = (int)W, params.channels = (int)channels;
  return params;
}
// What follows from the rest of them: how many slabs, and the way from one to the next.  Of the packed weights: `bytes`
// of a slab, `tap_h` and `tap_w` slabs from tap to tap.
inline void set_slabs(GemmParams* params, int slab_channels, int64_t bytes, int64_t tap_h, int64_t tap_w) {
  GemmParams& f = *params;
  const int64_t slabs = (f.channels + slab_channels - 1) / slab_channels, last = slabs - 1;
  f.slabs = (int)(f.taps_h * f.taps_w * slabs);
  f.next_slab = slab_channels * f.stride_c;
  f.next_tap = f.dilation_w * f.stride_w - last * f.next_slab;
  f.next_tap_row = f.dilation_h * f.stride_h - (f.taps_w - 1) * f.dilation_w * f.stride_w - last * f.next_slab;
  f.next_weights = bytes;
  f.next_weights_tap = (tap_w - last) * bytes;
  f.next_weights_tap_row = (tap_h - (f.taps_w - 1) * tap_w - last) * bytes;
}

// Room for the packed weights of `M` x `channels` per group and tap, and the launch that fills it.
inline PackedWeights plan_packed(const Conv2dProblem& p, int64_t M, int64_t channels, int64_t tile_m, int slab,
                                 int64_t element_bytes, Arena* arena) {
  const int64_t pitch = round_up(M, tile_m), depth = round_up(channels, slab), taps = p.KH * p.KW;
  const int64_t splits = ceil_div(taps * depth, kPackTerms), m_blocks = ceil_div(pitch, kPackM);
  PackedWeights f{};
  f.data = arena->take<char>(product(p.groups, taps, depth, pitch, element_bytes));
  f.sums = arena->take<float>(product(p.groups, splits, pitch));
  f.sizes = arena->take<float>(product(p.groups, splits, pitch));
  f.flags = arena->take<int>(product(p.groups, splits, m_blocks));
  f.M = (int)M, f.pitch = (int)pitch, f.channels = (int)channels, f.depth = (int)depth;
  f.taps = (int)taps, f.KW = (int)p.KW, f.splits = (int)splits, f.blocks = (int)m_blocks;
  return f;
}
template <typename T, Packing P>
void pack(const Conv2dArgs& args, const PackedWeights& weights, cudaStream_t stream) {
  const dim3 grid((unsigned)weights.splits, (unsigned)weights.blocks, (unsigned)args.problem.groups);
  LAUNCH((pack_kernel<T, P>), grid, dim3(kPackThreads), stream, args.w, weights);
}

}  // namespace cuda
}  // namespace adderops
