// The tile that sums outer products over pixels:   G[i, k] (+)= sum_q a[q, i] * b[q, k]
// grad_w.h uses it with a = dY, b = X; moments.h with a = b = Z.
//
//                 k: NV vectors ->          a pixel is NV loads of b, which the rows share, kOuterRows broadcasts
//   row 0      [ accumulators ]             of a, and kOuterRows*NV fused multiply-adds.
//   row 1      [ ...          ]             32 registers: 8 x 3;  16 registers: 4 x 2.
//   kOuterRows [ ...          ]
//
//   a     kOuterRows contiguous floats per pixel, a_pitch floats per pixel
//   b     b[q] + offset, NV vectors per pixel
//   g     row i at g + i * g_pitch
#pragma once
#include "vector.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kOuterRows = kRegisters == 32 ? 8 : 4;
constexpr int kOuterVectors = kRegisters == 32 ? 3 : 2;

template <int NV>
__attribute__((noinline)) void outer_product_tile(const float* a, int64_t a_pitch, const float* const* b,
                                                  int64_t offset, int64_t pixels, float* g, int64_t g_pitch,
                                                  bool first) {
  constexpr int MR = kOuterRows;
  vf c[MR][NV];
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) c[i][j] = vf{};
  for (int64_t q = 0; q < pixels; ++q, a += a_pitch) {
    const float* p = b[q] + offset;
    vf v[NV];
    UNROLL_FOR (j, NV) v[j] = load(p + j * kW);
    UNROLL_FOR (i, MR)
      UNROLL_FOR (j, NV) c[i][j] = fused_of(a + i, v[j], c[i][j]);
  }
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) {
      float* at = g + i * g_pitch + j * kW;
      store(at, first ? c[i][j] : load(at) + c[i][j]);
    }
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
