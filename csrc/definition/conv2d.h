// The three passes, one output element at a time, straight from the formula.  float64 runs this code.  The SIMD and
// CUDA kernels call it for the few elements where their faster arithmetic would cancel, or treat infinities or NaNs
// differently.
//
//   forward   Y[n,co,p]  = -sum_k |X[n,k,p] - W[co,k]|
//   grad_w    dW[co,k]   = sum_p dY[co,p] * (X[k,p] - W[co,k])                 not the derivative, which is sgn(X - W)
//   grad_x    dX[k,p]    = sum_co dY[co,p] * clamp(W[co,k] - X[k,p], -1, 1)    not the derivative, which is sgn(W - X)
// Both are AdderNet's training gradients (arXiv 1912.13200, section 3.2), on purpose.
//
// float64 sums in double, the other types in float.  A sum that is NaN stays NaN, so loops end there.
#pragma once
#include "../args/conv2d.h"
#include "elements.h"

namespace adderops {
namespace definition {

template <typename T>
struct Sum {
  typedef float type;
};
template <>
struct Sum<double> {
  typedef double type;
};

template <typename T>
ADDEROPS_SHARED_CODE typename Sum<T>::type element(const Operand& o, int64_t a, int64_t b, int64_t c, int64_t d) {
  return to_float(static_cast<const T*>(o.data)[a * o.stride[0] + b * o.stride[1] + c * o.stride[2] + d * o.stride[3]]);
}

template <typename T>
ADDEROPS_SHARED_CODE typename Sum<T>::type forward(const Conv2dArgs& args, int64_t n, int64_t co, int64_t oh,
                                                   int64_t ow) {
  const Conv2dProblem& p = args.problem;
  const int64_t channels = p.C_in / p.groups, c0 = co / (p.C_out / p.groups) * channels;
  typename Sum<T>::type sum = 0;
  for (int64_t ci = 0; ci < channels; ++ci)
    for (int64_t kh = 0; kh < p.KH; ++kh)
      for (int64_t kw = 0; kw < p.KW; ++kw) {
        const int64_t ih = oh * p.stride_h + kh * p.dilation_h - p.pad_top;
        const int64_t iw = ow * p.stride_w + kw * p.dilation_w - p.pad_left;
        const bool inside = ih >= 0 && ih < p.H && iw >= 0 && iw < p.W;
        const typename Sum<T>::type x = inside ? element<T>(args.x, n, c0 + ci, ih, iw) : 0;
        const typename Sum<T>::type d = x - element<T>(args.w, co, ci, kh, kw);
        sum -= d < 0 ? -d : d;
      }
  if (args.bias) sum += to_float(static_cast<const T*>(args.bias)[co]);
  return sum;
}

template <typename T>
ADDEROPS_SHARED_CODE typename Sum<T>::type grad_x(const Conv2dArgs& args, int64_t n, int64_t ci, int64_t ih,
                                                  int64_t iw) {
  const Conv2dProblem& p = args.problem;
  const int64_t channels = p.C_in / p.groups, filters = p.C_out / p.groups, co0 = ci / channels * filters;
  const typename Sum<T>::type x = element<T>(args.x, n, ci, ih, iw);
  typename Sum<T>::type sum = 0;
  for (int64_t kh = 0; kh < p.KH; ++kh) {
    const int64_t h = ih + p.pad_top - kh * p.dilation_h, oh = h / p.stride_h;
    if (h < 0 || h % p.stride_h || oh >= p.OH) continue;
    for (int64_t kw = 0; kw < p.KW; ++kw) {
      const int64_t w = iw + p.pad_left - kw * p.dilation_w, ow = w / p.stride_w;
      if (w < 0 || w % p.stride_w || ow >= p.OW) continue;
      for (int64_t co = co0; co < co0 + filters; ++co) {
        typename Sum<T>::type d = element<T>(args.w, co, ci % channels, kh, kw) - x;
        d = d < -1 ? -1 : d > 1 ? 1 : d;  // a NaN compares false twice and stays
        sum += element<T>(args.grad_y, n, co, oh, ow) * d;
      }
      if (sum != sum) return sum;
    }
  }
  return sum;
}

template <typename T>
ADDEROPS_SHARED_CODE typename Sum<T>::type grad_w(const Conv2dArgs& args, int64_t co, int64_t ci, int64_t kh,
                                                  int64_t kw) {
  const Conv2dProblem& p = args.problem;
  const int64_t channels = p.C_in / p.groups, c = co / (p.C_out / p.groups) * channels + ci;
  const typename Sum<T>::type w = element<T>(args.w, co, ci, kh, kw);
  typename Sum<T>::type sum = 0;
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t oh = 0; oh < p.OH; ++oh) {
      const int64_t ih = oh * p.stride_h + kh * p.dilation_h - p.pad_top;
      for (int64_t ow = 0; ow < p.OW; ++ow) {
        const int64_t iw = ow * p.stride_w + kw * p.dilation_w - p.pad_left;
        const bool inside = ih >= 0 && ih < p.H && iw >= 0 && iw < p.W;
        const typename Sum<T>::type x = inside ? element<T>(args.x, n, c, ih, iw) : 0;
        sum += element<T>(args.grad_y, n, co, oh, ow) * (x - w);
      }
      if (sum != sum) return sum;
    }
  return sum;
}

}  // namespace definition
}  // namespace adderops
