// Gradient of the weights, float32 sums:   dW[co,k] = sum_p dY[co,p] * (X[k,p] - W[co,k]),   k = (kh, kw, ci)
//                                                   = sum_p dY[co,p] * X[k,p]  -  W[co,k] * sum_p dY[co,p]
// AdderNet's full-precision gradient (arXiv 1912.13200, section 3.2), on purpose not the derivative, sgn(X - W).
// One FFMA a term, as a convolution's.
//
// The sum runs over all pixels and is split over blocks, each a run of pixels; two stages, no atomics:
//   grad_w_kernel          partial[split][group][co][k], partial_sum[split][group][co] = sum of dY
//                          grid (tiles of k, tiles of co, groups * splits)
//   grad_w_finish_kernel   adds the splits up in their order, subtracts W * sum dY; what is not finite then is done again
//                          by definition.h.  grid (weights of a filter, co): blocks of 256 weights
//
// Block: kLanes filters x kColumns weights (tile.cuh), slabs of kSlab pixels; 128 x 128, 256 threads, 8 x 8 each.
//   lanes    [2][kSlab][kLanes + 4] of dY,  columns [2][kSlab][kColumns + 4] of X: pixel after pixel; the four floats of
//            padding let eight pixels x four channels be stored without bank conflicts (kPlanes)
//   info     [2][kSlab]   where a slab's pixels lie, written by kSlab threads one slab ahead of the copies
#pragma once
#include "tile.cuh"

namespace adderops {
namespace cuda {

struct PixelInfo {
  int64_t grad_y, x;  // bytes, of the window's first tap in x
  int h, w;           // of the window's first tap; far outside where there is no pixel
};
constexpr int kNowhere = -0x40000000;

struct GradWShape {
  int K, C, M;          // weights of a filter; channels and filters of a group
  int splits, slabs;    // runs of pixels; slabs in each
  int64_t grad_y[4], x[4];  // strides in bytes
};

// A thread's part of copying one side of a slab: elements of `Count` columns at kSlab pixels.
template <int Count, int Threads, typename T, Layout L, bool Bordered>
struct RunCopy {
  static constexpr int kVector = L == Layout::kChannels ? 16 / (int)sizeof(T) : 1;
  static constexpr int kAcross = Count / kVector;
  static constexpr int kPieces = kAcross * kSlab;
  static constexpr int kMine = (kPieces + Threads - 1) / Threads, kPitch = Count + 4;
  static constexpr bool kAsynchronous = sizeof(T) == 4;

  // dY: the pieces' channels lie `step` bytes apart, `left` of them are real;  X: their taps and channels are anywhere
  int64_t offset[Bordered ? kMine : 1], step;
  int left;
  uint32_t tap[Bordered ? kMine : 1];  // kh*dilation_h << 16 | kw*dilation_w: both below 2^15 (grad_w.cu)
  bool real[Bordered ? kMine : 1];
  T plane[L == Layout::kPlanes && !kAsynchronous ? kMine : 1];
  Words4 words[L == Layout::kChannels && !kAsynchronous ? kMine : 1];

  // Neighbouring threads: planes: neighbouring pixels;  channels: neighbouring words of a pixel.  kNext: from a thread's
  // piece to its next one in shared memory.
  static constexpr int kNext = L == Layout::kPlanes ? Threads / kSlab : Threads / kAcross * kPitch;
  static constexpr int kNextColumn = L == Layout::kPlanes ? Threads / kSlab : 0;
  static_assert(L == Layout::kPlanes ? Threads % kSlab == 0 : Threads % kAcross == 0, "pieces at equal distances");
  static __device__ __forceinline__ int pixel(int i) {
    return L == Layout::kPlanes ? threadIdx.x % kSlab : threadIdx.x / kAcross + i * (Threads / kAcross);
  }
  static __device__ __forceinline__ int column(int i) {
    return L == Layout::kPlanes ? threadIdx.x / kSlab + i * (Threads / kSlab) : threadIdx.x % kAcross * kVector;
  }
  static __device__ __forceinline__ bool mine(int i) {
    return kPieces % Threads == 0 || threadIdx.x + i * Threads < kPieces;
  }
  __device__ __forceinline__ void fetch(const char* source, const PixelInfo* info, int H, int W, float* slab) {
    const PixelInfo only = info[pixel(0)];  // planes: a thread's pieces are of one pixel
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (!mine(i)) break;
      const PixelInfo at = L == Layout::kPlanes ? only : info[pixel(i)];
      bool valid = i * kNextColumn < left && at.h != kNowhere;
      if constexpr (Bordered)
        valid = real[Bordered ? i : 0] && (unsigned)(at.h + (int)(tap[Bordered ? i : 0] >> 16)) < (unsigned)H &&
                (unsigned)(at.w + (int)(tap[Bordered ? i : 0] & 0xffff)) < (unsigned)W;
      const char* const from = source + (Bordered ? at.x + offset[Bordered ? i : 0] : at.grad_y + offset[0] + i * step);
      float* const to = slab + pixel(0) * kPitch + column(0) + i * kNext;
      if constexpr (kAsynchronous && L == Layout::kPlanes) cp_async_4(to, from, valid);
      if constexpr (kAsynchronous && L == Layout::kChannels) cp_async_16(to, from, valid);
      if constexpr (!kAsynchronous && L == Layout::kPlanes) plane[i] = valid ? *reinterpret_cast<const T*>(from) : T{};
      if constexpr (!kAsynchronous && L == Layout::kChannels) words[i] = valid ? load_16<Words4>(from) : Words4{};
    }
  }
  __device__ __forceinline__ void commit(float* slab) {
    if constexpr (!kAsynchronous) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        if (!mine(i)) break;
        float* const to = slab + pixel(0) * kPitch + column(0) + i * kNext;
        if constexpr (L == Layout::kPlanes) {
          *to = load_float(&plane[i]);
        } else {
          const T* const channel = reinterpret_cast<const T*>(&words[i]);
#pragma unroll
          for (int v = 0; v < kVector; v += 4)
            store_16(to + v, Float4{{load_float(channel + v), load_float(channel + v + 1), load_float(channel + v + 2),
                                     load_float(channel + v + 3)}});
        }
      }
    }
  }
};

template <typename T, typename Tile, Layout L>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    grad_w_kernel(Conv2dArgs args, GradWShape s, float* partial, float* partial_sum) {
  using LaneCopy = RunCopy<Tile::kLanes, Tile::kThreads, T, L, false>;
  using ColumnCopy = RunCopy<Tile::kColumns, Tile::kThreads, T, L, true>;
  constexpr int kLaneSlab = kSlab * LaneCopy::kPitch, kColumnSlab = kSlab * ColumnCopy::kPitch;
  SHARED(float, s_lanes, [2 * kLaneSlab]);
  SHARED(float, s_columns, [2 * kColumnSlab]);
  SHARED(PixelInfo, s_info, [2 * kSlab]);
  const Conv2dProblem& p = args.problem;
  const int group = blockIdx.z / s.splits, split = blockIdx.z % s.splits;
  const int column0 = blockIdx.x * Tile::kColumns, lane0 = blockIdx.y * Tile::kLanes;
  const int64_t pixels = p.N * p.OH * p.OW, first = (int64_t)split * s.slabs * kSlab;
  const int H = (int)p.H, W = (int)p.W;
  const char* const grad_y = static_cast<const char*>(args.grad_y.data) + (int64_t)group * s.M * s.grad_y[1];
  const char* const x = static_cast<const char*>(args.x.data) + (int64_t)group * s.C * s.x[1];

  const auto inform = [&](int slab) {
    if (threadIdx.x < kSlab) {
      const int64_t pixel = first + (int64_t)slab * kSlab + threadIdx.x;
      const bool valid = slab < s.slabs && pixel < pixels;
      const unsigned at = valid ? (unsigned)pixel : 0, row = at / (unsigned)p.OW;
      const int ow = (int)(at % (unsigned)p.OW), oh = (int)(row % (unsigned)p.OH), n = (int)(row / (unsigned)p.OH);
      const int h = (int)(oh * p.stride_h - p.pad_top), w = (int)(ow * p.stride_w - p.pad_left);
      s_info[slab % 2 * kSlab + threadIdx.x] = {n * s.grad_y[0] + oh * s.grad_y[2] + ow * s.grad_y[3],
                                               n * s.x[0] + h * s.x[2] + w * s.x[3], valid ? h : kNowhere, w};
    }
  };
  LaneCopy lanes;
  lanes.left = s.M - lane0 - LaneCopy::column(0);
  lanes.offset[0] = (lane0 + LaneCopy::column(0)) * s.grad_y[1];
  lanes.step = LaneCopy::kNextColumn * s.grad_y[1];
  ColumnCopy columns;
#pragma unroll
  for (int i = 0; i < ColumnCopy::kMine; ++i) {
    const int k = column0 + ColumnCopy::column(i), tap = k / s.C, c = k % s.C;
    columns.real[i] = k < s.K;
    const int h = tap / (int)p.KW * (int)p.dilation_h, w = tap % (int)p.KW * (int)p.dilation_w;
    columns.tap[i] = (uint32_t)h << 16 | (uint32_t)w;
    columns.offset[i] = c * s.x[1] + h * s.x[2] + w * s.x[3];
  }

  float acc[Tile::kThreadLanes][Tile::kThreadColumns] = {};
  float lane_sum = 0;
  const Place<Tile> place;
  inform(0);
  __syncthreads();
  lanes.fetch(grad_y, s_info, H, W, s_lanes);
  columns.fetch(x, s_info, H, W, s_columns);
  cp_async_commit();
  inform(1);
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
      inform(slab + 2);
    }
    // thread t: filter t % kLanes, some of the pixels
    constexpr int kRows = kSlab * Tile::kLanes / Tile::kThreads > 0 ? kSlab * Tile::kLanes / Tile::kThreads : 1;
    if (kSlab * Tile::kLanes >= Tile::kThreads || threadIdx.x < kSlab * Tile::kLanes) {
      const float* from = s_lanes + now * kLaneSlab + threadIdx.x / Tile::kLanes * kRows * LaneCopy::kPitch +
                          threadIdx.x % Tile::kLanes;
#pragma unroll
      for (int k = 0; k < kRows; ++k) lane_sum += from[k * LaneCopy::kPitch];
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
  s_columns[threadIdx.x] = lane_sum;
  __syncthreads();
  for (int i = threadIdx.x; i < Tile::kLanes && lane0 + i < s.M; i += Tile::kThreads) {
    float sum = 0;
    for (int j = i; j < Tile::kThreads && j < kSlab * Tile::kLanes; j += Tile::kLanes) sum += s_columns[j];
    partial_sum[(int64_t)(split * p.groups + group) * s.M + lane0 + i] = sum;
  }
}

constexpr int kFinishThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    grad_w_finish_kernel(Conv2dArgs args, GradWShape s, const float* partial, const float* partial_sum) {
  const Conv2dProblem& p = args.problem;
  const int64_t k = (int64_t)blockIdx.x * kFinishThreads + threadIdx.x;
  if (k >= s.K) return;
  const int tap = (int)(k / s.C), ci = (int)(k % s.C), kh = tap / (int)p.KW, kw = tap % (int)p.KW;
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
