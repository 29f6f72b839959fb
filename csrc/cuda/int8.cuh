// Int8 forward, exact int32 sums:   Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]|      k = (kh, kw, ci),  p = (oh, ow)
// and the epilogue of args/int8.h.  One instruction for four terms (add_distances4); on sm_120 four.
//
//   x  (N, H, W, C_in) uint8, `padding` outside the image       w  (C_out, KH, KW, C_in/groups) uint8, not packed
//   y, residual  (N, OH, OW, C_out)
//
//   s_w [2][kM filters][16 words]      A slab is 64 bytes of K of each filter and pixel: four 16-byte words, word g of
//   s_x [2][kN pixels][16 words]       row r at g ^ r/2 % 4, so that eight rows are copied and read without a bank
//         |                |           conflict.  One slab is computed, one arrives (cp.async).
//         v                v
//   8 bytes of each   8 bytes of       block   128 filters x 128 pixels, 8 warps; four smaller tiles
//   of 8 filters      a pixel          warp    8 x 4 threads
//         |                |           thread  8 x 8 accumulators: filters 4t + i%4 + i/4 * 4*kThreadsM, every
//         +-> add_distances4 <-+               kThreadsN-th pixel.  Filter i of a thread lies in row t + i*kThreadsM,
//                  |                           so that eight threads read eight neighbouring rows
//              acc[8][8] int32         grid    (tiles of pixels, tiles of filters, groups)
//                  |
//   s_slabs as [pixel][kM] -> epilogue4: four filters of a pixel per thread, 16 bytes of sums, 4 or 16 bytes of y
//
// A copy moves 16 bytes where the channels of a group are a multiple of 16, 4 bytes where of 4, else a word composed of
// single bytes, zeros on both sides beyond the last channel.  The copies of a filter are counted through taps and
// channels, so that a slab may hold several taps.  A copy outside the image is `padding`, and so are the copies of both
// sides after the last tap: equal bytes add nothing.
//
// 128 registers (159 on sm_120), 34 KB of shared memory, two blocks per multiprocessor (one on sm_75 and sm_120), 0.32
// to 0.34 instructions per term (docs/cuda.md).
// Tails: filters and pixels beyond the last are computed from padding, and not stored.
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

// The same for all threads, computed by the host.
struct Int8Params {
  int stride_h, stride_w;  // of x, in bytes
  int H, W, KH, C, M, K;   // C, M of a group
  int dilation_h, dilation_w;
  int slabs;                 // of all taps
  Divisor by_copies, by_KW;  // copies of a tap, taps of a filter's row
  uint32_t padding;          // four of it
  bool vector_epilogue;      // may four neighbouring outputs be read and stored at once?
};

// A thread's share of copying a slab: one copy of `Bytes` of every kRows-th row of either operand.
template <typename Tile, int Bytes>
struct Int8Loader {
  static constexpr int kCopies = Bytes == 16 ? 4 : 16;  // of a row
  static constexpr int kRows = Tile::kThreads / kCopies;
  static_assert(kRows % 8 == 0, "a thread's rows have one order of words");

  // `left`: channels of the tap from this copy on.
  static __device__ __forceinline__ void copy(uint32_t* to, const uint8_t* from, bool valid, int left,
                                              uint32_t padding) {
    if constexpr (Bytes == 16) {
      if (valid)
        cp_async_16(to, from, true);
      else
        store_16(to, Words4{{padding, padding, padding, padding}});
    } else if constexpr (Bytes == 4) {
      if (valid)
        cp_async_4(to, from, true);
      else
        *to = padding;
    } else {
      uint32_t word = 0;
#pragma unroll
      for (int b = 0; b < 4; ++b)
        if (b < left) word |= (valid ? from[b] : padding & 255u) << 8 * b;
      *to = word;
    }
  }

  // The filter in row threadIdx.x / kCopies + r * kRows is m(r) filters after that of r = 0.
  static_assert(kRows % Tile::kThreadsM == 0, "a thread copies rows of one computing thread");
  static __device__ __forceinline__ constexpr int m(int r) {
    return r * kRows / Tile::kThreadsM % 4 + r * kRows / Tile::kThreadsM / 4 * (4 * Tile::kThreadsM);
  }

  // A slab of `filters` filters from w on, and one of the pixels of `windows` in x.
  static __device__ __forceinline__ void load(const Int8Params& params, int slab, const Window* windows,
                                              const uint8_t* x, const uint8_t* w, int filters, uint32_t* s_w,
                                              uint32_t* s_x) {
    constexpr int kStep = Bytes == 1 ? 4 : Bytes;
    const unsigned thread = thread_index(), copy0 = thread % kCopies, word = copy0 * (kInt8Slab / kCopies);
    const unsigned row = thread / kCopies, n = row / Tile::kThreadsM;
    const unsigned at = row * kInt8Slab + (word / 4 ^ row / 2 % 4) * 4 + word % 4;
    int tap, i, j, c;
    params.by_copies.divide(slab * kCopies + (int)copy0, &tap, &c);
    params.by_KW.divide(tap, &i, &j);
    const int left = params.C - c * kStep, down = i * params.dilation_h, right = j * params.dilation_w;
    const int filter = (int)(row % Tile::kThreadsM * 4 + n % 4 + n / 4 * (4 * Tile::kThreadsM));
    const int filters_left = i < params.KH ? filters - filter : 0;
    const uint8_t* from = w + (filter * params.K + tap * params.C + c * kStep);
#pragma unroll
    for (int r = 0; r < (Tile::kM + kRows - 1) / kRows; ++r) {
      if (Tile::kM % kRows && row + r * kRows >= Tile::kM) break;
      copy(s_w + at + r * kRows * kInt8Slab, from + m(r) * params.K, m(r) < filters_left, left, params.padding);
    }
    // after the last tap every pixel is outside
    const int height = i < params.KH ? params.H : 0;
    from = x + (down * params.stride_h + right * params.stride_w + c * kStep);
#pragma unroll
    for (int r = 0; r < Tile::kN / kRows; ++r) {
      const Window window = windows[row + r * kRows];
      const bool inside =
          (unsigned)(window.h + down) < (unsigned)height && (unsigned)(window.w + right) < (unsigned)params.W;
      copy(s_x + at + r * kRows * kInt8Slab, from + window.offset, inside, left, params.padding);
    }
  }
};

// Which outputs of its block's tile a thread computes: its first row of either operand.
template <typename T>
struct Int8ThreadTile {
  unsigned filter, pixel;  // rows of s_w and s_x
  __device__ __forceinline__ Int8ThreadTile() {
    const unsigned thread = thread_index(), warp = thread / 32, lane = thread % 32;
    constexpr int kWarpsM = T::kThreadsM / T::kWarpThreadsM;
    filter = warp % kWarpsM * T::kWarpThreadsM + lane % T::kWarpThreadsM;
    pixel = warp / kWarpsM * T::kWarpThreadsN + lane / T::kWarpThreadsM;
  }
};
// Where the first 16 bytes of a row begin, in words; its 16 bytes number g begin at that ^ 4*g.
__device__ __forceinline__ unsigned first_word(unsigned row) { return row * kInt8Slab + row / 2 % 4 * 4; }

// acc[i][j] += the distance of filter i and pixel j over a slab; `filters` and `pixels`: first_word() of the
// thread's first row of either operand.  Eight bytes of each at a time, which leaves registers for the rest.
template <typename T>
__device__ __forceinline__ void add_int8_slab(uint32_t (&acc)[T::kThreadM][T::kThreadN], const uint32_t* slabs,
                                              unsigned filters, unsigned pixels) {
  static_assert(T::kThreadsN % 8 == 0 && T::kThreadsM % 4 == 0 && (T::kThreadsM & (T::kThreadsM - 1)) == 0,
                "order of words");
#pragma unroll
  for (int g = 0; g < 8; ++g) {
    Words2 b[T::kThreadM];
#pragma unroll
    for (int i = 0; i < T::kThreadM; ++i)  // the row i * kThreadsM further down
      b[i] = load_8<Words2>(slabs + (filters ^ (unsigned)(g / 2 ^ i * T::kThreadsM / 2 % 4) * 4) +
                            i * T::kThreadsM * kInt8Slab + g % 2 * 2);
#pragma unroll
    for (int j = 0; j < T::kThreadN; ++j) {
      const Words2 a =
          load_8<Words2>(slabs + (pixels ^ (unsigned)g / 2 * 4) + j * T::kThreadsN * kInt8Slab + g % 2 * 2);
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int i = 0; i < T::kThreadM; ++i) acc[i][j] = add_distances4(a.v[k], b[i].v[k], acc[i][j]);
    }
  }
}

// The epilogue of up to four neighbouring filters: definition::int8_finish, by vectors where there are four and y and
// residual are aligned.
__device__ __forceinline__ void epilogue4(const Int8Args& args, const Words4& sums, const Float4& scale,
                                          const Float4& offset, int64_t co, int64_t at, int count,
                                          bool vector_epilogue) {
  if (!vector_epilogue || count < 4) {
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

// On sm_120 the largest tile runs one block per multiprocessor: its four instructions need more registers.
template <typename Tile>
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kInt8Blocks = Tile::kThreads > 128 ? 1 : Tile::kBlocks;
#else
constexpr int kInt8Blocks = Tile::kBlocks;
#endif

template <typename Tile, int Bytes>
__global__ void __launch_bounds__(Tile::kThreads, kInt8Blocks<Tile>)
    forward_int8_kernel(Int8Args args, Int8Params params) {
  constexpr int kWords = kInt8Slab * (Tile::kM + Tile::kN), kPixelsAt = kInt8Slab * Tile::kM;
  SHARED(uint32_t, s_slabs, [2 * kWords]);
  SHARED(Window, s_windows, [Tile::kN]);
  const Conv2dProblem& p = args.problem;
  const int M = params.M, group = blockIdx.z;
  const int64_t pixels = p.N * p.OH * p.OW, pixel0 = (int64_t)blockIdx.x * Tile::kN;
  const int m0 = blockIdx.y * Tile::kM;
  for (int i = threadIdx.x; i < Tile::kN; i += Tile::kThreads) {
    const unsigned at = (unsigned)(pixel0 + i), row = at / (unsigned)p.OW, n = row / (unsigned)p.OH;
    const int h = (int)(row % (unsigned)p.OH * p.stride_h - p.pad_top);
    const int w = (int)(at % (unsigned)p.OW * p.stride_w - p.pad_left);
    s_windows[i] = {n * p.H * params.stride_h + (int64_t)h * params.stride_h + (int64_t)w * params.stride_w,
                    pixel0 + i < pixels ? h : kOutside, w};
  }
  __syncthreads();

  const uint8_t* const x = args.x + group * params.C;
  const uint8_t* const w = args.w + ((int64_t)group * M + m0) * params.K;
  uint32_t acc[Tile::kThreadM][Tile::kThreadN] = {};
  using Loader = Int8Loader<Tile, Bytes>;
  Loader::load(params, 0, s_windows, x, w, M - m0, s_slabs, s_slabs + kPixelsAt);
  cp_async_commit();
  int left = params.slabs;
  for (int at = 0;; at = kWords - at) {
    cp_async_wait<0>();
    __syncthreads();
    if (--left) {
      Loader::load(params, params.slabs - left, s_windows, x, w, M - m0, s_slabs + kWords - at,
                   s_slabs + kWords - at + kPixelsAt);
      cp_async_commit();
    }
    const Int8ThreadTile<Tile> own;
    add_int8_slab<Tile>(acc, s_slabs, at + first_word(own.filter), at + first_word(own.pixel) + kPixelsAt);
    if (!left) break;
  }

  // The sums of a round's pixels, [pixel][kM], where the slabs were; then the epilogue, four filters per thread.
  constexpr int kRounds = Tile::kM * Tile::kN > 2 * kWords ? 2 : 1, kRound = Tile::kThreadN / kRounds;
  constexpr int kFours = Tile::kM / 4;
  const Int8ThreadTile<Tile> own;
  static_assert(Tile::kM * Tile::kN / kRounds <= 2 * kWords && Tile::kThreads % kFours == 0, "sums");
  const int m = m0 + threadIdx.x % kFours * 4, count = M - m;
  const int64_t co = (int64_t)group * M + m;
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
      for (int i = 0; i < Tile::kThreadM; i += 4)
        store_16(s_slabs + (own.pixel + j * Tile::kThreadsN) * Tile::kM + own.filter * 4 + i * Tile::kThreadsM,
                 Words4{{acc[i][round * kRound + j], acc[i + 1][round * kRound + j], acc[i + 2][round * kRound + j],
                         acc[i + 3][round * kRound + j]}});
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x / kFours; i < kRound * Tile::kThreadsN; i += Tile::kThreads / kFours) {
      const int64_t pixel = pixel0 + round * kRound * Tile::kThreadsN + i;
      if (pixel >= pixels || count <= 0) break;
      epilogue4(args, load_16<Words4>(s_slabs + i * Tile::kM + threadIdx.x % kFours * 4), scale, offset, co,
                pixel * p.C_out + co, count, params.vector_epilogue);
    }
  }
}

// One output per thread, by the definition: depthwise and other narrow groups, and sizes beyond 32-bit coordinates.
__global__ void __launch_bounds__(kDirectThreads) direct_int8_kernel(Int8Args args) {
  const Conv2dProblem& p = args.problem;
  const uint64_t C = p.C_out, OH = p.OH, OW = p.OW, outputs = p.N * OH * OW * C;
  for (uint64_t i = (uint64_t)blockIdx.x * kDirectThreads + threadIdx.x; i < outputs;
       i += (uint64_t)gridDim.x * kDirectThreads) {
    const uint64_t co = i % C, pixel = i / C, row = pixel / OW;
    definition::int8_finish(args, definition::int8_sum(args, row / OH, co, row % OH, pixel % OW), co, i);
  }
}

}  // namespace cuda
}  // namespace adderops
