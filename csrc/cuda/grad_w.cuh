// Gradient of the weights, float32 sums:   dW[co,k] = sum_p dY[co,p] * (X[k,p] - W[co,k]),   k = (kh, kw, ci)
//                                                   = sum_p dY[co,p] * X[k,p]  -  W[co,k] * sum_p dY[co,p]
// AdderNet's full-precision gradient (arXiv 1912.13200, section 3.2), on purpose not the derivative, sgn(X - W).
// One FFMA per term, as in a convolution.
//
// The sum over all pixels is split over blocks; a second kernel adds up the partial sums of the splits, without
// atomics:
//   channels_kernel        copies a tensor whose channels are not contiguous: [n][h][w][group][C, to whole vectors]
//   grad_w_kernel          partial[split][group][co][k], partial_sum[split][group][co] = sum of dY
//                          grid (tiles of k, tiles of co, groups * splits)
//   grad_w_finish_kernel   adds up the splits in order and subtracts W * sum dY; a result that is not finite is
//                          computed again by the definition.  grid (weights of a filter, co): blocks of 256 weights
//
//      dY [n][oh][ow][group][co]         X [n][h][w][group][ci]         16 bytes of channels of one pixel per copy
//            |                                 | at the tap of k, zeros outside the image
//            v                                 v
//   s_grad_y [2][kSlab pixels][kM + 4]   s_x [2][kSlab pixels][kN + 4]  N counts weights k = (tap, ci); channels are
//            |                                 |                        padded to whole vectors, and k with them
//            +--------> multiply_slab <--------+
//                             |             block   128 filters x 128 weights, 8 warps; three smaller tiles
//              acc = fma(dY, X, acc)        thread  8 x 8 accumulators, 4 sums of dY; 120 to 127 registers (halves 155)
//                             |             35 KB of shared memory, two blocks per multiprocessor (halves: one)
//                   partial[split]
//
//   s_info [2][kSlab]   where the pixels of a slab lie: kSlab threads advance them without division, one slab ahead
//
// Tails: pixels beyond the last are zeros on both sides; filters and weights beyond the last are not stored.
#pragma once
#include "tile.cuh"

namespace adderops {
namespace cuda {

// A tensor whose channels are contiguous: strides in bytes.
struct ChannelsLast {
  const void* data;
  int64_t stride_w, stride_h, stride_n, stride_group;
};

// One pixel of a slab: its window in x, its place in dY, and what it takes to advance it.
struct PixelInfo {
  Window x;  // in bytes from the tensor's first element
  struct alignas(16) GradY {
    int64_t offset;
    int left, ow;  // pixels from this one on
  } grad_y;
  int oh;
};

struct GradWParams {
  int K, C, M;               // weights of a filter and channels, both with the padding; filters of a group
  int splits, slabs;         // splits of pixels, slabs of a split
  int advance_h, advance_w;  // two slabs of pixels further: rows and columns, not counting whole images
  ChannelsLast grad_y, x;
  // bytes: two slabs further within a row; more where a row ends, where an image ends
  int64_t advance_grad_y, advance_x, next_row_grad_y, next_row_x, next_image_grad_y, next_image_x;
};

// A thread's share of copying one operand of a slab: kSlab pixels of `Count` filters (dY) or weights k (X, Windowed:
// each pixel has a predicate), 16 bytes of channels per copy.  A thread's copies are of the same channels, kStep
// pixels apart.
template <int Count, int Threads, typename T, bool Windowed>
struct SlabLoader {
  static constexpr int kVector = 16 / (int)sizeof(T), kRow = Count / kVector, kCopies = kRow * kSlab;
  static constexpr int kThreadCopies = (kCopies + Threads - 1) / Threads, kPitch = Count + 4;
  static constexpr bool kAsynchronous = sizeof(T) == 4;
  static constexpr int kStep = Threads / kRow;
  static_assert(Threads % kRow == 0, "copies at equal distances");

  int64_t offset;
  int h, w;    // the tap of this thread's weights
  bool valid;  // are there such channels?
  Words4 words[kAsynchronous ? 1 : kThreadCopies];

  static __device__ __forceinline__ int pixel() { return threadIdx.x / kRow; }
  static __device__ __forceinline__ int first() { return threadIdx.x % kRow * kVector; }
  static __device__ __forceinline__ bool has_copy(int i) {
    return kCopies % Threads == 0 || pixel() + i * kStep < kSlab;
  }

  __device__ __forceinline__ void load(const char* source, const PixelInfo* info, int H, int W, float* slab) {
    float* const to = slab + pixel() * kPitch + first();
#pragma unroll
    for (int i = 0; i < kThreadCopies; ++i) {
      if (!has_copy(i)) break;
      bool inside = valid;
      const char* from = source + offset;
      if constexpr (Windowed) {
        const Window x = info[pixel() + i * kStep].x;
        inside = inside && (unsigned)(x.h + h) < (unsigned)H && (unsigned)(x.w + w) < (unsigned)W;
        from += x.offset;
      } else {
        const PixelInfo::GradY grad_y = info[pixel() + i * kStep].grad_y;
        inside = inside && grad_y.left > 0;
        from += grad_y.offset;
      }
      if constexpr (kAsynchronous)
        cp_async_16(to + i * kStep * kPitch, from, inside);
      else
        words[i] = inside ? load_16<Words4>(from) : Words4{};
    }
  }
  __device__ __forceinline__ void store(float* slab) {
    if constexpr (!kAsynchronous) {
      float* const to = slab + pixel() * kPitch + first();
#pragma unroll
      for (int i = 0; i < kThreadCopies; ++i) {
        if (!has_copy(i)) break;
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

// A transpose of 32 x 32 elements through shared memory: in (any strides) -> out[n][h][w][group][padded], zeros after
// a group's channels.  grid (tiles of 32 pixels, tiles of 32 padded channels, groups)
template <typename T>
__global__ void __launch_bounds__(kChannelsThreads)
    channels_kernel(Operand in, T* out, int64_t pixels, int64_t H, int64_t W, int channels, int padded) {
  SHARED(T, s_tile, [kChannelsTile * (kChannelsTile + 1)]);
  const int64_t pixel0 = (int64_t)blockIdx.x * kChannelsTile;
  const int c0 = blockIdx.y * kChannelsTile, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t pixel = pixel0 + lane;
  for (int c = warp; c < kChannelsTile; c += kChannelsThreads / 32) {
    T v{};
    if (pixel < pixels && c0 + c < channels)
      v = static_cast<const T*>(
          in.data)[pixel / (H * W) * in.stride[0] + ((int64_t)blockIdx.z * channels + c0 + c) * in.stride[1] +
                   pixel / W % H * in.stride[2] + pixel % W * in.stride[3]];
    s_tile[c * (kChannelsTile + 1) + lane] = v;
  }
  __syncthreads();
  for (int i = warp; i < kChannelsTile; i += kChannelsThreads / 32)
    if (pixel0 + i < pixels && c0 + lane < padded)
      out[((pixel0 + i) * gridDim.z + blockIdx.z) * padded + c0 + lane] = s_tile[lane * (kChannelsTile + 1) + i];
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    grad_w_kernel(Conv2dArgs args, GradWParams params, float* partial, float* partial_sum) {
  using GradYLoader = SlabLoader<Tile::kM, Tile::kThreads, T, false>;
  using XLoader = SlabLoader<Tile::kN, Tile::kThreads, T, true>;
  constexpr int kGradYSlab = kSlab * GradYLoader::kPitch, kXSlab = kSlab * XLoader::kPitch;
  SHARED(float, s_grad_y, [2 * kGradYSlab]);
  SHARED(float, s_x, [2 * kXSlab]);
  SHARED(PixelInfo, s_info, [2 * kSlab]);
  const Conv2dProblem& p = args.problem;
  const int group = blockIdx.z / params.splits, split = blockIdx.z % params.splits;
  const int k0 = blockIdx.x * Tile::kN, m0 = blockIdx.y * Tile::kM;
  const int64_t pixel0 = (int64_t)split * params.slabs * kSlab;
  const int H = (int)p.H, W = (int)p.W;
  const char* const grad_y = static_cast<const char*>(params.grad_y.data) + group * params.grad_y.stride_group;
  const char* const x = static_cast<const char*>(params.x.data) + group * params.x.stride_group;

  GradYLoader grad_y_loader;
  grad_y_loader.valid = m0 + GradYLoader::first() < params.M;
  grad_y_loader.offset = (int64_t)(m0 + GradYLoader::first()) * (int)sizeof(T);
  XLoader x_loader;
  {
    const int k = k0 + XLoader::first(), tap = k / params.C, c = k % params.C;
    x_loader.valid = k < params.K;
    x_loader.h = tap / (int)p.KW * (int)p.dilation_h, x_loader.w = tap % (int)p.KW * (int)p.dilation_w;
    x_loader.offset = c * (int)sizeof(T) + x_loader.h * params.x.stride_h + x_loader.w * params.x.stride_w;
  }
  // the pixels of the first two slabs; advance() turns those of slab s into those of slab s + 2
  if (threadIdx.x < 2 * kSlab) {
    const int64_t pixel = pixel0 + threadIdx.x, left = p.N * p.OH * p.OW - pixel;
    const unsigned at = left > 0 ? (unsigned)pixel : 0, row = at / (unsigned)p.OW;
    const int ow = (int)(at % (unsigned)p.OW), oh = (int)(row % (unsigned)p.OH), n = (int)(row / (unsigned)p.OH);
    const int h = (int)(oh * p.stride_h - p.pad_top), w = (int)(ow * p.stride_w - p.pad_left);
    s_info[threadIdx.x] = {
        {n * params.x.stride_n + h * params.x.stride_h + w * params.x.stride_w, left > 0 ? h : kOutside, w},
        {n * params.grad_y.stride_n + oh * params.grad_y.stride_h + ow * params.grad_y.stride_w,
         left < 0            ? 0
         : left > 0x3fffffff ? 0x3fffffff
                             : (int)left,
         ow},
        oh};
  }
  const auto advance = [&](PixelInfo* info) {
    if (threadIdx.x >= kSlab) return;
    Window x = info[threadIdx.x].x;
    PixelInfo::GradY y = info[threadIdx.x].grad_y;
    int oh = info[threadIdx.x].oh + params.advance_h;
    x.offset += params.advance_x, y.offset += params.advance_grad_y, y.ow += params.advance_w, y.left -= 2 * kSlab;
    if (y.ow >= (int)p.OW) y.ow -= (int)p.OW, ++oh, x.offset += params.next_row_x, y.offset += params.next_row_grad_y;
    if (oh >= (int)p.OH) oh -= (int)p.OH, x.offset += params.next_image_x, y.offset += params.next_image_grad_y;
    x.h = y.left > 0 ? oh * (int)p.stride_h - (int)p.pad_top : kOutside;
    x.w = y.ow * (int)p.stride_w - (int)p.pad_left;
    info[threadIdx.x].x = x, info[threadIdx.x].grad_y = y, info[threadIdx.x].oh = oh;
  };

  float acc[Tile::kThreadM][Tile::kThreadN] = {};
  // The sums of dY: a thread has four filters, kPixels of a slab's pixels.
  constexpr int kFours = Tile::kM / 4, kGroups = Tile::kThreads / kFours;
  constexpr int kPixels = kGroups < kSlab ? kSlab / kGroups : 1;
  float sum_grad_y[4] = {};
  const ThreadTile<Tile> own;
  __syncthreads();
  grad_y_loader.load(grad_y, s_info, H, W, s_grad_y);
  x_loader.load(x, s_info, H, W, s_x);
  cp_async_commit();
  for (int slab = 0; slab < params.slabs; ++slab) {
    const int now = slab % 2, next = now ^ 1;
    grad_y_loader.store(s_grad_y + now * kGradYSlab);
    x_loader.store(s_x + now * kXSlab);
    cp_async_wait<0>();
    __syncthreads();
    if (slab + 1 < params.slabs) {
      grad_y_loader.load(grad_y, s_info + next * kSlab, H, W, s_grad_y + next * kGradYSlab);
      x_loader.load(x, s_info + next * kSlab, H, W, s_x + next * kXSlab);
      cp_async_commit();
      advance(s_info + now * kSlab);  // no thread reads these until the next barrier
    }
    if (kGroups * kPixels == kSlab || threadIdx.x / kFours * kPixels < kSlab) {
      const float* from =
          s_grad_y + now * kGradYSlab + threadIdx.x / kFours * kPixels * GradYLoader::kPitch + threadIdx.x % kFours * 4;
#pragma unroll
      for (int k = 0; k < kPixels; ++k) {
        const Float4 v = load_16<Float4>(from + k * GradYLoader::kPitch);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum_grad_y[i] += v.v[i];
      }
    }
    multiply_slab<Tile, GradYLoader::kPitch, XLoader::kPitch>(
        acc, s_grad_y + now * kGradYSlab + own.m0, s_x + now * kXSlab + own.n0,
        [](float sum, float grad_y, float x, int, int) { return fmaf(grad_y, x, sum); });
  }

  float* const to = partial + ((int64_t)(split * p.groups + group) * params.M) * params.K;
#pragma unroll
  for (int i = 0; i < Tile::kThreadM; ++i) {
    const int m = m0 + own.m(i);
    if (m >= params.M) continue;
#pragma unroll
    for (int j = 0; j < Tile::kThreadN; ++j) {
      const int k = k0 + own.n(j);
      if (k < params.K) to[(int64_t)m * params.K + k] = acc[i][j];
    }
  }
  if (blockIdx.x) return;  // the sums of dY are the same for every tile of k
  __syncthreads();
  store_16(s_x + threadIdx.x * 4, Float4{{sum_grad_y[0], sum_grad_y[1], sum_grad_y[2], sum_grad_y[3]}});
  __syncthreads();
  for (int i = threadIdx.x; i < Tile::kM && m0 + i < params.M; i += Tile::kThreads) {
    float sum = 0;
    for (int j = 0; j < kGroups; ++j) sum += s_x[j * Tile::kM + i];
    partial_sum[(int64_t)(split * p.groups + group) * params.M + m0 + i] = sum;
  }
}

constexpr int kFinishThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kFinishThreads)
    grad_w_finish_kernel(Conv2dArgs args, GradWParams params, const float* partial, const float* partial_sum) {
  const Conv2dProblem& p = args.problem;
  const int k = blockIdx.x * kFinishThreads + threadIdx.x;
  const int tap = k / params.C, ci = k % params.C, kh = tap / (int)p.KW, kw = tap % (int)p.KW;
  if (k >= params.K || ci >= (int)(p.C_in / p.groups)) return;
  for (int64_t co = blockIdx.y; co < p.C_out; co += gridDim.y) {
    float products = 0, sum = 0;
    for (int split = 0; split < params.splits; ++split) {
      products += partial[(split * p.C_out + co) * params.K + k];
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
