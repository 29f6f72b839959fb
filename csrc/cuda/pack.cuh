// Packs weights into the order in which the tiled kernels read them, padded with zeros to whole slabs and tiles:
//
//   forward        packed[group][kh*KW + kw][ci, to a multiple of kSlab][co, to whole tiles]    W, float32
//   grad_x         packed[group][kh*KW + kw][co, to a multiple of kSlab][ci, to whole tiles]    W/2 + 1/2, float32
//   forward, mma   packed[group][kh*KW + kw][slab of 32 ci][co, to whole tiles][32]             W, in the element type
//
//                 32 channels m                  grid (splits of the terms, blocks of 32 channels m, groups)
//               +---------------+                block 32 x 8 threads; a warp reads one term of 32 channels at a time,
//   256 terms   |  warp 0       |                from W of any strides, and writes 32 neighbouring elements of packed
//   (a split)   |  warp 1       |
//               |  ...  8 warps, every 8th term  thread: 32 terms of one channel; sum, size and flag in registers,
//               +---------------+                        added up over the 8 warps in shared memory (2 KB)
//
//   sums[group][split][m]            the split's part of the sum of W over the terms of channel m;  sizes: of |W|
//   flags[group][split][block of m]  grad_x: is a weight of kLargestWeight or more, an infinity or a NaN among them?
//
// The last split is shorter; channels and terms that are padding are written as zeros.
#pragma once
#include "tile.cuh"

namespace adderops {
namespace cuda {

// The packed weights of one pass: what pack_kernel writes and the tiled kernels read.
struct PackedWeights {
  void* data;
  float *sums, *sizes;
  int* flags;
  int M, pitch;         // output channels of the pass and group; with the padding
  int channels, depth;  // channels summed over; with the padding
  int taps, KW;
  int splits, blocks;  // of terms, of output channels: pack_kernel's grid
};

// s_sums[i] = `parts` (sums or sizes) of channel m0 + i of this block's group, added up over the splits.  `thread`:
// threadIdx.x, or thread_index() where registers are short.
__device__ __forceinline__ void reduce_splits(const PackedWeights& weights, const float* parts, int m0, int count,
                                              unsigned thread, float* s_sums) {
  for (int i = (int)thread; i < count; i += blockDim.x) {
    float sum = 0;
    for (int split = 0; split < weights.splits; ++split)
      sum += parts[((int64_t)blockIdx.z * weights.splits + split) * weights.pitch + m0 + i];
    s_sums[i] = sum;
  }
}

// grad_x: W/2 + 1/2 of a larger weight would keep too little of the half.
constexpr float kLargestWeight = 4096.f;

constexpr int kPackTerms = 256, kPackM = 32, kPackThreads = 256;

enum class Packing { kForward, kGradX, kMma };

template <typename T, Packing P>
__global__ void __launch_bounds__(kPackThreads) pack_kernel(Operand w, PackedWeights to) {
  SHARED(float, s_sum, [kPackThreads]);
  SHARED(float, s_size, [kPackThreads]);
  const int m = blockIdx.y * kPackM + threadIdx.x % 32, group = blockIdx.z;
  const int64_t terms = (int64_t)to.taps * to.depth, begin = (int64_t)blockIdx.x * kPackTerms;
  const int filters = P == Packing::kGradX ? to.channels : to.M;  // of a group
  float sum = 0, size = 0;
  int bad = 0;
  for (int64_t k = begin + threadIdx.x / 32; k < begin + kPackTerms && k < terms; k += 8) {
    const int tap = (int)(k / to.depth), c = (int)(k % to.depth);
    const bool valid = c < to.channels && m < to.M;
    const int co = P == Packing::kGradX ? c : m, ci = P == Packing::kGradX ? m : c;
    const T* from = static_cast<const T*>(w.data) + ((int64_t)group * filters + co) * w.stride[0] + ci * w.stride[1] +
                    tap / to.KW * w.stride[2] + tap % to.KW * w.stride[3];
    const T element = valid ? *from : T{};
    const float v = load_float(&element);
    sum += v, size += fabsf(v);
    bad |= !(fabsf(v) < kLargestWeight);
    if (m >= to.pitch) continue;
    if (P == Packing::kMma) {
      const int64_t slab = (int64_t)(group * to.taps + tap) * (to.depth / 32) + c / 32;
      static_cast<T*>(to.data)[(slab * to.pitch + m) * 32 + c % 32] = element;
    } else {
      static_cast<float*>(to.data)[((int64_t)group * terms + k) * to.pitch + m] =
          P == Packing::kGradX ? (valid ? fmaf(v, 0.5f, 0.5f) : 0.f) : v;
    }
  }
  s_sum[threadIdx.x] = sum, s_size[threadIdx.x] = size;
  const int any = __syncthreads_or(bad);
  if (threadIdx.x < 32 && m < to.pitch) {
    float total = 0, total_size = 0;
    for (int i = 0; i < kPackThreads; i += 32) total += s_sum[threadIdx.x + i], total_size += s_size[threadIdx.x + i];
    const int64_t at = ((int64_t)group * to.splits + blockIdx.x) * to.pitch + m;
    to.sums[at] = total, to.sizes[at] = total_size;
  }
  if (threadIdx.x == 0) to.flags[((int64_t)group * to.splits + blockIdx.x) * gridDim.y + blockIdx.y] = any;
}

}  // namespace cuda
}  // namespace adderops
