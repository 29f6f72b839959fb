// Mean |x| of many tensors (N, C, H, W) of any strides and types in one launch, in two stages without atomics:
//
//   mean_abs_kernel          partial[block] = the sum of |x| of kChunk elements; MeanAbsLayer::first numbers the blocks
//   mean_abs_finish_kernel   a block is a tensor: adds up its partial sums in a fixed order and divides
//
//   block   256 threads; a thread adds up every 256th element, or every 256th 16 bytes of a tensor without gaps, at most
//           64 numbers; then the block's threads in shared memory, halving their number
//
// A tensor without gaps is read in the order of memory.  Tails: 16 bytes that are not whole are read element by element.
#pragma once
#include "features.cuh"

namespace adderops {
namespace cuda {

constexpr int kMeanAbsThreads = 256, kMeanAbsChunk = 64 * kMeanAbsThreads;

struct MeanAbsTensor {
  const char* data;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in bytes
  int64_t count, C, H, W;
  ElementType type;
  bool vectors;  // without gaps, and aligned to 16 bytes
  bool dense;    // without gaps
  int first, blocks;
};
constexpr int kMeanAbsTensors = 40;  // kernel arguments are limited to 4 KB
struct MeanAbsList {
  MeanAbsTensor tensors[kMeanAbsTensors];
  int count;
};
static_assert(sizeof(MeanAbsList) + 16 <= 4096 - 64, "what a launch takes");

// The sum of one number per thread, for all threads.
__device__ __forceinline__ float sum_of_block(float sum, float* s_sums) {
  s_sums[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll 1
  for (int half = kMeanAbsThreads / 2; half; half /= 2) {
    if ((int)threadIdx.x < half) s_sums[threadIdx.x] += s_sums[threadIdx.x + half];
    __syncthreads();
  }
  return s_sums[0];
}

__global__ void __launch_bounds__(kMeanAbsThreads) mean_abs_kernel(MeanAbsList list, float* partial) {
  SHARED(float, s_sums, [kMeanAbsThreads]);
  int at = 0;
  while (at + 1 < list.count && (int)blockIdx.x >= list.tensors[at + 1].first) ++at;
  const MeanAbsTensor& x = list.tensors[at];
  const ElementType type = x.type;
  const int bytes = type == ElementType::kFloat32 ? 4 : 2;
  const int64_t begin = (int64_t)((int)blockIdx.x - x.first) * kMeanAbsChunk;
  const int count = x.count - begin < kMeanAbsChunk ? (int)(x.count - begin) : kMeanAbsChunk;
  float sum = 0;
  int done = 0;  // of `count`, by vectors
  if (x.vectors) {
    const char* const from = x.data + begin * bytes;
    done = count / (16 / bytes) * (16 / bytes);
#pragma unroll 4
    for (int i = threadIdx.x * 16; i < done * bytes; i += kMeanAbsThreads * 16) {
      const Words4 words = load_16<Words4>(from + i);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (type == ElementType::kFloat32) {
          sum += fabsf(float_from_bits(words.v[k]));
        } else {
          sum += fabsf(value_of_bits(words.v[k] & 0xffffu, type));
          sum += fabsf(value_of_bits(words.v[k] >> 16, type));
        }
      }
    }
  }
  for (int i = done + (int)threadIdx.x; i < count; i += kMeanAbsThreads) {
    const int64_t element = begin + i, row = element / x.W, plane = row / x.H;
    const int64_t offset = x.dense ? element * bytes
                                   : plane / x.C * x.stride_n + plane % x.C * x.stride_c + row % x.H * x.stride_h +
                                         element % x.W * x.stride_w;
    sum += fabsf(value_of_bits(load_4_or_2(x.data + offset, bytes == 4), type));
  }
  sum = sum_of_block(sum, s_sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kMeanAbsThreads)
    mean_abs_finish_kernel(MeanAbsList list, const float* partial, float* out) {
  SHARED(float, s_sums, [kMeanAbsThreads]);
  const MeanAbsTensor& x = list.tensors[blockIdx.x];
  float sum = 0;
  for (int i = threadIdx.x; i < x.blocks; i += kMeanAbsThreads) sum += partial[x.first + i];
  sum = sum_of_block(sum, s_sums);
  if (threadIdx.x == 0) out[blockIdx.x] = sum / (float)x.count;
}

}  // namespace cuda
}  // namespace adderops
