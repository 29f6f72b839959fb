// Arguments of the moments that distillation matches, of one layer: the outputs of a student's and of a teacher's layer,
// of the same images and size, concatenated over their channels; D = C_a + C_c.
//
//   z[p, :] = [phi(scale_a * student[p, :]) - centre_a, phi(scale_c * teacher[p, :]) - centre_c],  p = (n, h, w)
//   phi = exp with the exponent clamped to at most 10, or the identity
#pragma once
#include "tensor.h"

namespace adderops {

// Two in each array: of the student (a) and of the teacher (c).
//   moments:  y -> out[j, k] = mean over p of z[p, j] z[p, k], and out[D, k] = mean over p of z[p, k]
//   gradient: y, grad (D + 1, D), which is that of `out` -> grad_y, of the student's type:
//             grad_y[p, c] = scale_a / P * phi' * (grad[D, c] + sum over j of (grad[j, c] + grad[c, j]) z[p, j])
struct MomentsArgs {
  int64_t N, C[2], H, W;
  ElementType type[2];
  Operand y[2];
  const float* scale[2];  // one number each, on the device of y
  float centre[2];
  bool exponential;
  float* out;  // (D + 1, D)
  const float* grad;
  Operand grad_y;
};

// out = mean |x|
struct MeanAbsArgs {
  int64_t N, C, H, W;
  ElementType type;
  Operand x;
  float* out;  // one number
};

}  // namespace adderops
