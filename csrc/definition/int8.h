// The int8 adder convolution, one output element at a time, straight from the formula in args/int8.h.
#pragma once
#include "../args/int8.h"

namespace adderops {
namespace definition {

// The sum of |x - w|: -Y.
ADDEROPS_SHARED_CODE int32_t int8_sum(const Int8Args& args, int64_t n, int64_t co, int64_t oh, int64_t ow) {
  const Conv2dProblem& p = args.problem;
  const int64_t channels = p.C_in / p.groups, c0 = co / (p.C_out / p.groups) * channels;
  const uint8_t* w = args.w + co * p.KH * p.KW * channels;
  int32_t sum = 0;
  for (int64_t kh = 0; kh < p.KH; ++kh)
    for (int64_t kw = 0; kw < p.KW; ++kw, w += channels) {
      const int64_t ih = oh * p.stride_h + kh * p.dilation_h - p.pad_top;
      const int64_t iw = ow * p.stride_w + kw * p.dilation_w - p.pad_left;
      const bool inside = ih >= 0 && ih < p.H && iw >= 0 && iw < p.W;
      const uint8_t* x = args.x + ((n * p.H + ih) * p.W + iw) * p.C_in + c0;
      for (int64_t ci = 0; ci < channels; ++ci) {
        const int32_t d = (inside ? x[ci] : args.padding) - w[ci];
        sum += d < 0 ? -d : d;
      }
    }
  return sum;
}

// The epilogue: z, its byte, and the output at element `at` of y.
ADDEROPS_SHARED_CODE float int8_float(const Int8Args& args, int32_t sum, float scale, float offset, float residual) {
  float z = offset - scale * static_cast<float>(sum);
  if (args.residual) z = z + args.residual_scale * residual;
  return z < args.least ? args.least : z;
}
ADDEROPS_SHARED_CODE uint8_t int8_byte(const Int8Args& args, float z) {
  return rounded_byte(z < args.most ? z : args.most);
}
ADDEROPS_SHARED_CODE void int8_finish(const Int8Args& args, int32_t sum, int64_t co, int64_t at) {
  if (args.output == Int8Output::kSums) {
    static_cast<int32_t*>(args.y)[at] = -sum;
    return;
  }
  const float residual = !args.residual        ? 0.f
                         : args.float_residual ? static_cast<const float*>(args.residual)[at]
                                               : static_cast<float>(static_cast<const uint8_t*>(args.residual)[at]);
  const float z = int8_float(args, sum, args.scale[co], args.offset[co], residual);
  if (args.output == Int8Output::kFloat32)
    static_cast<float*>(args.y)[at] = z;
  else
    static_cast<uint8_t*>(args.y)[at] = int8_byte(args, z);
}

}  // namespace definition
}  // namespace adderops
