// Forward of float16 and bfloat16 with float32 sums, from sm_80 on:   Y = 2*sum min(X, W) - (sum X + sum W)
//
// Minima of two packed halves are exact; the tensor cores add them up: the sum of a 16 x 16 tile of minima over its
// columns is that tile times a matrix of ones and zeros, in float32.  No half is ever added to a half.
//
//   A = min(X, W[co])   16 pixels x 16 channels, four words a lane: where a lane's words lie in A follows from its row
//                       alone, for the order of the channels does not matter
//   B                   ones in column co % 8, zeros elsewhere: the sums of filter co land in that column of C
//   a term: 1/2 packed minimum and 1/8 mma; 16 bytes of shared memory serve 4 x 8 of them.
//
//   s_x  [2][kColumns][32]   channels last, a pixel's four 16-byte words permuted so that neither copies nor reads
//   s_w  [2][kLanes][32]     conflict (word t of row r at t ^ (r/2 % 4));  packed by pack.cuh, in the same order
//
// Block: kLanes filters x kColumns pixels, 4 warps of kWarpLanes x kWarpPixels; slabs of 32 channels.  The window sums
// of X come from the same instruction, with B all ones.  A tile with an output that cannot be trusted (forward.cuh) is
// flagged, and forward_repair_kernel, launched behind, does it again by definition.h. grid (tiles of pixels, tiles of
// filters, groups).
#pragma once
#include "forward.cuh"

namespace adderops {
namespace cuda {

constexpr int kMmaSlab = 32;

template <int Lanes, int Columns, int WarpLanes, int WarpPixels, int BlocksPerMultiprocessor>
struct MmaTile {
  static constexpr int kLanes = Lanes, kColumns = Columns, kWarpLanes = WarpLanes, kWarpPixels = WarpPixels;
  static constexpr int kThreads = 32 * (Lanes / WarpLanes) * (Columns / WarpPixels), kBlocks = BlocksPerMultiprocessor;
  static_assert(kThreads == Columns, "planes: a thread copies one pixel");
  static_assert(WarpLanes % 8 == 0 && WarpPixels % 16 == 0, "fragments");
};

__device__ __forceinline__ int mma_word(int row, int t) { return row * 16 + (t ^ (row / 2 % 4)) * 4; }  // in words

// A thread's part of copying the pixels: planes: the 32 channels of one pixel, through registers; channels: four
// 16-byte words of different pixels, asynchronously.
template <typename Tile, typename T, Layout L>
struct MmaCopy {
  static constexpr int kSites = L == Layout::kChannels ? 4 : 1;
  Cursors<kSites, Tile::kThreads> to_read;
  uint32_t words[L == Layout::kPlanes ? kMmaSlab / 2 : 1];

  static __device__ __forceinline__ int pixel(int i) {
    return L == Layout::kPlanes ? threadIdx.x : threadIdx.x / 4 + i * (Tile::kThreads / 4);
  }
  template <typename SiteOf>
  __device__ __forceinline__ MmaCopy(const Walk& walk, const char* source, const SiteOf& site_of) {
#pragma unroll
    for (int i = 0; i < kSites; ++i) {
      to_read.place(i, walk, source, site_of(pixel(i)));
      if (L == Layout::kChannels) to_read.at[i] += threadIdx.x % 4 * 16;
    }
  }
  __device__ __forceinline__ void fetch(const Walk& walk, int c, uint32_t* slab) {
    if constexpr (L == Layout::kChannels) {
      const bool real = c + threadIdx.x % 4 * 8 < walk.channels;
#pragma unroll
      for (int i = 0; i < kSites; ++i)
        cp_async_16(slab + mma_word(pixel(i), threadIdx.x % 4), to_read.at[i], to_read.inside[i] && real);
    } else {
      const int left = walk.channels - c;
#pragma unroll
      for (int k = 0; k < kMmaSlab; k += 2) {
        const char* from = to_read.at[0] + k * walk.channel;
        const uint32_t low = to_read.inside[0] && k < left ? *reinterpret_cast<const uint16_t*>(from) : 0;
        const uint32_t high =
            to_read.inside[0] && k + 1 < left ? *reinterpret_cast<const uint16_t*>(from + walk.channel) : 0;
        words[k / 2] = low | high << 16;
      }
    }
  }
  __device__ __forceinline__ void commit(uint32_t* slab) {
    if constexpr (L == Layout::kPlanes) {
#pragma unroll
      for (int t = 0; t < 4; ++t)
        store_16(slab + mma_word(threadIdx.x, t),
                 Words4{{words[4 * t], words[4 * t + 1], words[4 * t + 2], words[4 * t + 3]}});
    }
  }
};

template <typename Tile>
__device__ __forceinline__ void fetch_mma_lanes(const char* weights, uint32_t* slab) {
#pragma unroll
  for (int i = 0; i < (Tile::kLanes * 4 + Tile::kThreads - 1) / Tile::kThreads; ++i) {
    const int piece = threadIdx.x + i * Tile::kThreads;
    if (Tile::kLanes * 4 % Tile::kThreads && piece >= Tile::kLanes * 4) break;
    cp_async_16(slab + mma_word(piece / 4, piece % 4), weights + piece * 16, true);
  }
}

template <typename T>
constexpr uint32_t kOnes = 0x3c003c00u;
template <>
constexpr uint32_t kOnes<BFloat16> = 0x3f803f80u;

template <typename T, typename Tile, Layout L>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    forward_half_kernel(Conv2dArgs args, Walk walk, PackedWeights weights, int* flags) {
#if defined(ADDEROPS_SIMT) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  SHARED(uint32_t, s_x, [2 * Tile::kColumns * 16]);
  SHARED(uint32_t, s_w, [2 * Tile::kLanes * 16]);
  constexpr int kFragments = Tile::kWarpPixels / 16, kOctets = Tile::kWarpLanes / 8;
  const Conv2dProblem& p = args.problem;
  const int M = (unsigned)p.C_out / (unsigned)p.groups, C = walk.channels, group = blockIdx.z;
  const int64_t pixels = p.N * p.OH * p.OW, first = (int64_t)blockIdx.x * Tile::kColumns;
  const int lane0 = blockIdx.y * Tile::kLanes;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int warp_lane = warp % (Tile::kLanes / Tile::kWarpLanes) * Tile::kWarpLanes;
  const int warp_pixel = warp / (Tile::kLanes / Tile::kWarpLanes) * Tile::kWarpPixels;

  const char* const source = static_cast<const char*>(walk.source) + group * C * walk.channel;
  const char* packed =
      static_cast<const char*>(weights.packed) + ((int64_t)group * walk.slabs * weights.pitch + lane0) * (kMmaSlab * 2);
  const auto site_of = [&](int column) { return forward_site(p, walk, first + column, pixels); };

  float c[kFragments][kOctets][4] = {}, window[kFragments][4] = {};
  MmaCopy<Tile, T, L> copy(walk, source, site_of);
  int tap_i = 0, tap_j = 0, channel = 0, left = walk.slabs;
  copy.to_read.aim(walk, 0, 0);
  copy.fetch(walk, 0, s_x);
  fetch_mma_lanes<Tile>(packed, s_w);
  cp_async_commit();
  for (int now = 0;; now ^= 1) {
    uint32_t* const x_now = s_x + now * Tile::kColumns * 16;
    const uint32_t* const w_now = s_w + now * Tile::kLanes * 16;
    copy.commit(x_now);
    cp_async_wait<0>();
    __syncthreads();
    if (--left) {
      channel += kMmaSlab;
      if (channel < walk.channels) {
        copy.to_read.advance(walk.next_slab);
      } else {
        channel = 0;
        if (++tap_j < walk.taps_w)
          copy.to_read.advance(walk.next_tap);
        else
          tap_j = 0, ++tap_i, copy.to_read.advance(walk.next_row);
        copy.to_read.aim(walk, tap_i, tap_j);
      }
      packed += walk.next_weights;
      copy.fetch(walk, channel, s_x + (now ^ 1) * Tile::kColumns * 16);
      fetch_mma_lanes<Tile>(packed, s_w + (now ^ 1) * Tile::kLanes * 16);
      cp_async_commit();
    }
    // rows g and g + 8 of each fragment: a lane's 8 channels of either, and those of the filter
    Words4 x[kFragments][2];
#pragma unroll
    for (int m = 0; m < kFragments; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        x[m][half] = load_16<Words4>(x_now + mma_word(warp_pixel + m * 16 + half * 8 + g, t));
    const uint32_t ones[2] = {kOnes<T>, kOnes<T>};
#pragma unroll
    for (int m = 0; m < kFragments; ++m)
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        const uint32_t a[4] = {x[m][0].v[k], x[m][1].v[k], x[m][0].v[k + 1], x[m][1].v[k + 1]};
        mma_16x8x16<T>(window[m], a, ones);
      }
#pragma unroll
    for (int co = 0; co < Tile::kWarpLanes; ++co) {
      const Words4 w = load_16<Words4>(w_now + mma_word(warp_lane + co, t));
      const uint32_t column = co % 8 == g ? kOnes<T> : 0;
      const uint32_t b[2] = {column, column};
#pragma unroll
      for (int m = 0; m < kFragments; ++m)
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
          const uint32_t a[4] = {minimum2<T>(x[m][0].v[k], w.v[k]), minimum2<T>(x[m][1].v[k], w.v[k]),
                                 minimum2<T>(x[m][0].v[k + 1], w.v[k + 1]), minimum2<T>(x[m][1].v[k + 1], w.v[k + 1])};
          mma_16x8x16<T>(c[m][co / 8], a, b);
        }
    }
    if (!left) break;
  }

  SHARED(float, s_sum_w, [Tile::kLanes]);
  SHARED(float, s_size_w, [Tile::kLanes]);
  gather_lane_sums(weights, weights.sums, lane0, Tile::kLanes, threadIdx.x, s_sum_w);
  gather_lane_sums(weights, weights.sizes, lane0, Tile::kLanes, threadIdx.x, s_size_w);
  __syncthreads();
  int doubtful = 0;
#pragma unroll
  for (int m = 0; m < kFragments; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t pixel = first + warp_pixel + m * 16 + half * 8 + g;
      if (pixel >= pixels) continue;
      T* const to = static_cast<T*>(args.out.data) + forward_target(p, args.out, pixel);
#pragma unroll
      for (int octet = 0; octet < kOctets; ++octet)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = warp_lane + octet * 8 + 2 * t + i, co = group * M + lane0 + column;
          if (lane0 + column >= M) continue;
          const float both = window[m][2 * half] + s_sum_w[column];
          float y = 2 * c[m][octet][2 * half + i] - both;
          doubtful |= !trustworthy(both, s_size_w[column], y);
          if (args.bias) y += load_float(static_cast<const T*>(args.bias) + co);
          store_float(to + co * args.out.stride[1], y);
        }
    }
  doubtful = __syncthreads_or(doubtful);
  if (threadIdx.x == 0) flags[((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = doubtful;
#endif
}

// The flagged tiles of `lanes` x `columns`, by the definition.  Same grid.
template <typename T>
__global__ void __launch_bounds__(kRepairThreads)
    forward_repair_kernel(Conv2dArgs args, int lanes, int columns, const int* flags) {
  if (!flags[((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x]) return;
  const Conv2dProblem& p = args.problem;
  const int M = (int)(p.C_out / p.groups);
  for (int k = threadIdx.x; k < lanes * columns; k += kRepairThreads) {
    const int64_t pixel = (int64_t)blockIdx.x * columns + k % columns;
    const int lane = blockIdx.y * lanes + k / columns, co = blockIdx.z * M + lane;
    if (pixel >= p.N * p.OH * p.OW || lane >= M) continue;
    const unsigned at = (unsigned)pixel, row = at / (unsigned)p.OW;
    store_float(static_cast<T*>(args.out.data) + forward_target(p, args.out, pixel) + co * args.out.stride[1],
                definition::forward<T>(args, row / (unsigned)p.OH, co, row % (unsigned)p.OH, at % (unsigned)p.OW));
  }
}

}  // namespace cuda
}  // namespace adderops
