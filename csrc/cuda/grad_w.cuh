// Gradient of the weights, float32 sums:   dW[co,k] = sum_p dY[co,p] * (X[k,p] - W[co,k]),   k = (kh, kw, ci)
//                                                   = sum_p dY[co,p] * X[k,p]  -  W[co,k] * sum_p dY[co,p]
// AdderNet's full-precision gradient (arXiv 1912.13200, section 3.2), on purpose not the derivative, sgn(X - W).
// One FFMA a term, as a convolution's.
//
// The sum runs over all pixels and is split over blocks, each a run of pixels; two stages, no atomics:
//   channels_kernel        a tensor whose channels do not lie densely is copied first: [n][h][w][group][C, to whole
//   vectors] grad_w_kernel          partial[split][group][co][k], partial_sum[split][group][co] = sum of dY
//                          grid (tiles of k, tiles of co, groups * splits)
//   grad_w_finish_kernel   adds the splits up in their order, subtracts W * sum dY; what is not finite then is done
//   again
//                          by definition.h.  grid (weights of a filter, co): blocks of 256 weights
//
// Block: kLanes filters x kColumns weights (tile.cuh), slabs of kSlab pixels; 128 x 128, 256 threads, 8 x 8 each.
//   lanes    [2][kSlab][kLanes + 4] of dY,  columns [2][kSlab][kColumns + 4] of X: pixel after pixel, 16 bytes of
//   channels a
//            copy; a column's channels are padded to whole vectors (k counts the padding)
//   info     [2][kSlab]   where a slab's pixels lie: kSlab threads step them on, one slab ahead of the copies
#pragma once
#include "tile.cuh"

namespace adderops {
namespace cuda {

// A dense tensor: bytes from pixel to pixel, row to row, image to image; of a channel's group; its data.
struct DenseTensor {
  const void* data;
  int64_t column, row, image, group;
};

// A pixel of a slab, 16 bytes at a time: its window's first tap in x, itself in dY, and what is needed to step on.
struct alignas(16) PixelX {
  int64_t at;  // bytes
  int h, w;    // far outside, kNowhere, behind the last pixel
};
struct alignas(16) PixelY {
  int64_t at;
  int left, ow;  // how many pixels there are from it on
};
struct PixelInfo {
  PixelX x;
  PixelY y;
  int oh;
};
constexpr int kNowhere = -0x40000000;

struct GradWShape {
  int K, C, M;        // weights of a filter and channels, both with the padding; filters of a group
  int splits, slabs;  // runs of pixels; slabs in each
  int dh, dw;         // two slabs on: this many rows and columns, not counting whole images
  DenseTensor grad_y, x;
  // bytes: two slabs on, where no row ends; more where a row ends, where an image ends
  int64_t step_grad_y, step_x, row_grad_y, row_x, image_grad_y, image_x;
};

// A thread's part of copying one side of a slab: 16 bytes at a time of `Count` columns at kSlab pixels.
template <int Count, int Threads, typename T, bool Bordered>
struct RunCopy {
  static constexpr int kVector = 16 / (int)sizeof(T), kAcross = Count / kVector, kPieces = kAcross * kSlab;
  static constexpr int kMine = (kPieces + Threads - 1) / Threads, kPitch = Count + 4;
  static constexpr bool kAsynchronous = sizeof(T) == 4;
  // a thread's pieces are of one column, kStep pixels apart
  static constexpr int kStep = Threads / kAcross;
  static_assert(Threads % kAcross == 0, "pieces at equal distances");

  int64_t offset;
  int h, w;
  bool real;
  Words4 words[kAsynchronous ? 1 : kMine];

  static __device__ __forceinline__ int pixel() { return threadIdx.x / kAcross; }
  static __device__ __forceinline__ int column() { return threadIdx.x % kAcross * kVector; }
  static __device__ __forceinline__ bool mine(int i) { return kPieces % Threads == 0 || pixel() + i * kStep < kSlab; }

  __device__ __forceinline__ void fetch(const char* source, const PixelInfo* info, int H, int W, float* slab) {
    float* const to = slab + pixel() * kPitch + column();
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (!mine(i)) break;
      bool valid = real;
      const char* from = source + offset;
      if constexpr (Bordered) {
        const PixelX x = info[pixel() + i * kStep].x;
        valid = valid && (unsigned)(x.h + h) < (unsigned)H && (unsigned)(x.w + w) < (unsigned)W;
        from += x.at;
      } else {
        const PixelY y = info[pixel() + i * kStep].y;
        valid = valid && y.left > 0;
        from += y.at;
      }
      if constexpr (kAsynchronous)
        cp_async_16(to + i * kStep * kPitch, from, valid);
      else
        words[i] = valid ? load_16<Words4>(from) : Words4{};
    }
  }
  __device__ __forceinline__ void commit(float* slab) {
    if constexpr (!kAsynchronous) {
      float* const to = slab + pixel() * kPitch + column();
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        if (!mine(i)) break;
        const T* const channel = reinterpret_cast<const T*>(&words[i]);
#pragma unroll
        for (int v = 0; v < kVector; v += 4)
          store_16(to + i * kStep * kPitch + v, Float4{{load_float(channel + v), load_float(channel + v + 1),
                                                        load_float(channel + v + 2), load_float(channel + v + 3)}});
      }
    }
  }
};

constexpr int kChannelsTile = 32, kChannelsThreads = 256;

// in (any strides) -> out[n][h][w][group][padded], zeros behind a group's channels.
// grid (tiles of 32 pixels, tiles of 32 padded channels, groups)
template <typename T>
__global__ void __launch_bounds__(kChannelsThreads)
    channels_kernel(Operand in, T* out, int64_t pixels, int64_t H, int64_t W, int channels, int padded) {
  SHARED(T, s_tile, [kChannelsTile * (kChannelsTile + 1)]);
  const int64_t first = (int64_t)blockIdx.x * kChannelsTile;
  const int c0 = blockIdx.y * kChannelsTile, across = threadIdx.x % 32, down = threadIdx.x / 32;
  const int64_t pixel = first + across;
  for (int c = down; c < kChannelsTile; c += kChannelsThreads / 32) {
    T v{};
    if (pixel < pixels && c0 + c < channels)
      v = static_cast<const T*>(
          in.data)[pixel / (H * W) * in.stride[0] + ((int64_t)blockIdx.z * channels + c0 + c) * in.stride[1] +
                   pixel / W % H * in.stride[2] + pixel % W * in.stride[3]];
    s_tile[c * (kChannelsTile + 1) + across] = v;
  }
  __syncthreads();
  for (int i = down; i < kChannelsTile; i += kChannelsThreads / 32)
    if (first + i < pixels && c0 + across < padded)
      out[((first + i) * gridDim.z + blockIdx.z) * padded + c0 + across] = s_tile[across * (kChannelsTile + 1) + i];
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    grad_w_kernel(Conv2dArgs args, GradWShape s, float* partial, float* partial_sum) {
  using LaneCopy = RunCopy<Tile::kLanes, Tile::kThreads, T, false>;
  using ColumnCopy = RunCopy<Tile::kColumns, Tile::kThreads, T, true>;
  constexpr int kLaneSlab = kSlab * LaneCopy::kPitch, kColumnSlab = kSlab * ColumnCopy::kPitch;
  SHARED(float, s_lanes, [2 * kLaneSlab]);
  SHARED(float, s_columns, [2 * kColumnSlab]);
  SHARED(PixelInfo, s_info, [2 * kSlab]);
  const Conv2dProblem& p = args.problem;
  const int group = blockIdx.z / s.splits, split = blockIdx.z % s.splits;
  const int column0 = blockIdx.x * Tile::kColumns, lane0 = blockIdx.y * Tile::kLanes;
  const int64_t first = (int64_t)split * s.slabs * kSlab;
  const int H = (int)p.H, W = (int)p.W;
  const char* const grad_y = static_cast<const char*>(s.grad_y.data) + group * s.grad_y.group;
  const char* const x = static_cast<const char*>(s.x.data) + group * s.x.group;

  LaneCopy lanes;
  lanes.real = lane0 + LaneCopy::column() < s.M;
  lanes.offset = (int64_t)(lane0 + LaneCopy::column()) * (int)sizeof(T);
  ColumnCopy columns;
  {
    const int k = column0 + ColumnCopy::column(), tap = k / s.C, c = k % s.C;
    columns.real = k < s.K;
    columns.h = tap / (int)p.KW * (int)p.dilation_h, columns.w = tap % (int)p.KW * (int)p.dilation_w;
    columns.offset = c * (int)sizeof(T) + columns.h * s.x.row + columns.w * s.x.column;
  }
  // the pixels of the first two slabs; step() turns those of slab s into those of slab s + 2
  if (threadIdx.x < 2 * kSlab) {
    const int64_t pixel = first + threadIdx.x, left = p.N * p.OH * p.OW - pixel;
    const unsigned at = left > 0 ? (unsigned)pixel : 0, row = at / (unsigned)p.OW;
    const int ow = (int)(at % (unsigned)p.OW), oh = (int)(row % (unsigned)p.OH), n = (int)(row / (unsigned)p.OH);
    const int h = (int)(oh * p.stride_h - p.pad_top), w = (int)(ow * p.stride_w - p.pad_left);
    s_info[threadIdx.x] = {{n * s.x.image + h * s.x.row + w * s.x.column, left > 0 ? h : kNowhere, w},
                           {n * s.grad_y.image + oh * s.grad_y.row + ow * s.grad_y.column,
                            left < 0            ? 0
                            : left > 0x3fffffff ? 0x3fffffff
                                                : (int)left,
                            ow},
                           oh};
  }
  const auto step = [&](PixelInfo* info) {
    if (threadIdx.x >= kSlab) return;
    PixelX x = info[threadIdx.x].x;
    PixelY y = info[threadIdx.x].y;
    int oh = info[threadIdx.x].oh + s.dh;
    x.at += s.step_x, y.at += s.step_grad_y, y.ow += s.dw, y.left -= 2 * kSlab;
    if (y.ow >= (int)p.OW) y.ow -= (int)p.OW, ++oh, x.at += s.row_x, y.at += s.row_grad_y;
    if (oh >= (int)p.OH) oh -= (int)p.OH, x.at += s.image_x, y.at += s.image_grad_y;
    x.h = y.left > 0 ? oh * (int)p.stride_h - (int)p.pad_top : kNowhere;
    x.w = y.ow * (int)p.stride_w - (int)p.pad_left;
    info[threadIdx.x].x = x, info[threadIdx.x].y = y, info[threadIdx.x].oh = oh;
  };

  float acc[Tile::kThreadLanes][Tile::kThreadColumns] = {};
  constexpr int kAcross = Tile::kLanes / 4, kGroups = Tile::kThreads / kAcross;
  constexpr int kRows = kGroups < kSlab ? kSlab / kGroups : 1;
  float lane_sum[4] = {};
  const Place<Tile> place;
  __syncthreads();
  lanes.fetch(grad_y, s_info, H, W, s_lanes);
  columns.fetch(x, s_info, H, W, s_columns);
  cp_async_commit();
  for (int slab = 0; slab < s.slabs; ++slab) {
    const int now = slab % 2, next = now ^ 1;
    lanes.commit(s_lanes + now * kLaneSlab);
    columns.commit(s_columns + now * kColumnSlab);
    cp_async_wait<0>();
    __syncthreads();
    if (slab + 1 < s.slabs) {
      lanes.fetch(grad_y, s_info + next * kSlab, H, W, s_lanes + next * kLaneSlab);
      columns.fetch(x, s_info + next * kSlab, H, W, s_columns + next * kColumnSlab);
      cp_async_commit();
      step(s_info + now * kSlab);  // nobody reads these until the next barrier
    }
    // the sums of dY: a thread has four filters, of some of the pixels
    if (kGroups * kRows == kSlab || threadIdx.x / kAcross * kRows < kSlab) {
      const float* from =
          s_lanes + now * kLaneSlab + threadIdx.x / kAcross * kRows * LaneCopy::kPitch + threadIdx.x % kAcross * 4;
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const Float4 v = load_16<Float4>(from + k * LaneCopy::kPitch);
#pragma unroll
        for (int i = 0; i < 4; ++i) lane_sum[i] += v.v[i];
      }
    }
    sum_slab<Tile, LaneCopy::kPitch, ColumnCopy::kPitch>(
        acc, s_lanes + now * kLaneSlab + place.lane, s_columns + now * kColumnSlab + place.column,
        [](float sum, float a, float b, int, int) { return fmaf(a, b, sum); });
  }

  float* const to = partial + ((int64_t)(split * p.groups + group) * s.M) * s.K;
#pragma unroll
  for (int i = 0; i < Tile::kThreadLanes; ++i) {
    const int lane = lane0 + place.lane_of(i);
    if (lane >= s.M) continue;
#pragma unroll
    for (int j = 0; j < Tile::kThreadColumns; ++j) {
      const int k = column0 + place.column_of(j);
      if (k < s.K) to[(int64_t)lane * s.K + k] = acc[i][j];
    }
  }
  if (blockIdx.x) return;  // the sums of dY are the same for every tile of k
  __syncthreads();
  store_16(s_columns + threadIdx.x * 4, Float4{{lane_sum[0], lane_sum[1], lane_sum[2], lane_sum[3]}});
  __syncthreads();
  for (int i = threadIdx.x; i < Tile::kLanes && lane0 + i < s.M; i += Tile::kThreads) {
    float sum = 0;
    for (int rows = 0; rows < kGroups; ++rows) sum += s_columns[rows * Tile::kLanes + i];
    partial_sum[(int64_t)(split * p.groups + group) * s.M + lane0 + i] = sum;
  }
}

constexpr int kFinishThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    grad_w_finish_kernel(Conv2dArgs args, GradWShape s, const float* partial, const float* partial_sum) {
  const Conv2dProblem& p = args.problem;
  const int k = blockIdx.x * kFinishThreads + threadIdx.x;
  const int tap = k / s.C, ci = k % s.C, kh = tap / (int)p.KW, kw = tap % (int)p.KW;
  if (k >= s.K || ci >= (int)(p.C_in / p.groups)) return;
  for (int64_t co = blockIdx.y; co < p.C_out; co += gridDim.y) {
    float products = 0, sum = 0;
    for (int split = 0; split < s.splits; ++split) {
      products += partial[(split * p.C_out + co) * s.K + k];
      sum += partial_sum[split * p.C_out + co];
    }
    const Operand &w = args.w, &o = args.out;
    float v = products - sum * load_float(static_cast<const T*>(w.data) + co * w.stride[0] + ci * w.stride[1] +
                                          kh * w.stride[2] + kw * w.stride[3]);
    if (!is_finite(v)) v = definition::grad_w<T>(args, co, ci, kh, kw);
    store_float(static_cast<T*>(o.data) + co * o.stride[0] + ci * o.stride[1] + kh * o.stride[2] + kw * o.stride[3], v);
  }
}

}  // namespace cuda
}  // namespace adderops
