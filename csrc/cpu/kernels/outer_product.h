// The tile that sums outer products over pixels:   G[i, k] (+)= sum_q a[q, i] * b[q, k]
// grad_w.h uses it with a = dY, b = X; moments.h with a = b = Z.
//
//   a     kOuterRows contiguous floats per pixel, pixels a_pitch floats apart
//   b     NV vectors per pixel, at b[q] + offset
//   g     row i at g + i * g_pitch
//
//           b[q]         [ vector 0 | ... | vector NV-1 ]    NV loads per pixel, shared by the rows
//   a[q, 0]   broadcast  [ accumulators                 ]    1 broadcast and NV fma per pixel and row
//   a[q, 1]   broadcast  [                              ]
//   ...                  [                              ]    32 registers: 8 x 3;  16 registers: 4 x 2.
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
