// What the tiled kernels share: the shape of a block's tile, who computes what of it, and where a pixel lies.
//
//            columns: kColumns pixels (forward, grad_x) or weights (grad_w)
//            +--------------------------------------+      a block computes lanes x columns of the result; each thread
//   kLanes   |  a thread: kThreadLanes x            |      kThreadLanes x kThreadColumns of it, in runs of four, and
//   output   |  kThreadColumns                      |      reads both sides of a step k from shared memory, 16 bytes at
//   channels |                                      |      a time: [k][kLanes] and [k][kColumns].
//            +--------------------------------------+
//   A warp is kWarpLanes x kWarpColumns threads, so that its reads are few distinct 16-byte words of either side.
#pragma once
#include "dialect.cuh"

namespace adderops {
namespace cuda {

// How neighbouring threads walk a tensor: along its pixels, whatever the strides, or along dense channels, 16 bytes
// each.
enum class Layout : int { kPlanes, kChannels };

constexpr int kSlab = 16;  // steps of the sum that are in shared memory at a time (twice: one computed, one arriving)

constexpr int kRepairThreads = 128;  // of the kernels that do a flagged tile again

template <int Lanes, int Columns, int ThreadLanes, int ThreadColumns, int BlocksPerMultiprocessor>
struct Tile {
  static constexpr int kLanes = Lanes, kColumns = Columns;
  static constexpr int kThreadLanes = ThreadLanes, kThreadColumns = ThreadColumns;
  static constexpr int kAcross = Lanes / ThreadLanes, kDown = Columns / ThreadColumns;  // threads
  static constexpr int kThreads = kAcross * kDown;
  static constexpr int kWarpLanes = kAcross < 8 ? kAcross : 8, kWarpColumns = 32 / kWarpLanes;
  static constexpr int kBlocks = BlocksPerMultiprocessor;
  static_assert(ThreadLanes % 4 == 0 && ThreadColumns % 4 == 0, "threads read four floats at a time");
  static_assert(kAcross % kWarpLanes == 0 && kDown % kWarpColumns == 0, "whole warps");
  static_assert(kThreads % Columns == 0 || Columns % kThreads == 0, "a thread copies whole columns");
};

// Where a thread stands in its block's tile.
template <typename T>
struct Place {
  int lane, column;  // of its first run of four
  __device__ __forceinline__ explicit Place(unsigned thread = threadIdx.x) {
    const int warp = thread / 32, l = thread % 32;
    constexpr int kWarpsAcross = T::kAcross / T::kWarpLanes;
    lane = 4 * (warp % kWarpsAcross * T::kWarpLanes + l / T::kWarpColumns);
    column = 4 * (warp / kWarpsAcross * T::kWarpColumns + l % T::kWarpColumns);
  }
  // of its i-th element: runs of four, a run every kAcross (kDown) threads
  __device__ __forceinline__ int lane_of(int i) const { return lane + i / 4 * (4 * T::kAcross) + i % 4; }
  __device__ __forceinline__ int column_of(int i) const { return column + i / 4 * (4 * T::kDown) + i % 4; }
};

// One step's operands of a thread: `Count` floats, in runs of four every `Stride` floats.
template <int Count, int Stride>
__device__ __forceinline__ void read_run(float (&to)[Count], const float* from) {
#pragma unroll
  for (int i = 0; i < Count; i += 4) {
    const Float4 v = load_16<Float4>(from + i / 4 * Stride);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i + j] = v.v[j];
  }
}

// acc[i][j] = term(acc[i][j], lane i, column j) over the steps of a slab, the operands of the next step under way.
template <typename T, int LanePitch, int ColumnPitch, typename Term>
__device__ __forceinline__ void sum_slab(float (&acc)[T::kThreadLanes][T::kThreadColumns], const float* lanes,
                                         const float* columns, const Term& term) {
  float a[2][T::kThreadLanes], b[2][T::kThreadColumns];
  read_run<T::kThreadLanes, 4 * T::kAcross>(a[0], lanes);
  read_run<T::kThreadColumns, 4 * T::kDown>(b[0], columns);
#pragma unroll
  for (int k = 0; k < kSlab; ++k) {
    if (k + 1 < kSlab) {
      read_run<T::kThreadLanes, 4 * T::kAcross>(a[(k + 1) % 2], lanes + (k + 1) * LanePitch);
      read_run<T::kThreadColumns, 4 * T::kDown>(b[(k + 1) % 2], columns + (k + 1) * ColumnPitch);
    }
#pragma unroll
    for (int i = 0; i < T::kThreadLanes; ++i)
#pragma unroll
      for (int j = 0; j < T::kThreadColumns; ++j) acc[i][j] = term(acc[i][j], a[k % 2][i], b[k % 2][j], i, j);
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

}  // namespace cuda
}  // namespace adderops
