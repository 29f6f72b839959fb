// One output a thread, straight from the formulas of definition.h: float64, depthwise and other narrow groups, where
// there is no matrix product to tile, and what a tile's 32-bit coordinates do not reach.  Any strides; memory-bound for
// a depthwise layer.  The gradient of the weights sums over all pixels: a block a weight, its threads' shares added up
// in their order.
//
//   direct_kernel          forward, grad_x: threads along the dense dimension of `out`
//   direct_grad_w_kernel   grid (weights of a filter, filters or some of them at a time)
#pragma once
#include "tile.cuh"

namespace adderops {
namespace cuda {

constexpr int kDirectThreads = 128;

enum class Gradient { kNone, kInput };

template <typename T, Gradient G>
__global__ void __launch_bounds__(kDirectThreads)
    direct_kernel(Conv2dArgs args, int64_t N, int64_t C, int64_t H, int64_t W) {
  const Operand& o = args.out;
  const bool channels_last = o.stride[1] == 1;
  for (int64_t i = (int64_t)blockIdx.x * kDirectThreads + threadIdx.x; i < N * C * H * W;
       i += (int64_t)gridDim.x * kDirectThreads) {
    const int64_t c = channels_last ? i % C : i / (H * W) % C, pixel = channels_last ? i / C : i % (H * W);
    const int64_t n = i / (C * H * W), h = pixel / W % H, w = pixel % W;
    T* const to = static_cast<T*>(o.data) + n * o.stride[0] + c * o.stride[1] + h * o.stride[2] + w * o.stride[3];
    if constexpr (G == Gradient::kNone)
      from_float(definition::forward<T>(args, n, c, h, w), to);
    else
      from_float(definition::grad_x<T>(args, n, c, h, w), to);
  }
}

// C and M are of a group.
template <typename T>
__global__ void __launch_bounds__(kDirectThreads) direct_grad_w_kernel(Conv2dArgs args, int C, int M) {
  using Sum = typename definition::Sum<T>::type;
  SHARED(Sum, s_shares, [kDirectThreads]);
  const Conv2dProblem& p = args.problem;
  const int KW = (int)p.KW, taps = (int)p.KH * KW, at = blockIdx.x, ci = at / taps, kh = at % taps / KW, kw = at % KW;
  // kDirectThreads pixels on, as images, rows and columns
  const int OW = p.OW > kDirectThreads ? kDirectThreads + 1 : (int)p.OW;
  const int OH = p.OH > kDirectThreads ? kDirectThreads + 1 : (int)p.OH;
  const int dn = kDirectThreads / OW / OH, dh = kDirectThreads / OW % OH, dw = kDirectThreads % OW;
  for (int co = blockIdx.y; co < (int)p.C_out; co += gridDim.y) {
    const int c = co / M * C + ci;
    const Sum w = definition::element<T>(args.w, co, ci, kh, kw);
    Sum share = 0;
    int64_t n = (int)threadIdx.x / OW / OH, oh = (int)threadIdx.x / OW % OH, ow = (int)threadIdx.x % OW;
    while (n < p.N) {
      const int64_t ih = oh * p.stride_h + kh * p.dilation_h - p.pad_top;
      const int64_t iw = ow * p.stride_w + kw * p.dilation_w - p.pad_left;
      const bool inside = ih >= 0 && ih < p.H && iw >= 0 && iw < p.W;
      const Sum x = inside ? definition::element<T>(args.x, n, c, ih, iw) : 0;
      share += definition::element<T>(args.grad_y, n, co, oh, ow) * (x - w);
      n += dn, oh += dh, ow += dw;
      if (ow >= p.OW) ow -= p.OW, ++oh;
      if (oh >= p.OH) oh -= p.OH, ++n;
    }
    s_shares[threadIdx.x] = share;
    for (int half = kDirectThreads / 2; half; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) s_shares[threadIdx.x] += s_shares[threadIdx.x + half];
    }
    if (threadIdx.x == 0) {
      const Operand& o = args.out;
      from_float(s_shares[0],
                 static_cast<T*>(o.data) + co * o.stride[0] + ci * o.stride[1] + kh * o.stride[2] + kw * o.stride[3]);
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace adderops
