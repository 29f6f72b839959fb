// Weights in the order the tiled kernels read them, float32, padded with zeros so that nobody has to look where they
// end:
//
//   forward        packed[group][kh*KW + kw][ci, to a multiple of kSlab][co, to whole tiles]   = W
//   grad_x         packed[group][kh*KW + kw][co, to a multiple of kSlab][ci, to whole tiles]   = W/2 + 1/2
//   forward, mma   packed[group][kh*KW + kw][slab of 32 ci][co, to whole tiles][32], in the element type
//
// grid (chunks of rows, blocks of 32 lanes, groups), 32 x 8 threads: a block packs kPackRows rows of 32 lanes.
//   sums[group][chunk][lane]   the chunk's part of the sum over W of a lane;  sizes likewise, over |W|
//   flags[group][chunk][block of lanes]   grad_x: are not all of its weights below kLargestWeight?
#pragma once
#include "tile.cuh"

namespace adderops {
namespace cuda {

// What the tiled kernels are told of it.
struct PackedWeights {
  const void* packed;
  const float *sums, *sizes;
  const int* flags;
  int pitch, chunks, lane_blocks;  // lanes with their padding; chunks of rows, blocks of 32 lanes: pack_kernel's grid
};

// `parts`, sums or sizes, added up for the lanes [first, first + count) of this block's group.  `thread`: threadIdx.x,
// or thread_index() where the registers that keep it are missed.
__device__ __forceinline__ void gather_lane_sums(const PackedWeights& w, const float* parts, int first, int count,
                                                 unsigned thread, float* sums) {
  for (int i = (int)thread; i < count; i += blockDim.x) {
    float sum = 0;
    for (int chunk = 0; chunk < w.chunks; ++chunk)
      sum += parts[((int64_t)blockIdx.z * w.chunks + chunk) * w.pitch + first + i];
    sums[i] = sum;
  }
}

// grad_x: W/2 + 1/2 of larger ones would keep too little of the half.
constexpr float kLargestWeight = 4096.f;

constexpr int kPackRows = 256, kPackLanes = 32, kPackThreads = 256;

enum class Packing { kForward, kGradX, kMma };

struct PackShape {
  int lanes, lane_pitch;  // real ones, and with the padding
  int channels, depth;    // real ones summed over, and with the padding
  int taps, KW, chunks;
};

template <typename T, Packing P>
__global__ void __launch_bounds__(kPackThreads)
    pack_kernel(Operand w, PackShape s, void* packed, float* sums, float* sizes, int* flags) {
  SHARED(float, s_sum, [kPackThreads]);
  SHARED(float, s_size, [kPackThreads]);
  const int lane = blockIdx.y * kPackLanes + threadIdx.x % 32, group = blockIdx.z;
  const int64_t rows = (int64_t)s.taps * s.depth, begin = (int64_t)blockIdx.x * kPackRows;
  const int co_step = P == Packing::kGradX ? s.channels : s.lanes;  // filters of a group
  float sum = 0, size = 0;
  int bad = 0;
  for (int64_t r = begin + threadIdx.x / 32; r < begin + kPackRows && r < rows; r += 8) {
    const int tap = (int)(r / s.depth), c = (int)(r % s.depth);
    const bool real = c < s.channels && lane < s.lanes;
    const int co = P == Packing::kGradX ? c : lane, ci = P == Packing::kGradX ? lane : c;
    const T* from = static_cast<const T*>(w.data) + ((int64_t)group * co_step + co) * w.stride[0] + ci * w.stride[1] +
                    tap / s.KW * w.stride[2] + tap % s.KW * w.stride[3];
    const T element = real ? *from : T{};
    const float v = load_float(&element);
    sum += v, size += fabsf(v);
    bad |= !(fabsf(v) < kLargestWeight);
    if (lane >= s.lane_pitch) continue;
    if (P == Packing::kMma) {
      const int64_t slab = (int64_t)(group * s.taps + tap) * (s.depth / 32) + c / 32;
      static_cast<T*>(packed)[(slab * s.lane_pitch + lane) * 32 + c % 32] = element;
    } else {
      static_cast<float*>(packed)[((int64_t)group * rows + r) * s.lane_pitch + lane] =
          P == Packing::kGradX ? (real ? fmaf(v, 0.5f, 0.5f) : 0.f) : v;
    }
  }
  s_sum[threadIdx.x] = sum, s_size[threadIdx.x] = size;
  const int any = __syncthreads_or(bad);
  if (threadIdx.x < 32 && lane < s.lane_pitch) {
    float total = 0, total_size = 0;
    for (int i = 0; i < kPackThreads; i += 32) total += s_sum[threadIdx.x + i], total_size += s_size[threadIdx.x + i];
    const int64_t at = ((int64_t)group * s.chunks + blockIdx.x) * s.lane_pitch + lane;
    sums[at] = total, sizes[at] = total_size;
  }
  if (threadIdx.x == 0) flags[((int64_t)group * s.chunks + blockIdx.x) * gridDim.y + blockIdx.y] = any;
}

}  // namespace cuda
}  // namespace adderops
