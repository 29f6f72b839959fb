// Forward, float32 sums:   Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]|,   k = (kh, kw, ci),  p = (oh, ow)
//
//   kDirect   acc += |x - w|        two instructions a term: FADD, FADD with a free absolute value
//   kMinimum  acc += min(x, w)      FMNMX on another pipe and FADD: twice as fast where there are 64 float lanes
//             (sm_75, sm_80); Y = 2*acc - (sum X + sum W).  Where that cancels (|sum X + sum W| or sum |W| >
//             kCancellation * |Y|), overflows or meets an infinity or NaN, the tile is flagged, and the direct form,
//             launched behind it on the flagged tiles alone, computes it again.
//
// Block: kLanes filters x kColumns pixels (tile.cuh), K in slabs (walk.cuh); 128 x 128, 256 threads, 8 x 8 each:
// 128 registers, 33 to 37 KB of shared memory, two blocks a multiprocessor.  grid (tiles of pixels, tiles of filters,
// groups). Any strides, channels and filters: rows of X beyond the last channel are zero as W's are, filters beyond the
// last and pixels beyond the last are computed and not stored.
#pragma once
#include "walk.cuh"

namespace adderops {
namespace cuda {

enum class Form : int { kDirect, kMinimum };
constexpr float kCancellation = 32.f;

// Is y = 2 * sum min - both finite, and not what a cancellation left?  A comparison with NaN is false.  Offsets of
// either sign cancel within `both` already; not within sum |W|, nor within sum |X|, which is at most |y| + sum |W|.
__device__ __forceinline__ bool trustworthy(float both, float size_w, float y) {
  return fmaxf(fabsf(both), size_w) <= kCancellation * fabsf(y) && is_finite(y);  // a NaN is one of y, too
}

// Where the window of an output pixel begins, and where the pixel lies in `out` (in elements).
__device__ __forceinline__ Site forward_site(const Conv2dProblem& p, const Walk& walk, int64_t pixel, int64_t pixels) {
  const unsigned at = pixel < pixels ? (unsigned)pixel : 0, row = at / (unsigned)p.OW, n = row / (unsigned)p.OH;
  return {n * walk.image, (int)(row % (unsigned)p.OH * p.stride_h - p.pad_top),
          (int)(at % (unsigned)p.OW * p.stride_w - p.pad_left), pixel < pixels};
}
__device__ __forceinline__ int64_t forward_target(const Conv2dProblem& p, const Operand& out, int64_t pixel) {
  const unsigned at = (unsigned)pixel, row = at / (unsigned)p.OW, n = row / (unsigned)p.OH;
  return n * out.stride[0] + row % (unsigned)p.OH * out.stride[2] + at % (unsigned)p.OW * out.stride[3];
}

template <typename T, typename Tile, Layout L, Form F>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    forward_kernel(Conv2dArgs args, Walk walk, PackedWeights weights, int* flags, bool flagged_only) {
#if defined(ADDEROPS_SIMT) || !defined(__CUDA_ARCH__)
  constexpr bool kWanted = true;
#else  // compiled where forward.cu will launch it
  constexpr bool kWanted = sizeof(T) == 4 ? F == Form::kDirect || __CUDA_ARCH__ <= 800 : __CUDA_ARCH__ < 800;
#endif
  if constexpr (kWanted) {
    int* const flag = flags + ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    if (flagged_only && !*flag) return;
    SHARED(float, s_slabs, [2 * kSlabFloats<Tile>]);
    const Conv2dProblem& p = args.problem;
    const int M = (int)(p.C_out / p.groups), C = (int)(p.C_in / p.groups), group = blockIdx.z;
    const int64_t pixels = p.N * p.OH * p.OW;
    const int64_t first = (int64_t)blockIdx.x * Tile::kColumns;
    const int lane0 = blockIdx.y * Tile::kLanes;

    const char* const source = static_cast<const char*>(walk.source) + group * C * walk.channel;
    const int64_t weights_of_group = (int64_t)p.KH * p.KW * ((C + kSlab - 1) / kSlab * kSlab) * weights.pitch;
    const char* const packed = static_cast<const char*>(weights.packed) + (group * weights_of_group + lane0) * 4;
    const auto site_of = [&](int column) { return forward_site(p, walk, first + column, pixels); };
    float acc[Tile::kThreadLanes][Tile::kThreadColumns] = {};
    ColumnSums<Tile> sums;
    sum_over_taps<Tile, T, L, F == Form::kMinimum>(
        walk, source, site_of, packed, weights.pitch, s_slabs, acc, sums,
        [](float sum, float w, float x, int, int) { return sum + (F == Form::kDirect ? fabsf(x - w) : fminf(x, w)); });

    SHARED(float, s_sum_x, [F == Form::kMinimum ? Tile::kColumns : 1]);
    SHARED(float, s_sum_w, [F == Form::kMinimum ? Tile::kLanes : 1]);
    SHARED(float, s_size_w, [F == Form::kMinimum ? Tile::kLanes : 1]);
    if constexpr (F == Form::kMinimum) {
      gather_lane_sums(weights, weights.sums, lane0, Tile::kLanes, thread_index(), s_sum_w);
      gather_lane_sums(weights, weights.sizes, lane0, Tile::kLanes, thread_index(), s_size_w);
      sums.gather(s_slabs, s_sum_x);
    }

    int doubtful = 0;
    const Place<Tile> place;
    T* const out = static_cast<T*>(args.out.data);
#pragma unroll
    for (int j = 0; j < Tile::kThreadColumns; ++j) {
      const int64_t pixel = first + place.column_of(j);
      if (pixel >= pixels) continue;
      T* const to = out + forward_target(p, args.out, pixel);
#pragma unroll
      for (int i = 0; i < Tile::kThreadLanes; ++i) {
        const int lane = lane0 + place.lane_of(i), co = group * M + lane;
        if (lane >= M) continue;
        float y = -acc[i][j];
        if constexpr (F == Form::kMinimum) {
          const float both = s_sum_x[place.column_of(j)] + s_sum_w[place.lane_of(i)];
          y = 2 * acc[i][j] - both;
          doubtful |= !trustworthy(both, s_size_w[place.lane_of(i)], y);
        }
        if (args.bias) y += load_float(static_cast<const T*>(args.bias) + co);
        store_float(to + co * args.out.stride[1], y);
      }
    }
    if constexpr (F == Form::kMinimum) {
      doubtful = __syncthreads_or(doubtful);
      if (threadIdx.x == 0) *flag = doubtful;
    }
  }
}

}  // namespace cuda
}  // namespace adderops
