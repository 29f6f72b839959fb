// Arguments of the adder convolution and its training gradients.
//
// Letters, used everywhere:  Y[n, co, oh, ow] = -sum over (ci, kh, kw) of |X[n, ci, ih, iw] - W[co, ci, kh, kw]|
//   with ih = oh*stride_h + kh*dilation_h - pad_top and iw likewise; X is zero outside [0,H) x [0,W).
// As a matrix: M = C_out, P = N*OH*OW, K = C_in/groups*KH*KW.
#pragma once
#include "tensor.h"

namespace adderops {

struct Conv2dProblem {
  int64_t N, C_in, H, W;
  int64_t C_out, KH, KW;
  int64_t OH, OW;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;  // the other two sides follow from OH and OW
  int64_t dilation_h, dilation_w;
  int64_t groups;
};

// Everything one pass reads and writes.
//   forward: x, w, bias -> out = Y        grad_x: grad_y, x, w -> out        grad_w: grad_y, x, w -> out
struct Conv2dArgs {
  Conv2dProblem problem;
  ElementType type;
  Operand x, w, grad_y, out;
  const void* bias;  // C_out elements or null; forward only
};

}  // namespace adderops
