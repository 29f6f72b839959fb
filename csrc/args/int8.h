// What a kernel of the int8 adder convolution knows.  Bytes compare as they are: one scale serves x and w.
//
//   Y[n, co, oh, ow] = -sum over (ci, kh, kw) of |X[n, ci, ih, iw] - W[co, ci, kh, kw]|        exact, int32
//   z = (offset[co] + scale[co] * Y) + residual_scale * residual                               float32, in this order
//   y = Y, or max(z, least), or the byte of min(max(z, least), most) rounded to nearest, ties to even; most for a NaN
// X is `padding` outside [0,H) x [0,W).  Letters as in conv2d_problem.h.
#pragma once
#include "../definition/elements.h"
#include "conv2d.h"

namespace adderops {

enum class Int8Output : int { kSums, kFloat32, kUInt8 };

// Every tensor in one piece, channels last.
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

// Images to bytes: round(x * inverse_scale) + zero_point, from 0 to quant_max, which a NaN becomes; x has any strides
// and float type.
struct QuantizeArgs {
  int64_t N, C, H, W;
  ElementType type;
  Operand x;
  uint8_t* y;  // (N, H, W, C)
  float inverse_scale;
  int32_t zero_point, quant_max;
};

// The nearest integer of -255 <= z <= 255, ties to even, in the low byte: a float32 of this size has the spacing 1.
constexpr float kRoundingOffset = 12582912.f;  // 1.5 * 2^23
ADDEROPS_SHARED_CODE uint8_t rounded_byte(float z) { return uint8_t(bits_from_float(z + kRoundingOffset)); }

}  // namespace adderops
