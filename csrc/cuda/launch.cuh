// What the host sides of the passes share: the launch, the arithmetic of grids, the layout of the workspace.
#pragma once
#include "kernels.h"
#include "tile.cuh"

#if !defined(ADDEROPS_SIMT)
// kernel in parentheses: LAUNCH((forward_kernel<float, Tile>), grid, block, stream, arguments...)
#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace adderops {
namespace cuda {

inline int64_t blocks(int64_t size, int64_t step) { return (size + step - 1) / step; }
inline int64_t round_up(int64_t size, int64_t step) { return blocks(size, step) * step; }

// Hands out parts of the workspace, 256-byte aligned.  With a null base it only counts.
struct Carver {
  char* base;
  int64_t used;
  template <typename T>
  T* take(int64_t count) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used += round_up(count * (int64_t)sizeof(T), 256);
    return p;
  }
};

// Sizes of a group's matrices; the kernels count in 32 bits what is not an offset.
struct Matrix {
  int64_t M, C, taps, P;
};
inline Matrix matrix_of(const Conv2dProblem& p) {
  return {p.C_out / p.groups, p.C_in / p.groups, p.KH * p.KW, p.N * p.OH * p.OW};
}
constexpr int64_t kMost = 0x7fffff00;  // less than 2^31 by more than any tile
inline const char* refusal(const Conv2dProblem& p) {
  if (p.N * p.OH * p.OW > kMost || p.N * p.H * p.W > kMost) return "x: expected fewer than 2^31 pixels (N*H*W, N*OH*OW)";
  if (p.H + p.pad_top > kMost || p.W + p.pad_left > kMost || (p.KH - 1) * p.dilation_h > kMost ||
      (p.KW - 1) * p.dilation_w > kMost)
    return "padding, dilation: expected a padded image and a kernel narrower than 2^31";
  if (p.KH * p.KW * (p.C_in / p.groups + 128) > kMost || p.KH * p.KW * (p.C_out / p.groups + 128) > kMost)
    return "w: expected fewer than 2^31 weights in a filter";
  if (p.groups > 65535 / (p.stride_h * p.stride_w)) return "groups: expected at most 65535 / (stride_h * stride_w)";
  return nullptr;
}

// May neighbouring threads read 16 bytes along the channels of every group?
inline bool supports_channels(const Operand& o, int64_t channels, int64_t element_bytes) {
  const int64_t vector = 16 / element_bytes;
  return o.stride[1] == 1 && channels % vector == 0 && o.stride[0] % vector == 0 && o.stride[2] % vector == 0 &&
         o.stride[3] % vector == 0 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
}
inline Layout layout_of(const Operand& o, int64_t channels, int64_t element_bytes, int choice) {
  const bool channels_last = supports_channels(o, channels, element_bytes) && choice != (int)Layout::kPlanes;
  return channels_last ? Layout::kChannels : Layout::kPlanes;
}
inline int64_t element_bytes(ElementType type) {
  return type == ElementType::kFloat64 ? 8 : type == ElementType::kFloat32 ? 4 : 2;
}

// The tile for `lanes` output channels and as many columns: the one that computes the least beyond the matrix, among
// equals the largest; then smaller ones as long as the device would have idle multiprocessors.
struct TileSize {
  int lanes, columns;
};
inline int pick_tile(const TileSize* tiles, int count, int64_t lanes, int64_t columns, int64_t batch,
                     int multiprocessors) {
  int best = 0;
  double least = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t across = blocks(lanes, tiles[i].lanes), down = blocks(columns, tiles[i].columns);
    const int64_t waves = blocks(across * down * batch, multiprocessors);
    // time of a wave: the tile's area, and a sixteenth of its border for the loads
    const double cost = (double)waves * (tiles[i].lanes * tiles[i].columns + 4 * (tiles[i].lanes + tiles[i].columns));
    if (i == 0 || cost < least) best = i, least = cost;
  }
  return best;
}

}  // namespace cuda
}  // namespace adderops
