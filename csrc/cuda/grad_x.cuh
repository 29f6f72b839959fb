// Gradient of the input, float32 sums:   dX[n,ci,h,w] = sum over (kh,kw,co) of dY[n,co,oh,ow] * clamp(W - X, -1, 1)
// with oh*stride_h = h + pad_top - kh*dilation_h and ow likewise.  This is AdderNet's training gradient (arXiv
// 1912.13200, section 3.2), on purpose not the derivative, which is sgn(W - X).
//
// Gather form: every input pixel sums its own terms, so there are no atomics and the order is fixed.  Pixels whose
// (h + pad_top, w + pad_left) have the same remainders by the strides form a phase; within a phase all pixels use the
// same taps and step through dY by one, so that each phase is an implicit matrix product (implicit_gemm.cuh) with dY
// as its source: M counts ci, K taps x co.  A launch computes one phase.
//
//   stride 2, a 3 x 3 filter, pixels of dX:   a b a b      a: taps (0,0) (0,2) (2,0) (2,2)     b: taps (0,1) (2,1)
//   (no padding)                              c d c d      c: taps (1,0) (1,2)                 d: tap  (1,1)
//                                             a b a b
//
//   clamp(W - X, -1, 1) = 2*sat(W' - X') - 1   with W' = W/2 + 1/2 (pack.cuh), X' = X/2
//   dX = 2 * sum dY*sat(W' - X') - sum dY      FADD.SAT, FFMA: two instructions per term
//
//   dY (N, C_out, OH, OW), X and dX (N, C_in, H, W), any strides      packed W' [group][tap][co][ci]
//
//      s_weights [16][kM]  W' of ci     block   64 ci x 128 pixels of the phase, 4 warps; two smaller tiles
//      s_pixels  [16][kN+4]  dY         warp    64 x 32: 8 x 4 threads, in two groups of 32 x 16 along each side
//               |                       thread  8 x 8 accumulators and X' of the same 8 x 8 outputs, in registers
//               v                               (209 to 238 of them, two blocks per multiprocessor)
//      acc = fma(dY, sat(W' - X'), acc) grid    (tiles of the phase's pixels, tiles of ci, groups)
//               |
//      dX = 2*acc - sum dY, whose sum over each window WindowSums takes on the way
//
// Its rounding is 2^-24 of sum |dY|*(2 + |W| + |X|), however small W - X; weights of kLargestWeight and more are
// flagged.  sat() makes 0 of a NaN, and 0 * inf is not what the formula has: a tile that has met one is flagged, and
// grad_x_repair_kernel, launched next, computes it by the definition.
//
// Tails: co beyond the last are zeros in dY and W'; ci and pixels beyond the last are not stored.
#pragma once
#include "implicit_gemm.cuh"

namespace adderops {
namespace cuda {

// The pixels of a phase: (h0 + i*stride_h, w0 + j*stride_w), i < rows, j < columns, of every image; tap (0, 0) of pixel
// (i, j) is dY at (q_h + i, q_w + j).
struct Phase {
  int rows, columns, h0, w0, stride_h, stride_w, q_h, q_w;
  int64_t pixels;

  struct Pixel {
    unsigned n, i, j;
  };
  __device__ __forceinline__ Pixel at(int64_t pixel) const {
    const unsigned at = (unsigned)pixel, row = at / (unsigned)columns;
    return {row / (unsigned)rows, row % (unsigned)rows, at % (unsigned)columns};
  }
  // of that pixel in a tensor, in elements
  __device__ __forceinline__ int64_t offset(const Pixel& at, const Operand& o) const {
    return at.n * o.stride[0] + (h0 + (int)at.i * stride_h) * o.stride[2] + (w0 + (int)at.j * stride_w) * o.stride[3];
  }
};

template <typename T, typename Tile, Layout L>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    grad_x_kernel(Conv2dArgs args, Phase phase, GemmParams params, PackedWeights weights, int* flags) {
  SHARED(float, s_slabs, [2 * kSlabFloats<Tile>]);
  SHARED(float, s_sum, [Tile::kN]);
  const Conv2dProblem& p = args.problem;
  const int M = (int)(p.C_out / p.groups), C = (int)(p.C_in / p.groups), group = blockIdx.z;
  const int64_t pixel0 = (int64_t)blockIdx.x * Tile::kN;
  const int m0 = blockIdx.y * Tile::kM;
  const ThreadTile<Tile> own;

  // half of X; anything where there is none
  float x[Tile::kThreadM][Tile::kThreadN];
#pragma unroll
  for (int j = 0; j < Tile::kThreadN; ++j) {
    const int64_t pixel = pixel0 + own.n(j);
    const T* const from =
        static_cast<const T*>(args.x.data) + phase.offset(phase.at(pixel < phase.pixels ? pixel : 0), args.x);
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i) {
      const int m = m0 + own.m(i);
      x[i][j] = 0.5f * (m < C ? load_float(from + (group * C + m) * args.x.stride[1]) : 0.f);
    }
  }

  float acc[Tile::kThreadM][Tile::kThreadN] = {};
  WindowSums<Tile> sums;
  if (params.slabs) {
    const char* const source = static_cast<const char*>(params.source) + (int64_t)group * M * params.stride_c;
    const int64_t depth = (M + kSlab - 1) / kSlab * kSlab;
    const char* const packed = static_cast<const char*>(weights.data) + params.first_weights +
                               (group * p.KH * p.KW * depth * weights.pitch + m0) * 4;
    const auto window_of = [&](int n) {
      const int64_t pixel = pixel0 + n;
      const Phase::Pixel at = phase.at(pixel < phase.pixels ? pixel : 0);
      const int h = phase.q_h + (int)at.i, w = phase.q_w + (int)at.j;
      return Window{at.n * params.stride_n + h * params.stride_h + w * params.stride_w,
                    pixel < phase.pixels ? h : kOutside, w};
    };
    implicit_gemm<Tile, T, L, true>(params, source, window_of, packed, weights.pitch, s_slabs, acc, sums,
                                    [&](float sum, float w, float grad_y, int i, int j) {
                                      return fmaf(grad_y, saturated_difference(w, x[i][j]), sum);
                                    });
  }
  sums.reduce(s_slabs, s_sum);

  int flagged = 0;
  for (int i = threadIdx.x; i < weights.splits * ((Tile::kM + 31) / 32); i += Tile::kThreads) {
    const int block = m0 / 32 + i % ((Tile::kM + 31) / 32), split = i / ((Tile::kM + 31) / 32);
    if (block < weights.blocks)
      flagged |= weights.flags[((int64_t)group * weights.splits + split) * weights.blocks + block];
  }
#pragma unroll
  for (int j = 0; j < Tile::kThreadN; ++j) {
    const int64_t pixel = pixel0 + own.n(j);
    if (pixel >= phase.pixels) continue;
    T* const to = static_cast<T*>(args.out.data) + phase.offset(phase.at(pixel), args.out);
    const float sum = s_sum[own.n(j)];
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i) {
      const int m = m0 + own.m(i);
      if (m >= C) continue;
      const float v = 2 * acc[i][j] - sum;
      flagged |= !is_finite(v) || x[i][j] != x[i][j];
      store_float(to + (group * C + m) * args.out.stride[1], v);
    }
  }
  flagged = __syncthreads_or(flagged);
  if (threadIdx.x == 0) flags[tile_index()] = flagged;
}

// The flagged tiles of `channels` x `tile_pixels`, by the definition.  Same grid.
template <typename T>
__global__ void __launch_bounds__(kRepairThreads)
    grad_x_repair_kernel(Conv2dArgs args, Phase phase, int channels, int tile_pixels, const int* flags) {
  if (!flags[tile_index()]) return;
  const int C = (int)(args.problem.C_in / args.problem.groups);
  for (int i = threadIdx.x; i < channels * tile_pixels; i += kRepairThreads) {
    const int64_t pixel = (int64_t)blockIdx.x * tile_pixels + i % tile_pixels;
    const int m = blockIdx.y * channels + i / tile_pixels;
    if (pixel >= phase.pixels || m >= C) continue;
    const Phase::Pixel at = phase.at(pixel);
    const int ci = blockIdx.z * C + m;
    store_float(static_cast<T*>(args.out.data) + phase.offset(at, args.out) + ci * args.out.stride[1],
                definition::grad_x<T>(args, at.n, ci, phase.h0 + (int)at.i * phase.stride_h,
                                      phase.w0 + (int)at.j * phase.stride_w));
  }
}

}  // namespace cuda
}  // namespace adderops
