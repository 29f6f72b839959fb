// Arguments of the int8 adder convolution.  x and w share one scale, so their bytes are compared directly.
//
//   Y[n, co, oh, ow] = -sum over (ci, kh, kw) of |X[n, ci, ih, iw] - W[co, ci, kh, kw]|        exact, int32
//   z = (offset[co] + scale[co] * Y) + residual_scale * residual                               float32, in this order
//   y = Y, or max(z, least), or min(max(z, least), most) rounded to uint8, ties to even; a NaN becomes `most`
// X is `padding` outside [0,H) x [0,W).  Letters as in args/conv2d.h.
#pragma once
#include "../definition/elements.h"
#include "conv2d.h"

namespace adderops {

enum class Int8Output : int { kSums, kFloat32, kUInt8 };

// Every tensor is dense and channels_last.
struct Int8Args {
  Conv2dProblem problem;
  const uint8_t* x;             // (N, H, W, C_in)
  const uint8_t* w;             // (C_out, KH, KW, C_in/groups)
  void* y;                      // (N, OH, OW, C_out): int32, float32 or uint8
  const void* residual;         // (N, OH, OW, C_out), uint8 or float32, or null
  const float *scale, *offset;  // (C_out); null for sums
  bool float_residual;          // else uint8
  float residual_scale, least, most;
  uint8_t padding;
  Int8Output output;
};

// Sets the bounds of z.  A uint8 y lies in [0, quant_max].  ReLU is a maximum with the zero point, which is 0 for a
// float y.
ADDEROPS_SHARED_CODE void set_epilogue_bounds(Int8Args* args, bool relu, int32_t zero_point, int32_t quant_max) {
  const bool to_bytes = args->output == Int8Output::kUInt8;
  const float minus_infinity = float_from_bits(0xff800000u);
  args->least = relu ? (to_bytes ? float(zero_point) : 0.f) : to_bytes ? 0.f : minus_infinity;
  args->most = float(quant_max);
}

}  // namespace adderops
