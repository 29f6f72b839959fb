// What follows from the three sums of one row (args/match.h): its term and the derivatives of the term.
#pragma once
#include "elements.h"

namespace adderops {
namespace definition {

struct MatchedRow {
  float term, var_c;
  float g_a, g_c, g_ac;
};

ADDEROPS_SHARED_CODE float inverse_root(float v) {
#if defined(__CUDA_ARCH__)
  return 1.f / sqrtf(v);
#else
  return 1.f / __builtin_sqrtf(v);
#endif
}

// A NaN stays one.
ADDEROPS_SHARED_CODE MatchedRow matched_row(float var_a, float var_c, float cov_ac, float eps) {
  const bool clamped_a = var_a < 0, clamped_c = var_c < 0;
  if (clamped_a) var_a = 0;
  if (clamped_c) var_c = 0;
  const float a = inverse_root(var_a + eps), c = inverse_root(var_c + eps);
  const float correlation = cov_ac * a * c;
  MatchedRow row;
  row.term = var_a * (a * a) + var_c * (c * c) - 2 * correlation;
  row.var_c = var_c;
  row.g_a = clamped_a ? 0 : (eps * (a * a) + correlation) * (a * a);
  row.g_c = clamped_c ? 0 : (eps * (c * c) + correlation) * (c * c);
  row.g_ac = -2 * a * c;
  return row;
}

}  // namespace definition
}  // namespace adderops
