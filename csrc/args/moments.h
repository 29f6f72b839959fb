// Arguments of the first and second moments of two feature maps of one shape, concatenated over their channels.
//
//   z[p, :] = [phi(scale[0] * student[p, :]) - centre[0], phi(scale[1] * teacher[p, :]) - centre[1]],  p = (n, h, w)
//   phi = exp with the exponent clamped to at most 10, or the identity
#pragma once
#include "tensor.h"

namespace adderops {

// float32 throughout; D = 2C.
//   moments:  student, teacher -> mean (D), second (D, D), each divided by the number of pixels
//   gradient: student, teacher, weights (D + 1, C) -> out[p, c] = (weights[D, c] + sum_j weights[j, c] z[p, j]) * phi'
//   abs_sum:  student -> mean (N), sum |student| of each image
struct MomentsArgs {
  int64_t N, C, H, W;
  Operand student, teacher, out;
  float scale[2], centre[2];
  bool exponential;
  float *mean, *second;
  const float* weights;
};

}  // namespace adderops
