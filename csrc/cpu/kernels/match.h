// The terms of L_mid from covariances, and their gradient (args/match.h).  Task = one layer, row after row:
//
//   mixed_a[r]   [ C_a floats | C_c floats ]     three dot products, lane by lane, then over the lanes in order
//   mixed_c[r]   [ C_a floats | C_c floats ]     three combinations of two rows each, written
//
// The last lanes of a row are loaded and stored in part.
#pragma once
#include "../../args/match.h"
#include "../../definition/match.h"
#include "plan.h"
#include "vector.h"

namespace adderops {
namespace cpu {
namespace {

struct MatchShape {
  Layout shared, worker;  // none
};

inline float dot(const float* a, const float* b, int64_t count) {
  vf sums{};
  for (int64_t i = 0; i < count; i += kW) {
    const int64_t n = smaller(kW, count - i);
    sums += load_n(a + i, n) * load_n(b + i, n);
  }
  float sum = 0.f;
  for (int i = 0; i < kW; ++i) sum += sums[i];
  return sum;
}

// to = f * a + g * b;  without b, f * a
inline void combine(float f, const float* a, float g, const float* b, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kW) {
    const int64_t n = smaller(kW, count - i);
    const vf first = load_n(a + i, n) * splat(f);
    store_n(to + i, b ? first + load_n(b + i, n) * splat(g) : first, n);
  }
}

inline void match_layer(const MatchArgs& args, const MatchShape&, int64_t layer, char*, char*) {
  const int64_t C_a = args.C_a, C_c = args.C_c, D = C_a + C_c;
  const float inverse = 1.f / (float)args.rows;
  float term = 0.f, var_c = 0.f;
  for (int64_t r = layer * args.rows; r < (layer + 1) * args.rows; ++r) {
    const float *mixed_a = args.mixed_a + r * D, *mixed_c = args.mixed_c + r * D;
    const float *w_a = args.w_a + r * C_a, *w_c = args.w_c + r * C_c;
    const definition::MatchedRow row = definition::matched_row(dot(mixed_a, w_a, C_a), dot(mixed_c + C_a, w_c, C_c),
                                                               dot(mixed_a + C_a, w_c, C_c), args.eps);
    term += row.term, var_c += row.var_c;
    const float g_a = 2 * row.g_a * inverse, g_c = 2 * row.g_c * inverse, g_ac = row.g_ac * inverse;
    combine(g_a, w_a, 0.f, nullptr, C_a, args.mix + r * D);
    combine(g_ac, w_c, 0.f, nullptr, C_c, args.mix + r * D + C_a);
    combine(g_a, mixed_a, g_ac, mixed_c, C_a, args.grad_w_a + r * C_a);
    combine(g_c, mixed_c + C_a, g_ac, mixed_a + C_a, C_c, args.grad_w_c + r * C_c);
  }
  args.terms[layer] = term * inverse, args.var_c[layer] = var_c * inverse;
}

inline Plan<MatchArgs> match_plan(const MatchArgs& args) {
  return make_plan<MatchArgs, MatchShape, match_layer>({}, args.layers);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
