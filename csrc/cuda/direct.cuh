// Direct convolution, straight from the definition: float64, depthwise and other narrow groups, where there is no
// matrix product to tile, and sizes beyond a tile's 32-bit coordinates.  Any strides.  A depthwise layer is bound by
// memory.
//
//   direct_forward_kernel, direct_grad_x_kernel      one output per thread, no shared memory:
//
//       outputs in memory order   |t0 t1 .. t127|t0 ..       neighbouring threads write neighbouring elements of `out`;
//                                 +--block 0----+--1--       the grid covers all outputs, or strides over them beyond
//                                                            2^31 - 1 blocks
//
//   direct_grad_w_kernel      one weight per block:          grid (weights of a filter, up to 65535 filters)
//
//       pixels  t0 t1 .. t127 t0 t1 ..      thread: every 128th pixel, in float32 (float64: in float64)
//                  \  |  /                  block:  the 128 partial sums in shared memory, added up pairwise, always in
//                     dW                            the same order
#pragma once
#include "tile.cuh"

namespace adderops {
namespace cuda {

// from_float(output(n, c, h, w), out[n, c, h, w]) for all of N x C x H x W.
template <typename T, typename Output>
__device__ __forceinline__ void direct_outputs(const Operand& out, int64_t N, int64_t C, int64_t H, int64_t W,
                                               const Output& output) {
  const bool channels_last = out.stride[1] == 1;
  for (int64_t i = (int64_t)blockIdx.x * kDirectThreads + threadIdx.x; i < N * C * H * W;
       i += (int64_t)gridDim.x * kDirectThreads) {
    const int64_t c = channels_last ? i % C : i / (H * W) % C, pixel = channels_last ? i / C : i % (H * W);
    const int64_t n = i / (C * H * W), h = pixel / W % H, w = pixel % W;
    T* const to =
        static_cast<T*>(out.data) + n * out.stride[0] + c * out.stride[1] + h * out.stride[2] + w * out.stride[3];
    from_float(output(n, c, h, w), to);
  }
}

template <typename T>
__global__ void __launch_bounds__(kDirectThreads) direct_forward_kernel(Conv2dArgs args) {
  const Conv2dProblem& p = args.problem;
  direct_outputs<T>(args.out, p.N, p.C_out, p.OH, p.OW, [&](int64_t n, int64_t co, int64_t oh, int64_t ow) {
    return definition::forward<T>(args, n, co, oh, ow);
  });
}
template <typename T>
__global__ void __launch_bounds__(kDirectThreads) direct_grad_x_kernel(Conv2dArgs args) {
  const Conv2dProblem& p = args.problem;
  direct_outputs<T>(args.out, p.N, p.C_in, p.H, p.W, [&](int64_t n, int64_t ci, int64_t h, int64_t w) {
    return definition::grad_x<T>(args, n, ci, h, w);
  });
}

// C and M are those of a group.
template <typename T>
__global__ void __launch_bounds__(kDirectThreads) direct_grad_w_kernel(Conv2dArgs args, int C, int M) {
  using Sum = typename definition::Sum<T>::type;
  SHARED(Sum, s_partials, [kDirectThreads]);
  const Conv2dProblem& p = args.problem;
  const int KW = (int)p.KW, taps = (int)p.KH * KW, at = blockIdx.x, ci = at / taps, kh = at % taps / KW, kw = at % KW;
  // kDirectThreads pixels further, as images, rows and columns
  const int OW = p.OW > kDirectThreads ? kDirectThreads + 1 : (int)p.OW;
  const int OH = p.OH > kDirectThreads ? kDirectThreads + 1 : (int)p.OH;
  const int dn = kDirectThreads / OW / OH, dh = kDirectThreads / OW % OH, dw = kDirectThreads % OW;
  for (int co = blockIdx.y; co < (int)p.C_out; co += gridDim.y) {
    const int c = co / M * C + ci;
    const Sum w = definition::element<T>(args.w, co, ci, kh, kw);
    Sum partial = 0;
    int64_t n = (int)threadIdx.x / OW / OH, oh = (int)threadIdx.x / OW % OH, ow = (int)threadIdx.x % OW;
    while (n < p.N) {
      const int64_t ih = oh * p.stride_h + kh * p.dilation_h - p.pad_top;
      const int64_t iw = ow * p.stride_w + kw * p.dilation_w - p.pad_left;
      const bool inside = ih >= 0 && ih < p.H && iw >= 0 && iw < p.W;
      const Sum x = inside ? definition::element<T>(args.x, n, c, ih, iw) : 0;
      partial += definition::element<T>(args.grad_y, n, co, oh, ow) * (x - w);
      n += dn, oh += dh, ow += dw;
      if (ow >= p.OW) ow -= p.OW, ++oh;
      if (oh >= p.OH) oh -= p.OH, ++n;
    }
    s_partials[threadIdx.x] = partial;
    for (int step = kDirectThreads / 2; step; step /= 2) {
      __syncthreads();
      if (threadIdx.x < step) s_partials[threadIdx.x] += s_partials[threadIdx.x + step];
    }
    if (threadIdx.x == 0) {
      const Operand& o = args.out;
      from_float(s_partials[0],
                 static_cast<T*>(o.data) + co * o.stride[0] + ci * o.stride[1] + kh * o.stride[2] + kw * o.stride[3]);
    }
    __syncthreads();
  }
}

}  // namespace cuda
}  // namespace adderops
