// Moments of the features of two layers (args/moments.h), and the gradient of a loss that depends on them.
//
//   panel   the pixels of a band, [pixel][student's C_a, teacher's C_c, zeros up to `pitch`], float32: loaded, then turned
//           into z in place, so that the tensors are read once and z never leaves the cache
//   second  partial sums [split][j][k], k up to whole vectors; only tiles on and below the diagonal
//   mean    partial sums [split][j]
//
//   moments   stage 0: task = split of the bands; second += z^T z by the tile of outer_product.h
//
//       panel [pixel][channel]            second [j][k]
//       pixel 0  z z z z z z z z          j  [tile]
//       pixel 1  z z z z z z z z          |  [tile][tile]            above the diagonal: mirrored in stage 1
//       ...      a a     b b b            v  [tile][tile][tile]      a: kOuterRows channels j, b: vectors of k
//                                          k ->
//             stage 1: one task adds up the splits in order, divides by the number of pixels, mirrors the upper half
//
//   gradient  stage 0: one task packs weights[j][c] = scale_a / P * (grad[j, c] + grad[c, j]) and, as the last row,
//                      scale_a / P * grad[D, c], in whole vectors
//             stage 1: task = band; tile of kMomentsRows pixels x NV vectors of channels, summed over j:
//
//       weights[j]    [ vector 0 | vector 1 ]   NV loads, shared by the pixels
//       z[pixel 0][j] [ accumulators        ]   1 broadcast and NV fma per pixel and j
//       ...           [                     ]   32 registers: 12 x 2, 12 x 1;  16 registers: 6 x 2, 6 x 1.
//
// Tails: rows of the panel end with zeros; a band's last tile computes pixels that are never stored.  Bands and splits
// depend on the problem alone, and so does the order of every sum.
#pragma once
#include "outer_product.h"
#include "plan.h"
#include "rows.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int64_t kMomentsFloats = 96 * 1024;  // per panel
constexpr int kMomentsRows = kRegisters == 32 ? 12 : 6;
constexpr int kMomentsVectors = 2;
constexpr float kMostExponent = 10.f;

// exp(x) for x clamped to -87 .. 10, within 2 units in the last place.  x = n ln 2 + r, |r| <= ln 2 / 2.
ALWAYS_INLINE vf exponential(vf x) {
  const vf low = splat(-87.f), high = splat(kMostExponent);
  x = -minimum(-minimum(x, high), -low);
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits of the result
  const vf shifted = fused(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fused(n, splat(-0.693359375f), x);
  r = fused(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fused(p, r, splat(1.3981999507e-3f));
  p = fused(p, r, splat(8.3334519073e-3f));
  p = fused(p, r, splat(4.1665795894e-2f));
  p = fused(p, r, splat(1.6666665459e-1f));
  p = fused(p, r, splat(5.0000001201e-1f));
  p = fused(p * r, r, r + 1.f);
  return (vf)((vi)p + ((vi)shifted << 23));
}

struct MomentsShape {
  int64_t D, pitch;  // channels of both networks, floats per pixel of the panel
  int64_t row;       // floats of a row of packed weights
  Bands bands;
  int64_t splits;
  struct Shared : Layout {
    Part<float> second, mean;  // [split][pitch][pitch], [split][pitch]
    Part<float> weights;       // gradient: [D + 1][row]
  } shared;
  struct Worker : Layout {
    Part<float> panel, out;
    Part<const float*> pixel;
  } worker;
};

inline MomentsShape moments_shape(const MomentsArgs& a, bool gradient) {
  MomentsShape f{};
  f.D = sum(a.C[0], a.C[1]), f.row = round_up(a.C[0], kW);
  // rows of `second` are tiles of kOuterRows, its columns vectors
  f.pitch = round_up(round_up(f.D, kW), kOuterRows);
  f.bands = make_bands(a.N, a.H, a.W, product(a.W, f.pitch), kMomentsFloats, 64);
  f.splits = larger(1, smaller(kMostSplits, f.bands.count));
  // loads of a pixel's last vector, and of a tile's missing pixels, run over the end
  const int64_t pixels = f.bands.pixels();
  const int64_t floats = product(pixels + kMomentsRows, f.pitch) + kOuterVectors * kW;
  f.worker.add(&f.worker.panel, floats);
  if (gradient) {
    f.shared.add(&f.shared.weights, product(f.D + 1, f.row) + kMomentsVectors * kW);
    f.worker.add(&f.worker.out, floats);
  } else {
    f.shared.add(&f.shared.second, product(f.splits, f.pitch, f.pitch));
    f.shared.add(&f.shared.mean, product(f.splits, f.pitch));
    f.worker.add(&f.worker.pixel, pixels);
  }
  return f;
}

// Loads a band and turns it into z in place; returns the number of its pixels.
inline int64_t moments_panel(const MomentsArgs& a, const MomentsShape& f, const Region& b, float* panel) {
  const int64_t pixels = b.pixels();
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t j = f.D; j < f.pitch; ++j) panel[i * f.pitch + j] = 0.f;
  for (int i = 0; i < 2; ++i) load_rows(a.type[i], a.y[i], a.H, a.W, b, 0, a.C[i], panel + i * a.C[0], f.pitch);
  for (int64_t q = 0; q < pixels; ++q)
    for (int i = 0; i < 2; ++i) {
      const vf scale = splat(*a.scale[i]), centre = splat(a.centre[i]);
      float* at = panel + q * f.pitch + i * a.C[0];
      for (int64_t c = 0; c < a.C[i]; c += kW) {
        const int64_t n = smaller(kW, a.C[i] - c);
        const vf v = (n == kW ? load(at + c) : load_n(at + c, n)) * scale;
        const vf z = (a.exponential ? exponential(v) : v) - centre;
        n == kW ? store(at + c, z) : store_n(at + c, z, n);
      }
    }
  return pixels;
}

inline void moments_split(const MomentsArgs& a, const MomentsShape& f, int64_t task, char* shared, char* worker) {
  float* const second = f.shared.second.in(shared) + task * f.pitch * f.pitch;
  float* const mean = f.shared.mean.in(shared) + task * f.pitch;
  float* const panel = f.worker.panel.in(worker);
  const float** const pixel = f.worker.pixel.in(worker);
  zero(mean, f.pitch);
  const int64_t begin = split_begin(f.bands, f.splits, task);
  for (int64_t i = begin; i < split_begin(f.bands, f.splits, task + 1); ++i) {
    const int64_t pixels = moments_panel(a, f, band_at(f.bands, i), panel);
    for (int64_t q = 0; q < pixels; ++q) pixel[q] = panel + q * f.pitch;
    add_rows(panel, f.pitch, pixels, f.D, mean);
    for (int64_t j = 0; j < f.D; j += kOuterRows)
      for (int64_t k = 0; k < smaller(f.D, j + kOuterRows); k += kOuterVectors * kW) {
        const int64_t nv = smaller(kOuterVectors, ceil_div(f.pitch - k, kW));
        const auto tile = nv == 1   ? outer_product_tile<1>
                          : nv == 2 ? outer_product_tile<2>
                                    : outer_product_tile<kOuterVectors>;
        tile(panel + j, f.pitch, pixel, k, pixels, second + j * f.pitch + k, f.pitch, i == begin);
      }
  }
}

inline void moments_reduce(const MomentsArgs& a, const MomentsShape& f, int64_t, char* shared, char*) {
  const float inverse = 1.f / (float)(a.N * a.H * a.W);
  for (int64_t j = 0; j < f.D; ++j) {
    float total = 0.f;
    for (int64_t i = 0; i < f.splits; ++i) total += f.shared.mean.in(shared)[i * f.pitch + j];
    a.out[f.D * f.D + j] = total * inverse;
    for (int64_t k = 0; k <= j; ++k) {
      float sum = 0.f;
      for (int64_t i = 0; i < f.splits; ++i) sum += f.shared.second.in(shared)[(i * f.pitch + j) * f.pitch + k];
      a.out[j * f.D + k] = a.out[k * f.D + j] = sum * inverse;
    }
  }
}

inline Plan<MomentsArgs> moments_plan(const MomentsArgs& a) {
  const MomentsShape f = moments_shape(a, false);
  return make_plan<MomentsArgs, MomentsShape, moments_split, moments_reduce>(f, f.splits, 1);
}

// out[q][c] = packed[D][c] + sum over j < D of z[q][j] * packed[j][c], for kMomentsRows pixels and NV vectors of c
template <int NV>
__attribute__((noinline)) void moments_gradient_tile(const float* z, int64_t pitch, const float* packed, int64_t row,
                                                     int64_t D, float* out) {
  vf c[kMomentsRows][NV];
  UNROLL_FOR (v, NV) {
    const vf start = load(packed + D * row + v * kW);
    UNROLL_FOR (i, kMomentsRows) c[i][v] = start;
  }
  for (int64_t j = 0; j < D; ++j) {
    vf b[NV];
    UNROLL_FOR (v, NV) b[v] = load(packed + j * row + v * kW);
    UNROLL_FOR (i, kMomentsRows)
      UNROLL_FOR (v, NV) c[i][v] = fused_of(z + i * pitch + j, b[v], c[i][v]);
  }
  UNROLL_FOR (i, kMomentsRows)
    UNROLL_FOR (v, NV) store(out + i * pitch + v * kW, c[i][v]);
}

inline void moments_gradient_pack(const MomentsArgs& a, const MomentsShape& f, int64_t, char* shared, char*) {
  float* const packed = f.shared.weights.in(shared);
  const float factor = *a.scale[0] / (float)(a.N * a.H * a.W);
  zero(packed, (f.D + 1) * f.row + kMomentsVectors * kW);
  for (int64_t j = 0; j <= f.D; ++j)
    for (int64_t c = 0; c < a.C[0]; ++c)
      packed[j * f.row + c] = (j < f.D ? a.grad[j * f.D + c] + a.grad[c * f.D + j] : a.grad[j * f.D + c]) * factor;
}

inline void moments_gradient_task(const MomentsArgs& a, const MomentsShape& f, int64_t task, char* shared,
                                  char* worker) {
  const float* const packed = f.shared.weights.in(shared);
  float* const panel = f.worker.panel.in(worker);
  float* const out = f.worker.out.in(worker);
  const Region b = band_at(f.bands, task);
  const int64_t pixels = moments_panel(a, f, b, panel);
  for (int64_t q = 0; q < pixels; q += kMomentsRows)
    for (int64_t c = 0; c < f.row; c += kMomentsVectors * kW) {
      const auto tile = f.row - c > kW ? moments_gradient_tile<kMomentsVectors> : moments_gradient_tile<1>;
      tile(panel + q * f.pitch, f.pitch, packed + c, f.row, f.D, out + q * f.pitch + c);
    }
  if (a.exponential) {  // exp' = exp = z + centre
    const vf centre = splat(a.centre[0]);
    for (int64_t q = 0; q < pixels; ++q)
      for (int64_t c = 0; c < a.C[0]; c += kW) {
        float* at = out + q * f.pitch + c;
        store(at, load(at) * (load(panel + q * f.pitch + c) + centre));
      }
  }
  store_rows(a.type[0], out, f.pitch, a.grad_y, b, 0, a.C[0]);
}

inline Plan<MomentsArgs> moments_gradient_plan(const MomentsArgs& a) {
  const MomentsShape f = moments_shape(a, true);
  return make_plan<MomentsArgs, MomentsShape, moments_gradient_pack, moments_gradient_task>(f, 1, f.bands.count);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
