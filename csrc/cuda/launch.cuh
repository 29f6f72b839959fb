// What the host sides of the passes share: launches, grids, the layout of the workspace, the choice of kernels.
#pragma once
#include "../sizes.h"
#include "direct.cuh"
#include "kernels.h"
#include "pack.cuh"
#include "walk.cuh"

#if !defined(ADDEROPS_SIMT)
// kernel in parentheses: LAUNCH((forward_kernel<float, Tile>), grid, block, stream, arguments...)
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace adderops {
namespace cuda {

inline int64_t blocks(int64_t size, int64_t step) { return (size + step - 1) / step; }
inline int64_t round_up(int64_t size, int64_t step) { return product(blocks(size, step), step); }
inline unsigned direct_grid(int64_t outputs) {
  const int64_t count = blocks(outputs, kDirectThreads);
  return (unsigned)(count < 0x7fffffff ? count : 0x7fffffff);
}

// Hands out parts of the workspace, 256-byte aligned.  With a null base it only counts.
struct Carver {
  char* base;
  int64_t used;
  template <typename T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used = sum(used, round_up(product(count, (int64_t)sizeof(T)), 256));
    return p;
  }
};

// Does a direct kernel (direct.cuh) serve this?  Float64; groups too narrow for a tile; coordinates beyond a tile's.
inline bool is_direct(const Conv2dArgs& args) {
  const Conv2dProblem& p = args.problem;
  const int64_t C = p.C_in / p.groups, M = p.C_out / p.groups, taps = product(p.KH, p.KW), most = 0x3fffff00;
  const bool narrow = C < 2 || (p.groups > 1 && product(C, M) < 64);
  const bool large = product(p.N, p.OH, p.OW) > most || product(p.N, p.H, p.W) > most || sum(p.H, p.pad_top) > most ||
                     sum(p.W, p.pad_left) > most || product(p.OH, p.stride_h) > most ||
                     product(p.OW, p.stride_w) > most || product(p.KH - 1, p.dilation_h) >= 1 << 15 ||
                     product(p.KW - 1, p.dilation_w) >= 1 << 15 || product(taps, C + 128) > most ||
                     product(taps, M + 128) > most || product(p.stride_h, p.stride_w) > 4096 || p.groups > 65535 ||
                     blocks(M, 16) > 65535 || blocks(C, 16) > 65535;
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
  return channels_last && choice.layout != (int)Layout::kPlanes ? Layout::kChannels : Layout::kPlanes;
}

// Of tiles for `lanes` x `columns` x `batch` results: the one that makes the multiprocessors' busiest finish first,
// where a tile costs its area and, for its loads, four times its border.
struct TileSize {
  int lanes, columns;
};
template <int Count>
int pick_tile(const TileSize (&tiles)[Count], int64_t lanes, int64_t columns, int64_t batch, const Device& device,
              const Choice& choice) {
  if (choice.tile >= 0) return choice.tile < Count ? choice.tile : Count - 1;
  int best = 0;
  double least = 0;
  for (int i = 0; i < Count; ++i) {
    const int64_t count = product(blocks(lanes, tiles[i].lanes), blocks(columns, tiles[i].columns), batch);
    const double cost = (double)blocks(count, device.multiprocessors) *
                        (tiles[i].lanes * tiles[i].columns + 4 * (tiles[i].lanes + tiles[i].columns));
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

// The steps of a walk, from the rest of it.  Of the weights: `slab` bytes from slab to slab, `tap_h` and `tap_w` slabs
// from tap to tap.
inline void set_steps(Walk* w, int slab_channels, int64_t slab, int64_t tap_h, int64_t tap_w) {
  const int64_t slabs = (w->channels + slab_channels - 1) / slab_channels, last = slabs - 1;
  w->slabs = (int)(w->taps_h * w->taps_w * slabs);
  w->next_slab = slab_channels * w->channel;
  w->next_tap = w->step_w * w->column - last * w->next_slab;
  w->next_row = w->step_h * w->row - (w->taps_w - 1) * w->step_w * w->column - last * w->next_slab;
  w->next_weights = slab;
  w->next_weights_tap = (tap_w - last) * slab;
  w->next_weights_row = (tap_h - (w->taps_w - 1) * tap_w - last) * slab;
}

// The packed weights of a pass, and the launch that makes them.
struct Packed {
  PackShape shape;
  int64_t groups;
  PackedWeights weights;
};
inline Packed make_packed(const Conv2dProblem& p, int64_t lanes, int64_t channels, int64_t tile_lanes, int slab,
                          int64_t bytes, Carver* carve) {
  const int64_t pitch = round_up(lanes, tile_lanes), depth = round_up(channels, slab), taps = p.KH * p.KW;
  const int64_t chunks = blocks(taps * depth, kPackRows), lane_blocks = blocks(pitch, kPackLanes);
  Packed f{{(int)lanes, (int)pitch, (int)channels, (int)depth, (int)taps, (int)p.KW, (int)chunks}, p.groups, {}};
  f.weights = {carve->take<char>(product(p.groups, taps, depth, pitch, bytes)),
               carve->take<float>(product(p.groups, chunks, pitch)),
               carve->take<float>(product(p.groups, chunks, pitch)),
               carve->take<int>(product(p.groups, chunks, lane_blocks)),
               (int)pitch,
               (int)chunks,
               (int)lane_blocks};
  return f;
}
template <typename T, Packing P>
void pack(const Conv2dArgs& args, const Packed& f, cudaStream_t stream) {
  const dim3 grid((unsigned)f.shape.chunks, (unsigned)f.weights.lane_blocks, (unsigned)f.groups);
  LAUNCH((pack_kernel<T, P>), grid, dim3(kPackThreads), stream, args.w, f.shape, const_cast<void*>(f.weights.packed),
         const_cast<float*>(f.weights.sums), const_cast<float*>(f.weights.sizes), const_cast<int*>(f.weights.flags));
}

}  // namespace cuda
}  // namespace adderops
