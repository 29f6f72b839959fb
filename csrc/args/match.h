// Arguments of the loss of L_mid between two layers of w rows (output channels of their 1x1 convolutions) each, for all
// layers with these numbers of channels.  D = C_a + C_c; mixed = W cov, row by row; of a row r,
//
//   var_a = max(<mixed_a[r, :C_a], w_a[r]>, 0)    cov_ac = <mixed_a[r, C_a:], w_c[r]>
//   var_c = max(<mixed_c[r, C_a:], w_c[r]>, 0)    inv = 1 / sqrt(var + eps)
//   term  = var_a inv_a^2 + var_c inv_c^2 - 2 cov_ac inv_a inv_c
//
// and with g = the derivative of the layer's mean term by var_a (g_a), var_c (g_c), cov_ac (g_ac); a variance that was
// clamped has none:
//
//   mix[r, :]    = [2 g_a w_a[r] | g_ac w_c[r]]                          the student's columns of the gradient by cov are
//   grad_w_a[r]  = 2 g_a mixed_a[r, :C_a] + g_ac mixed_c[r, :C_a]        W_a^T mix
//   grad_w_c[r]  = 2 g_c mixed_c[r, C_a:] + g_ac mixed_a[r, C_a:]
#pragma once
#include "tensor.h"

namespace adderops {

// float32, dense.
struct MatchArgs {
  int64_t layers, rows, C_a, C_c;
  float eps;
  const float *mixed_a, *mixed_c;  // (layers, rows, D)
  const float *w_a, *w_c;          // (layers, rows, C_a), (layers, rows, C_c)
  float *terms, *var_c;            // (layers): means over the rows
  float *mix, *grad_w_a, *grad_w_c;
};

}  // namespace adderops
