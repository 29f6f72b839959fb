// Forward of float16 and bfloat16 with float32 sums, from sm_80 on:   Y = 2*sum min(X, W) - (sum X + sum W)
//
// The minimum of two packed halves is exact, and the tensor cores add the minima up in float32: a matrix of minima
// times a matrix of ones and zeros.  No half is ever added to a half.
//
//   X  (N, C_in, H, W), any strides     packed W  [group][tap][slab of ci][co][32] (pack.cuh)     Y  any strides
//
//     block  kM filters x kN pixels (64 x 128), 4 warps          grid (tiles of pixels, tiles of filters, groups)
//     warp   kWarpM x kWarpN (64 x 32): kFragments = 2 fragments of 16 pixels, kOctets = 8 octets of filters
//     lane   g = lane / 4, t = lane % 4: pixels g and g + 8 of a fragment, filters 2t and 2t + 1 of an octet;
//            64 accumulators, 8 window sums
//
//   s_x [2][kN][32 channels]               s_w [2][kM][32 channels]           a slab of each is computed, one arrives
//         | a lane reads 16 bytes                | the lanes of one t read the same
//         | (8 channels) of its two pixels       | 16 bytes of filter co
//         +---------------> min <----------------+
//                            |
//             A  16 pixels x 16 channels   times   B  16 x 8            is   C  16 pixels x 8 filters, float32
//                a lane's words all lie in            column co % 8             min summed over the channels, added
//                rows g and g + 8; the order          is ones, the rest         to column co % 8: the sum of filter co
//                of the channels is free              zeros
//
// The sums of X over each window come from the same instruction with B all ones.  A term costs 1/2 packed minimum and
// 1/8 mma; 16 bytes of shared memory serve 4 x 8 of them.  The four 16-byte words of a pixel or filter are swizzled
// (word t of row r at t ^ r/2 % 4), so that neither copies nor reads have bank conflicts.
//
// Tails: channels beyond the last are zeros on both sides; filters and pixels beyond the last are not stored.  A tile
// with an output that is not reliable (forward.cuh) is flagged, and forward_repair_kernel, launched next, computes it
// by the definition.
#pragma once
#include "forward.cuh"

namespace adderops {
namespace cuda {

constexpr int kMmaSlab = 32;

template <int M, int N, int WarpM, int WarpN, int BlocksPerMultiprocessor>
struct MmaTile {
  static constexpr int kM = M, kN = N, kWarpM = WarpM, kWarpN = WarpN;  // filters x pixels: of a block, of a warp
  static constexpr int kThreads = 32 * (M / WarpM) * (N / WarpN), kBlocks = BlocksPerMultiprocessor;
  static_assert(kThreads == N, "kStrided: a thread copies one pixel");
  static_assert(WarpM % 8 == 0 && WarpN % 16 == 0, "fragments");
};

// Where 16-byte word t of a pixel's or filter's slab lies, in words of 4 bytes.
__device__ __forceinline__ int swizzled(int row, int t) { return row * 16 + (t ^ (row / 2 % 4)) * 4; }

// A thread's share of copying a slab of pixels.  kStrided: the 32 channels of one pixel, through registers;
// kChannelsLast: four 16-byte words of different pixels, asynchronously.
template <typename Tile, typename T, Layout L>
struct MmaPixelLoader {
  static constexpr int kWindows = L == Layout::kChannelsLast ? 4 : 1;
  TapIterator<kWindows, Tile::kThreads> taps;
  uint32_t words[L == Layout::kStrided ? kMmaSlab / 2 : 1];

  static __device__ __forceinline__ int pixel(int i) {
    return L == Layout::kStrided ? threadIdx.x : threadIdx.x / 4 + i * (Tile::kThreads / 4);
  }
  template <typename WindowOf>
  __device__ __forceinline__ MmaPixelLoader(const char* source, const WindowOf& window_of) {
#pragma unroll
    for (int i = 0; i < kWindows; ++i) {
      taps.set_window(i, source, window_of(pixel(i)));
      if (L == Layout::kChannelsLast) taps.pointer[i] += threadIdx.x % 4 * 16;
    }
  }
  __device__ __forceinline__ void load(const GemmParams& params, int c, uint32_t* slab) {
    if constexpr (L == Layout::kChannelsLast) {
      const bool valid = c + threadIdx.x % 4 * 8 < params.channels;
#pragma unroll
      for (int i = 0; i < kWindows; ++i)
        cp_async_16(slab + swizzled(pixel(i), threadIdx.x % 4), taps.pointer[i], taps.inside[i] && valid);
    } else {
      const int left = params.channels - c;
#pragma unroll
      for (int k = 0; k < kMmaSlab; k += 2) {
        const char* from = taps.pointer[0] + k * params.stride_c;
        const uint32_t low = taps.inside[0] && k < left ? *reinterpret_cast<const uint16_t*>(from) : 0;
        const uint32_t high =
            taps.inside[0] && k + 1 < left ? *reinterpret_cast<const uint16_t*>(from + params.stride_c) : 0;
        words[k / 2] = low | high << 16;
      }
    }
  }
  __device__ __forceinline__ void store(uint32_t* slab) {
    if constexpr (L == Layout::kStrided) {
#pragma unroll
      for (int t = 0; t < 4; ++t)
        store_16(slab + swizzled(threadIdx.x, t),
                 Words4{{words[4 * t], words[4 * t + 1], words[4 * t + 2], words[4 * t + 3]}});
    }
  }
};

template <typename Tile>
__device__ __forceinline__ void load_mma_weights(const char* weights, uint32_t* slab) {
#pragma unroll
  for (int i = 0; i < (Tile::kM * 4 + Tile::kThreads - 1) / Tile::kThreads; ++i) {
    const int copy = threadIdx.x + i * Tile::kThreads;
    if (Tile::kM * 4 % Tile::kThreads && copy >= Tile::kM * 4) break;
    cp_async_16(slab + swizzled(copy / 4, copy % 4), weights + copy * 16, true);
  }
}

template <typename T>
constexpr uint32_t kOnes = 0x3c003c00u;
template <>
constexpr uint32_t kOnes<BFloat16> = 0x3f803f80u;

template <typename T, typename Tile, Layout L>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    forward_half_kernel(Conv2dArgs args, GemmParams params, PackedWeights weights, int* flags) {
#if defined(ADDEROPS_SIMT) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  SHARED(uint32_t, s_x, [2 * Tile::kN * 16]);
  SHARED(uint32_t, s_w, [2 * Tile::kM * 16]);
  constexpr int kFragments = Tile::kWarpN / 16, kOctets = Tile::kWarpM / 8;
  const Conv2dProblem& p = args.problem;
  const int M = (unsigned)p.C_out / (unsigned)p.groups, C = params.channels, group = blockIdx.z;
  const int64_t pixels = p.N * p.OH * p.OW, pixel0 = (int64_t)blockIdx.x * Tile::kN;
  const int m0 = blockIdx.y * Tile::kM;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int warp_filter = warp % (Tile::kM / Tile::kWarpM) * Tile::kWarpM;  // first of the warp, in the block's tile
  const int warp_pixel = warp / (Tile::kM / Tile::kWarpM) * Tile::kWarpN;

  const char* const source = static_cast<const char*>(params.source) + group * C * params.stride_c;
  const char* packed =
      static_cast<const char*>(weights.data) + ((int64_t)group * params.slabs * weights.pitch + m0) * (kMmaSlab * 2);
  const auto window_of = [&](int n) { return output_window(p, params, pixel0 + n, pixels); };

  float c[kFragments][kOctets][4] = {}, window_sum[kFragments][4] = {};
  MmaPixelLoader<Tile, T, L> x_loader(source, window_of);
  int tap_i = 0, tap_j = 0, channel = 0, left = params.slabs;
  x_loader.taps.set_tap(params, 0, 0);
  x_loader.load(params, 0, s_x);
  load_mma_weights<Tile>(packed, s_w);
  cp_async_commit();
  for (int now = 0;; now ^= 1) {
    uint32_t* const x_now = s_x + now * Tile::kN * 16;
    const uint32_t* const w_now = s_w + now * Tile::kM * 16;
    x_loader.store(x_now);
    cp_async_wait<0>();
    __syncthreads();
    if (--left) {
      channel += kMmaSlab;
      if (channel < params.channels) {
        x_loader.taps.advance(params.next_slab);
      } else {
        channel = 0;
        if (++tap_j < params.taps_w)
          x_loader.taps.advance(params.next_tap);
        else
          tap_j = 0, ++tap_i, x_loader.taps.advance(params.next_tap_row);
        x_loader.taps.set_tap(params, tap_i, tap_j);
      }
      packed += params.next_weights;
      x_loader.load(params, channel, s_x + (now ^ 1) * Tile::kN * 16);
      load_mma_weights<Tile>(packed, s_w + (now ^ 1) * Tile::kM * 16);
      cp_async_commit();
    }
    // 8 channels of pixels g and g + 8 of each fragment
    Words4 x[kFragments][2];
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int r = 0; r < 2; ++r) x[f][r] = load_16<Words4>(x_now + swizzled(warp_pixel + f * 16 + r * 8 + g, t));
    const uint32_t all_ones[2] = {kOnes<T>, kOnes<T>};
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t a[4] = {x[f][0].v[k], x[f][1].v[k], x[f][0].v[k + 1], x[f][1].v[k + 1]};
        mma_16x8x16<T>(window_sum[f], a, all_ones);
      }
#pragma unroll
    for (int filter = 0; filter < Tile::kWarpM; ++filter) {
      const Words4 w = load_16<Words4>(w_now + swizzled(warp_filter + filter, t));
      const uint32_t ones = filter % 8 == g ? kOnes<T> : 0;
      const uint32_t b[2] = {ones, ones};
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const uint32_t a[4] = {minimum2<T>(x[f][0].v[k], w.v[k]), minimum2<T>(x[f][1].v[k], w.v[k]),
                                 minimum2<T>(x[f][0].v[k + 1], w.v[k + 1]), minimum2<T>(x[f][1].v[k + 1], w.v[k + 1])};
          mma_16x8x16<T>(c[f][filter / 8], a, b);
        }
    }
    if (!left) break;
  }

  SHARED(float, s_sum_w, [Tile::kM]);
  SHARED(float, s_size_w, [Tile::kM]);
  reduce_splits(weights, weights.sums, m0, Tile::kM, threadIdx.x, s_sum_w);
  reduce_splits(weights, weights.sizes, m0, Tile::kM, threadIdx.x, s_size_w);
  __syncthreads();
  int flagged = 0;
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t pixel = pixel0 + warp_pixel + f * 16 + r * 8 + g;
      if (pixel >= pixels) continue;
      T* const to = static_cast<T*>(args.out.data) + output_offset(p, args.out, pixel);
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int filter = warp_filter + octet * 8 + 2 * t + i, co = group * M + m0 + filter;
          if (m0 + filter >= M) continue;
          const float both = window_sum[f][2 * r] + s_sum_w[filter];
          float y = 2 * c[f][octet][2 * r + i] - both;
          flagged |= !is_reliable(both, s_size_w[filter], y);
          if (args.bias) y += load_float(static_cast<const T*>(args.bias) + co);
          store_float(to + co * args.out.stride[1], y);
        }
    }
  flagged = __syncthreads_or(flagged);
  if (threadIdx.x == 0) flags[tile_index()] = flagged;
#endif
}

// The flagged tiles of `filters` x `tile_pixels`, by the definition.  Same grid.
template <typename T>
__global__ void __launch_bounds__(kRepairThreads)
    forward_repair_kernel(Conv2dArgs args, int filters, int tile_pixels, const int* flags) {
  if (!flags[tile_index()]) return;
  const Conv2dProblem& p = args.problem;
  const int M = (int)(p.C_out / p.groups);
  for (int i = threadIdx.x; i < filters * tile_pixels; i += kRepairThreads) {
    const int64_t pixel = (int64_t)blockIdx.x * tile_pixels + i % tile_pixels;
    const int m = blockIdx.y * filters + i / tile_pixels, co = blockIdx.z * M + m;
    if (pixel >= p.N * p.OH * p.OW || m >= M) continue;
    const unsigned at = (unsigned)pixel, row = at / (unsigned)p.OW;
    store_float(static_cast<T*>(args.out.data) + output_offset(p, args.out, pixel) + co * args.out.stride[1],
                definition::forward<T>(args, row / (unsigned)p.OH, co, row % (unsigned)p.OH, at % (unsigned)p.OW));
  }
}

}  // namespace cuda
}  // namespace adderops
