// Forward, float32 sums:   Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]|,   k = (kh, kw, ci),  p = (oh, ow)
//
//   kDistance  acc += |x - w|       two instructions per term: FADD, FADD with a free absolute value
//   kMinimum   acc += min(x, w)     FMNMX, on another pipe, and FADD: twice as fast where a multiprocessor has 64
//              FP32 units (sm_75, sm_80); Y = 2*acc - (sum X + sum W).  Where that cancels (|sum X + sum W| or
//              sum |W| > kCancellation * |Y|), overflows or meets an infinity or NaN, the tile is flagged; the
//              distance formula, launched next on the flagged tiles alone, computes it again.
//
//   X  (N, C_in, H, W), any strides    packed W  [group][tap][ci][co] (pack.cuh)    Y  (N, C_out, OH, OW), any strides
//
//             K: taps x channels, a slab at a time (implicit_gemm.cuh)
//           s_weights [16][kM] ---+     grid (tiles of pixels, tiles of filters, groups)
//           s_pixels  [16][kN+4]  |     block  128 filters x 128 pixels, 8 warps (tile.cuh); four smaller tiles
//                      |          |     warp   64 x 32: 8 x 4 threads, in four groups of 32 x 16
//                      v          v     thread 8 x 8 accumulators, 2 x 16 operands, two steps in flight
//                   acc[8][8] in registers
//                      |
//                 epilogue: 2*acc - sums (kMinimum), bias, flag, store
//
// 128 registers, 33 to 37 KB of shared memory, two blocks per multiprocessor.
// Tails: channels beyond the last are zeros in X and W; filters and pixels beyond the last are computed and not stored.
#pragma once
#include "implicit_gemm.cuh"

namespace adderops {
namespace cuda {

enum class Formula : int { kDistance, kMinimum };
constexpr float kCancellation = 32.f;

// Is y = 2 * sum min - both finite, and not what a cancellation left?  A comparison with NaN is false.  Offsets of
// either sign cancel within `both` already; not within sum |W|, nor within sum |X|, which is at most |y| + sum |W|.
__device__ __forceinline__ bool is_reliable(float both, float size_w, float y) {
  return fmaxf(fabsf(both), size_w) <= kCancellation * fabsf(y) && is_finite(y);  // a NaN is one of y, too
}

// The window of an output pixel, and where that pixel lies in `out` (in elements).
__device__ __forceinline__ Window output_window(const Conv2dProblem& p, const GemmParams& params, int64_t pixel,
                                                int64_t pixels) {
  const unsigned at = pixel < pixels ? (unsigned)pixel : 0, row = at / (unsigned)p.OW, n = row / (unsigned)p.OH;
  const int h = (int)(row % (unsigned)p.OH * p.stride_h - p.pad_top);
  const int w = (int)(at % (unsigned)p.OW * p.stride_w - p.pad_left);
  return {n * params.stride_n + h * params.stride_h + w * params.stride_w, pixel < pixels ? h : kOutside, w};
}
__device__ __forceinline__ int64_t output_offset(const Conv2dProblem& p, const Operand& out, int64_t pixel) {
  const unsigned at = (unsigned)pixel, row = at / (unsigned)p.OW, n = row / (unsigned)p.OH;
  return n * out.stride[0] + row % (unsigned)p.OH * out.stride[2] + at % (unsigned)p.OW * out.stride[3];
}

template <typename T, typename Tile, Layout L, Formula F>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    forward_kernel(Conv2dArgs args, GemmParams params, PackedWeights weights, int* flags, bool flagged_only) {
#if defined(ADDEROPS_SIMT) || !defined(__CUDA_ARCH__)
  constexpr bool kWanted = true;
#else  // compiled where forward.cu will launch it
  constexpr bool kWanted = sizeof(T) == 4 ? F == Formula::kDistance || __CUDA_ARCH__ <= 800 : __CUDA_ARCH__ < 800;
#endif
  if constexpr (kWanted) {
    int* const flag = flags + tile_index();
    if (flagged_only && !*flag) return;
    SHARED(float, s_slabs, [2 * kSlabFloats<Tile>]);
    const Conv2dProblem& p = args.problem;
    const int M = (int)(p.C_out / p.groups), C = (int)(p.C_in / p.groups), group = blockIdx.z;
    const int64_t pixels = p.N * p.OH * p.OW;
    const int64_t pixel0 = (int64_t)blockIdx.x * Tile::kN;
    const int m0 = blockIdx.y * Tile::kM;

    const char* const source = static_cast<const char*>(params.source) + group * C * params.stride_c;
    const int64_t weights_of_group = (int64_t)p.KH * p.KW * ((C + kSlab - 1) / kSlab * kSlab) * weights.pitch;
    const char* const packed = static_cast<const char*>(weights.data) + (group * weights_of_group + m0) * 4;
    const auto window_of = [&](int n) { return output_window(p, params, pixel0 + n, pixels); };
    float acc[Tile::kThreadM][Tile::kThreadN] = {};
    WindowSums<Tile> sums;
    implicit_gemm<Tile, T, L, F == Formula::kMinimum>(params, source, window_of, packed, weights.pitch, s_slabs, acc,
                                                      sums, [](float sum, float w, float x, int, int) {
                                                        return sum +
                                                               (F == Formula::kDistance ? fabsf(x - w) : fminf(x, w));
                                                      });

    SHARED(float, s_sum_x, [F == Formula::kMinimum ? Tile::kN : 1]);
    SHARED(float, s_sum_w, [F == Formula::kMinimum ? Tile::kM : 1]);
    SHARED(float, s_size_w, [F == Formula::kMinimum ? Tile::kM : 1]);
    if constexpr (F == Formula::kMinimum) {
      reduce_splits(weights, weights.sums, m0, Tile::kM, thread_index(), s_sum_w);
      reduce_splits(weights, weights.sizes, m0, Tile::kM, thread_index(), s_size_w);
      sums.reduce(s_slabs, s_sum_x);
    }

    int flagged = 0;
    const ThreadTile<Tile> own;
    T* const out = static_cast<T*>(args.out.data);
#pragma unroll
    for (int j = 0; j < Tile::kThreadN; ++j) {
      const int64_t pixel = pixel0 + own.n(j);
      if (pixel >= pixels) continue;
      T* const to = out + output_offset(p, args.out, pixel);
#pragma unroll
      for (int i = 0; i < Tile::kThreadM; ++i) {
        const int m = m0 + own.m(i), co = group * M + m;
        if (m >= M) continue;
        float y = -acc[i][j];
        if constexpr (F == Formula::kMinimum) {
          const float both = s_sum_x[own.n(j)] + s_sum_w[own.m(i)];
          y = 2 * acc[i][j] - both;
          flagged |= !is_reliable(both, s_size_w[own.m(i)], y);
        }
        if (args.bias) y += load_float(static_cast<const T*>(args.bias) + co);
        store_float(to + co * args.out.stride[1], y);
      }
    }
    if constexpr (F == Formula::kMinimum) {
      flagged = __syncthreads_or(flagged);
      if (threadIdx.x == 0) *flag = flagged;
    }
  }
}

}  // namespace cuda
}  // namespace adderops
