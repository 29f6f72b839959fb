// Gradient of the input, float32 sums:   dX[n,ci,h,w] = sum over (kh,kw,co) of dY[n,co,oh,ow] * clamp(W - X, -1, 1)
// with oh*stride_h = h + pad_top - kh*dilation_h and ow likewise.  This is AdderNet's training gradient (arXiv
// 1912.13200, section 3.3), on purpose not the derivative, which is sgn(W - X).
//
// Gather form: every input pixel sums its own terms: no atomics, a fixed order.  Pixels whose (h + pad_top, w +
// pad_left) have the same remainders by the strides form a phase; within a phase all pixels use the same taps and step
// through dY by one, so that the walk of walk.cuh serves: its source is dY, its lanes are ci, its channels co.  A
// launch is a phase.
//
//   clamp(W - X, -1, 1) = 2*sat(W' - X') - 1   with W' = W/2 + 1/2 (pack.cuh), X' = X/2
//   dX = 2 * sum dY*sat(W' - X') - sum dY      FADD.SAT, FFMA: two instructions a term
//
// Its rounding is 2^-24 of sum |dY|*(2 + |W| + |X|), however small W - X; weights of kLargestWeight and more are
// flagged.  X' of a thread's pixels and lanes stays in registers, hence 8 x 4 a thread: 64 lanes x 128 pixels, 256
// threads.  sat() makes 0 of a NaN, and 0 * inf is none of the formula's: a tile that has met one is flagged, and
// grad_x_repair_kernel, launched behind, does it again by definition.h. grid (tiles of the phase's pixels, tiles of ci,
// groups).
#pragma once
#include "walk.cuh"

namespace adderops {
namespace cuda {

// The pixels of a phase: (h0 + i*stride_h, w0 + j*stride_w), i < rows, j < columns, of every image; tap (0, 0) of pixel
// (i, j) is dY at (q_h + i, q_w + j).
struct Phase {
  int rows, columns, h0, w0, stride_h, stride_w, q_h, q_w;
  int64_t pixels;
};
struct PhasePixel {
  unsigned n, i, j;
  __device__ __forceinline__ PhasePixel(const Phase& f, int64_t pixel) {
    const unsigned at = (unsigned)pixel, row = at / (unsigned)f.columns;
    j = at % (unsigned)f.columns, i = row % (unsigned)f.rows, n = row / (unsigned)f.rows;
  }
  __device__ __forceinline__ int64_t offset(const Phase& f, const Operand& o) const {
    return n * o.stride[0] + (f.h0 + (int)i * f.stride_h) * o.stride[2] + (f.w0 + (int)j * f.stride_w) * o.stride[3];
  }
};

template <typename T, typename Tile, Layout L>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    grad_x_kernel(Conv2dArgs args, Phase phase, Walk walk, PackedWeights weights, int* flags) {
  SHARED(float, s_slabs, [2 * kSlabFloats<Tile>]);
  SHARED(float, s_sum, [Tile::kColumns]);
  const Conv2dProblem& p = args.problem;
  const int M = (int)(p.C_out / p.groups), C = (int)(p.C_in / p.groups), group = blockIdx.z;
  const int64_t first = (int64_t)blockIdx.x * Tile::kColumns;
  const int lane0 = blockIdx.y * Tile::kLanes;
  const Place<Tile> place;

  // half of X; where there is none, anything
  float x[Tile::kThreadLanes][Tile::kThreadColumns];
#pragma unroll
  for (int j = 0; j < Tile::kThreadColumns; ++j) {
    const int64_t pixel = first + place.column_of(j);
    const T* const from =
        static_cast<const T*>(args.x.data) + PhasePixel(phase, pixel < phase.pixels ? pixel : 0).offset(phase, args.x);
#pragma unroll
    for (int i = 0; i < Tile::kThreadLanes; ++i) {
      const int lane = lane0 + place.lane_of(i);
      x[i][j] = 0.5f * (lane < C ? load_float(from + (group * C + lane) * args.x.stride[1]) : 0.f);
    }
  }

  float acc[Tile::kThreadLanes][Tile::kThreadColumns] = {};
  ColumnSums<Tile> sums;
  if (walk.slabs) {
    const char* const source = static_cast<const char*>(walk.source) + (int64_t)group * M * walk.channel;
    const int64_t depth = (M + kSlab - 1) / kSlab * kSlab;
    const char* const packed = static_cast<const char*>(weights.packed) + walk.first_weights +
                               (group * p.KH * p.KW * depth * weights.pitch + lane0) * 4;
    const auto site_of = [&](int column) {
      const int64_t pixel = first + column;
      const PhasePixel at(phase, pixel < phase.pixels ? pixel : 0);
      return Site{at.n * walk.image, phase.q_h + (int)at.i, phase.q_w + (int)at.j, pixel < phase.pixels};
    };
    sum_over_taps<Tile, T, L, true>(walk, source, site_of, packed, weights.pitch, s_slabs, acc, sums,
                                    [&](float sum, float w, float grad_y, int i, int j) {
                                      return fmaf(grad_y, saturated_difference(w, x[i][j]), sum);
                                    });
  }
  sums.gather(s_slabs, s_sum);

  int doubtful = 0;
  for (int i = threadIdx.x; i < weights.chunks * ((Tile::kLanes + 31) / 32); i += Tile::kThreads) {
    const int block = lane0 / 32 + i % ((Tile::kLanes + 31) / 32), chunk = i / ((Tile::kLanes + 31) / 32);
    if (block < weights.lane_blocks)
      doubtful |= weights.flags[((int64_t)group * weights.chunks + chunk) * weights.lane_blocks + block];
  }
#pragma unroll
  for (int j = 0; j < Tile::kThreadColumns; ++j) {
    const int64_t pixel = first + place.column_of(j);
    if (pixel >= phase.pixels) continue;
    T* const to = static_cast<T*>(args.out.data) + PhasePixel(phase, pixel).offset(phase, args.out);
    const float sum = s_sum[place.column_of(j)];
#pragma unroll
    for (int i = 0; i < Tile::kThreadLanes; ++i) {
      const int lane = lane0 + place.lane_of(i);
      if (lane >= C) continue;
      const float v = 2 * acc[i][j] - sum;
      doubtful |= !is_finite(v) || x[i][j] != x[i][j];
      store_float(to + (group * C + lane) * args.out.stride[1], v);
    }
  }
  doubtful = __syncthreads_or(doubtful);
  if (threadIdx.x == 0) flags[((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = doubtful;
}

// The flagged tiles of `lanes` x `columns`, by the definition.  Same grid.
template <typename T>
__global__ void __launch_bounds__(kRepairThreads)
    grad_x_repair_kernel(Conv2dArgs args, Phase phase, int lanes, int columns, const int* flags) {
  if (!flags[((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x]) return;
  const int C = (int)(args.problem.C_in / args.problem.groups);
  for (int k = threadIdx.x; k < lanes * columns; k += kRepairThreads) {
    const int64_t pixel = (int64_t)blockIdx.x * columns + k % columns;
    const int lane = blockIdx.y * lanes + k / columns;
    if (pixel >= phase.pixels || lane >= C) continue;
    const PhasePixel at(phase, pixel);
    const int ci = blockIdx.z * C + lane;
    store_float(static_cast<T*>(args.out.data) + at.offset(phase, args.out) + ci * args.out.stride[1],
                definition::grad_x<T>(args, at.n, ci, phase.h0 + (int)at.i * phase.stride_h,
                                      phase.w0 + (int)at.j * phase.stride_w));
  }
}

}  // namespace cuda
}  // namespace adderops
