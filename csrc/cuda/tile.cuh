// What the tiled kernels share: the shape of a block's tile, which outputs of it a thread computes, and the inner loop.
//
// A pass is a matrix product with another term: M x K times K x N, where M counts output channels of the pass (ci in
// grad_x), N pixels (weights of a filter in grad_w), and K the terms of a sum.
//
//                     kN                          block: kM x kN outputs
//            +------------------+                 warp:  kWarpThreadsM x kWarpThreadsN threads, near a square, so that
//            |..  |  |..  |  |  |                        its lanes read few distinct 16-byte words of either operand
//      kM    |..  |  |..  |  |  |                 thread (..): kThreadM x kThreadN outputs in registers, in groups of
//            |----+--|          |                        4 x 4 at the same place of every 4 * kThreadsM rows and
//            |..  |  |..  |  |  |                        4 * kThreadsN columns
//            +------------------+                 step k:  kThreadM + kThreadN floats from shared memory, 16 bytes at a
//                                                        time, for kThreadM * kThreadN terms
//
// Shared memory holds two slabs of kSlab steps, one being computed, one arriving: [kSlab][kM] and [kSlab][kN] floats
// each.
#pragma once
#include "dialect.cuh"

namespace adderops {
namespace cuda {

// How neighbouring threads read a tensor: kStrided, along pixels, 4 bytes or less each, whatever the strides;
// kChannelsLast, 16 bytes of contiguous channels each.
enum class Layout : int { kStrided, kChannelsLast };

constexpr int kSlab = 16;

constexpr int kRepairThreads = 128;  // of the kernels that compute a flagged tile again
constexpr int kDirectThreads = 128;  // of the kernels with one output per thread: direct.cuh, and of int8.cuh

template <int M, int N, int ThreadM, int ThreadN, int BlocksPerMultiprocessor>
struct Tile {
  static constexpr int kM = M, kN = N;                                    // outputs of a block
  static constexpr int kThreadM = ThreadM, kThreadN = ThreadN;            // outputs of a thread
  static constexpr int kThreadsM = M / ThreadM, kThreadsN = N / ThreadN;  // threads of a block
  static constexpr int kThreads = kThreadsM * kThreadsN;
  static constexpr int kWarpThreadsM = kThreadsM < 8 ? kThreadsM : 8;
  static constexpr int kWarpThreadsN = kThreads < 32 ? kThreadsN : 32 / kWarpThreadsM;
  static constexpr int kBlocks = BlocksPerMultiprocessor;
  static_assert(ThreadM % 4 == 0 && ThreadN % 4 == 0, "threads read four floats at a time");
  static_assert(kThreadsM % kWarpThreadsM == 0 && kThreadsN % kWarpThreadsN == 0, "whole warps");
  static_assert(kThreads % N == 0 || N % kThreads == 0, "a loader copies whole pixels");
};

// On sm_100 and sm_120 the 128 x 128 tile would spill (ptxas 13.0), so what can be read again stays out of registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr bool kShortOfRegisters = false;
#else
constexpr bool kShortOfRegisters = true;
#endif

// Which outputs of its block's tile a thread computes.
template <typename T>
struct ThreadTile {
  int m0, n0;  // of the first group of four
  __device__ __forceinline__ explicit ThreadTile(unsigned thread = threadIdx.x) {
    const int warp = thread / 32, lane = thread % 32;
    constexpr int kWarpsM = T::kThreadsM / T::kWarpThreadsM;
    m0 = 4 * (warp % kWarpsM * T::kWarpThreadsM + lane / T::kWarpThreadsN);
    n0 = 4 * (warp / kWarpsM * T::kWarpThreadsN + lane % T::kWarpThreadsN);
  }
  __device__ __forceinline__ int m(int i) const { return m0 + i / 4 * (4 * T::kThreadsM) + i % 4; }
  __device__ __forceinline__ int n(int j) const { return n0 + j / 4 * (4 * T::kThreadsN) + j % 4; }
};

// The upper left input pixel of an output pixel's window: where tap (0, 0) reads.
struct alignas(16) Window {
  int64_t offset;  // bytes from the first element of the image's group, of that pixel even where it is padding
  int h, w;        // h is kOutside beyond the last pixel, so that every tap lies outside
};
constexpr int kOutside = -0x40000000;

// `Count` floats of shared memory for a thread, in groups of four every `Stride` floats.
template <int Count, int Stride>
__device__ __forceinline__ void load_fragment(float (&to)[Count], const float* from) {
#pragma unroll
  for (int i = 0; i < Count; i += 4) {
    const Float4 v = load_16<Float4>(from + i / 4 * Stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = v.v[j];
  }
}

// acc[i][j] = term(acc[i][j], a[k][i], b[k][j], i, j) over the steps k of a slab, or of a part of one.  The fragments of
// step k + 1 load while step k computes.
template <typename T, int PitchA, int PitchB, int Steps = kSlab, typename Term>
__device__ __forceinline__ void multiply_slab(float (&acc)[T::kThreadM][T::kThreadN], const float* s_a,
                                              const float* s_b, const Term& term) {
  float a[2][T::kThreadM], b[2][T::kThreadN];
  load_fragment<T::kThreadM, 4 * T::kThreadsM>(a[0], s_a);
  load_fragment<T::kThreadN, 4 * T::kThreadsN>(b[0], s_b);
#pragma unroll
  for (int k = 0; k < Steps; ++k) {
    if (k + 1 < Steps) {
      load_fragment<T::kThreadM, 4 * T::kThreadsM>(a[(k + 1) % 2], s_a + (k + 1) * PitchA);
      load_fragment<T::kThreadN, 4 * T::kThreadsN>(b[(k + 1) % 2], s_b + (k + 1) * PitchB);
    }
#pragma unroll
    for (int i = 0; i < T::kThreadM; ++i)
#pragma unroll
      for (int j = 0; j < T::kThreadN; ++j) acc[i][j] = term(acc[i][j], a[k % 2][i], b[k % 2][j], i, j);
  }
}

// A float of a tensor of T, and back.
template <typename T>
__device__ __forceinline__ float load_float(const T* p) {
  return to_float(*p);
}
template <typename T>
__device__ __forceinline__ void store_float(T* p, float v) {
  from_float(v, p);
}

__device__ __forceinline__ bool is_finite(float v) { return fabsf(v) <= 3.402823466e38f; }

// The number of this block's tile, and of its flag: set where the faster arithmetic cannot be trusted, read by the
// repair.
__device__ __forceinline__ int64_t tile_index() {
  return ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
}

}  // namespace cuda
}  // namespace adderops
