// Int8 forward, exact int32 sums:   Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]|      k = (kh, kw, ci),  p = (oh, ow)
// and what int8_args.h makes of them.  One instruction for four terms (add_distances4); on sm_120 four.
//
//   x  (N, H, W, C_in) bytes;  `padding` outside the image       w  (C_out, KH, KW, C_in/groups) bytes, as they come
//   y, residual  (N, OH, OW, C_out)
//
// Block: kLanes filters x kColumns pixels, K in slabs of 64 bytes, two of each side in shared memory: one computed, one
// arriving (cp.async).
//
//   s_w  [2][kLanes][16 words]    a row is a filter's, or a pixel's, slab: four 16-byte words, word g of row r at
//   s_x  [2][kColumns][16 words]  g ^ (r/2 % 4), so that eight rows are read, and copied, without a bank conflict
//
//            kColumns pixels            a thread: runs of four filters x every kDown-th pixel; it holds 16 bytes of
//            +------------------+       its kThreadLanes filters, reads 16 bytes of a pixel after the other, and does
//   kLanes   |  thread          |       4 * kThreadLanes add_distances4 with them.  Filter 4t + i%4 + i/4 * 4*kAcross
//   filters  |                  |       lies in row t + i*kAcross: eight threads read eight neighbouring rows.
//            +------------------+       The sums return through shared memory, to be finished four filters at a time.
//
// A piece is what one copy moves: 16 bytes where the channels of a group are a multiple of 16, 4 where of 4, else a
// word put together of single bytes, zeros on both sides beyond the last channel.  The pieces of a filter are counted
// through taps and channels, so that a slab may hold several taps.  A piece outside the image is `padding`, and so are
// the pieces of both sides behind the last tap: equal bytes are no distance.
//
// 128 x 128, 256 threads, 8 x 8 each: 128 registers, 34 KB of shared memory, two blocks a multiprocessor (one on sm_75,
// which has 64 KB, and on sm_120), 0.32 to 0.34 instructions a term (docs/cuda.md).  grid (tiles of pixels, tiles of
// filters, groups).  Filters and pixels beyond the last are computed, of padding, and not stored.
#pragma once
#include "../definition/int8.h"
#include "tile.cuh"

namespace adderops {
namespace cuda {

constexpr int kInt8Slab = 16;  // words of a row

// n / d and n % d for n below 2^24.
struct Divisor {
  int d;
  uint32_t inverse;  // 2^32 / d, rounded down, at most 2^32 - 1: the product is at most one too small
  __device__ __forceinline__ void divide(int n, int* quotient, int* rest) const {
    const int q = (int)((uint64_t)n * inverse >> 32), r = n - q * d;
    *quotient = r >= d ? q + 1 : q, *rest = r >= d ? r - d : r;
  }
};

// What the host knows beside the call.
struct Int8Walk {
  int row, column;           // bytes of x from row to row, pixel to pixel
  int H, W, KH, C, M, K;     // C, M of a group
  int step_h, step_w;        // tap (i, j) is i*step_h rows down, j*step_w pixels to the right
  int slabs;                 // of all taps
  Divisor by_pieces, by_KW;  // pieces of a tap, taps of a row
  uint32_t padding;          // four of it
  bool vectors;              // may four neighbouring outputs be read and stored at once?
};
// Where the window of a pixel begins; `offset` of that place from the first byte of x.
struct Int8Site {
  int64_t offset;
  int h, w;
};

// A thread's part of copying: one piece of every kRows-th row of either side.
template <typename Tile, int Bytes>
struct Int8Copy {
  static constexpr int kPieces = Bytes == 16 ? 4 : 16;  // of a row
  static constexpr int kRows = Tile::kThreads / kPieces;
  static_assert(kRows % 8 == 0, "a thread's rows have one order of words");

  // `left`: channels of the tap from the piece on.
  static __device__ __forceinline__ void copy(uint32_t* to, const uint8_t* from, bool real, int left,
                                              uint32_t padding) {
    if constexpr (Bytes == 16) {
      if (real)
        cp_async_16(to, from, true);
      else
        store_16(to, Words4{{padding, padding, padding, padding}});
    } else if constexpr (Bytes == 4) {
      if (real)
        cp_async_4(to, from, true);
      else
        *to = padding;
    } else {
      uint32_t word = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b)
        if (b < left) word |= (real ? from[b] : padding & 255u) << 8 * b;
      *to = word;
    }
  }

  // The filter of row threadIdx.x / kPieces + r * kRows is that of r = 0 and lane_of(r) on.
  static_assert(kRows % Tile::kAcross == 0, "a thread's rows are of the same place in a run of threads");
  static __device__ __forceinline__ constexpr int lane_of(int r) {
    return r * kRows / Tile::kAcross % 4 + r * kRows / Tile::kAcross / 4 * (4 * Tile::kAcross);
  }

  // A slab of the block's `filters`, from w on, and of its pixels, in the image from x on.
  static __device__ __forceinline__ void fetch(const Int8Walk& walk, int slab, const Int8Site* sites, const uint8_t* x,
                                               const uint8_t* w, int filters, uint32_t* s_w, uint32_t* s_x) {
    constexpr int kStep = Bytes == 1 ? 4 : Bytes;
    const unsigned thread = thread_index(), piece = thread % kPieces, word = piece * (kInt8Slab / kPieces);
    const unsigned row = thread / kPieces, n = row / Tile::kAcross;
    const unsigned at = row * kInt8Slab + (word / 4 ^ row / 2 % 4) * 4 + word % 4;
    int tap, i, j, c;
    walk.by_pieces.divide(slab * kPieces + (int)piece, &tap, &c);
    walk.by_KW.divide(tap, &i, &j);
    const int left = walk.C - c * kStep, down = i * walk.step_h, right = j * walk.step_w;
    const int lane = (int)(row % Tile::kAcross * 4 + n % 4 + n / 4 * (4 * Tile::kAcross));
    const int lanes = i < walk.KH ? filters - lane : 0;
    const uint8_t* from = w + (lane * walk.K + tap * walk.C + c * kStep);
#pragma unroll
    for (int r = 0; r < (Tile::kLanes + kRows - 1) / kRows; ++r) {
      if (Tile::kLanes % kRows && row + r * kRows >= Tile::kLanes) break;
      copy(s_w + at + r * kRows * kInt8Slab, from + lane_of(r) * walk.K, lane_of(r) < lanes, left, walk.padding);
    }
    // behind the last tap every row is outside
    const int height = i < walk.KH ? walk.H : 0;
    from = x + (down * walk.row + right * walk.column + c * kStep);
#pragma unroll
    for (int r = 0; r < Tile::kColumns / kRows; ++r) {
      const Int8Site site = sites[row + r * kRows];
      const bool inside = (unsigned)(site.h + down) < (unsigned)height && (unsigned)(site.w + right) < (unsigned)walk.W;
      copy(s_x + at + r * kRows * kInt8Slab, from + site.offset, inside, left, walk.padding);
    }
  }
};

// Where a thread stands in its block's tile: its first row of either side.
template <typename T>
struct Int8Place {
  unsigned lane, column;
  __device__ __forceinline__ Int8Place() {
    const unsigned thread = thread_index(), warp = thread / 32, l = thread % 32;
    constexpr int kWarpsAcross = T::kAcross / T::kWarpLanes;
    lane = warp % kWarpsAcross * T::kWarpLanes + l % T::kWarpLanes;
    column = warp / kWarpsAcross * T::kWarpColumns + l / T::kWarpLanes;
  }
};
// Where word 0 of a row's first 16 bytes is, in words; those of group g are at ^ 4*g.
__device__ __forceinline__ unsigned int8_row(unsigned row) { return row * kInt8Slab + row / 2 % 4 * 4; }

// acc[i][j] += the distance of filter i and pixel j over a slab, from the thread's first row of either side on; eight
// bytes of each at a time, which leaves registers for the rest.
template <typename T>
__device__ __forceinline__ void add_slab(uint32_t (&acc)[T::kThreadLanes][T::kThreadColumns], const uint32_t* slabs,
                                         unsigned lanes, unsigned columns) {
  static_assert(T::kDown % 8 == 0 && T::kAcross % 4 == 0 && (T::kAcross & (T::kAcross - 1)) == 0, "order of words");
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    Words2 b[T::kThreadLanes];
#pragma unroll
    for (int i = 0; i < T::kThreadLanes; ++i)  // the row i * kAcross further down
      b[i] = load_8<Words2>(slabs + (lanes ^ (unsigned)(g / 2 ^ i * T::kAcross / 2 % 4) * 4) +
                            i * T::kAcross * kInt8Slab + g % 2 * 2);
#pragma unroll
    for (int j = 0; j < T::kThreadColumns; ++j) {
      const Words2 a = load_8<Words2>(slabs + (columns ^ (unsigned)g / 2 * 4) + j * T::kDown * kInt8Slab + g % 2 * 2);
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < T::kThreadLanes; ++i) acc[i][j] = add_distances4(a.v[k], b[i].v[k], acc[i][j]);
    }
  }
}

// definition::int8_finish of four neighbouring filters, or of fewer, or of such as are not aligned.
__device__ __forceinline__ void finish_four(const Int8Args& args, const Words4& sums, const Float4& scale,
                                            const Float4& offset, int64_t co, int64_t at, int count, bool vectors) {
  if (!vectors || count < 4) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < count) definition::int8_finish(args, (int32_t)sums.v[k], co + k, at + k);
    return;
  }
  if (args.output == Int8Output::kSums)
    return store_16(static_cast<int32_t*>(args.y) + at,
                    Words4{{0 - sums.v[0], 0 - sums.v[1], 0 - sums.v[2], 0 - sums.v[3]}});
  Float4 z = {};
  if (args.residual && args.float_residual) {
    z = load_16<Float4>(static_cast<const float*>(args.residual) + at);
  } else if (args.residual) {
    const uint32_t bytes = *reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(args.residual) + at);
#pragma unroll
    for (int k = 0; k < 4; ++k) z.v[k] = static_cast<float>(bytes >> 8 * k & 255u);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k)
    z.v[k] = definition::int8_float(args, (int32_t)sums.v[k], scale.v[k], offset.v[k], z.v[k]);
  if (args.output == Int8Output::kFloat32) return store_16(static_cast<float*>(args.y) + at, z);
  uint32_t bytes = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) bytes |= (uint32_t)definition::int8_byte(args, z.v[k]) << 8 * k;
  *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(args.y) + at) = bytes;
}

// What is given up on sm_120, whose four instructions need more registers, is the second block of the largest tile.
template <typename Tile>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kInt8Blocks = Tile::kThreads > 128 ? 1 : Tile::kBlocks;
#else
constexpr int kInt8Blocks = Tile::kBlocks;
#endif

template <typename Tile, int Bytes>
__global__ void __launch_bounds__(Tile::kThreads, kInt8Blocks<Tile>) forward_int8_kernel(Int8Args args, Int8Walk walk) {
  constexpr int kWords = kInt8Slab * (Tile::kLanes + Tile::kColumns), kColumnsAt = kInt8Slab * Tile::kLanes;
  SHARED(uint32_t, s_slabs, [2 * kWords]);
  SHARED(Int8Site, s_sites, [Tile::kColumns]);
  const Conv2dProblem& p = args.problem;
  const int M = walk.M, group = blockIdx.z;
  const int64_t pixels = p.N * p.OH * p.OW, first = (int64_t)blockIdx.x * Tile::kColumns;
  const int lane0 = blockIdx.y * Tile::kLanes;
  for (int i = threadIdx.x; i < Tile::kColumns; i += Tile::kThreads) {
    const unsigned at = (unsigned)(first + i), row = at / (unsigned)p.OW, n = row / (unsigned)p.OH;
    const int h = (int)(row % (unsigned)p.OH * p.stride_h - p.pad_top);
    const int w = (int)(at % (unsigned)p.OW * p.stride_w - p.pad_left);
    // behind the last pixel: never inside
    s_sites[i] = {n * p.H * walk.row + (int64_t)h * walk.row + (int64_t)w * walk.column,
                  first + i < pixels ? h : -0x40000000, w};
  }
  __syncthreads();

  const uint8_t* const x = args.x + group * walk.C;
  const uint8_t* const w = args.w + ((int64_t)group * M + lane0) * walk.K;
  uint32_t acc[Tile::kThreadLanes][Tile::kThreadColumns] = {};
  using Copy = Int8Copy<Tile, Bytes>;
  Copy::fetch(walk, 0, s_sites, x, w, M - lane0, s_slabs, s_slabs + kColumnsAt);
  cp_async_commit();
  int left = walk.slabs;
  for (int at = 0;; at = kWords - at) {
    cp_async_wait<0>();
    __syncthreads();
    if (--left) {
      Copy::fetch(walk, walk.slabs - left, s_sites, x, w, M - lane0, s_slabs + kWords - at,
                  s_slabs + kWords - at + kColumnsAt);
      cp_async_commit();
    }
    const Int8Place<Tile> place;
    add_slab<Tile>(acc, s_slabs, at + int8_row(place.lane), at + int8_row(place.column) + kColumnsAt);
    if (!left) break;
  }

  // The sums of a round's pixels, [pixel][kLanes], where the slabs were; then four filters a thread.
  constexpr int kRounds = Tile::kLanes * Tile::kColumns > 2 * kWords ? 2 : 1, kRound = Tile::kThreadColumns / kRounds;
  constexpr int kRuns = Tile::kLanes / 4;
  const Int8Place<Tile> place;
  static_assert(Tile::kLanes * Tile::kColumns / kRounds <= 2 * kWords && Tile::kThreads % kRuns == 0, "sums");
  const int lane = lane0 + threadIdx.x % kRuns * 4, count = M - lane;
  const int64_t co = (int64_t)group * M + lane;
  Float4 scale = {}, offset = {};
  if (args.scale) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < count) scale.v[k] = args.scale[co + k], offset.v[k] = args.offset[co + k];
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRound; ++j)
#pragma unroll
      for (int i = 0; i < Tile::kThreadLanes; i += 4)
        store_16(s_slabs + (place.column + j * Tile::kDown) * Tile::kLanes + place.lane * 4 + i * Tile::kAcross,
                 Words4{{acc[i][round * kRound + j], acc[i + 1][round * kRound + j], acc[i + 2][round * kRound + j],
                         acc[i + 3][round * kRound + j]}});
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x / kRuns; i < kRound * Tile::kDown; i += Tile::kThreads / kRuns) {
      const int64_t pixel = first + round * kRound * Tile::kDown + i;
      if (pixel >= pixels || count <= 0) break;
      finish_four(args, load_16<Words4>(s_slabs + i * Tile::kLanes + threadIdx.x % kRuns * 4), scale, offset, co,
                  pixel * p.C_out + co, count, walk.vectors);
    }
  }
}

// One output a thread, by the definition: depthwise and other narrow groups, and what 32-bit coordinates do not reach.
constexpr int kDirectInt8Threads = 128;
__global__ void __launch_bounds__(kDirectInt8Threads) direct_int8_kernel(Int8Args args) {
  const Conv2dProblem& p = args.problem;
  const uint64_t C = p.C_out, OH = p.OH, OW = p.OW, outputs = p.N * OH * OW * C;
  for (uint64_t i = (uint64_t)blockIdx.x * kDirectInt8Threads + threadIdx.x; i < outputs;
       i += (uint64_t)gridDim.x * kDirectInt8Threads) {
    const uint64_t co = i % C, pixel = i / C, row = pixel / OW;
    definition::int8_finish(args, definition::int8_sum(args, row / OH, co, row % OH, pixel % OW), co, i);
  }
}

}  // namespace cuda
}  // namespace adderops
