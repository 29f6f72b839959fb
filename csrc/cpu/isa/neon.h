// NEON, which every AArch64 has: 4 lanes, 32 registers, FMA.  isa.h says what each function does.
#pragma once
#include <arm_neon.h>

#include "../../definition/elements.h"
#include "four_lanes.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kRegisters = 32;
constexpr int kRun = 4;

ALWAYS_INLINE void stream(float* p, vf v) { store(p, v); }
ALWAYS_INLINE void fence() {}

ALWAYS_INLINE vf minimum(vf a, vf b) { return (vf)vminq_f32((float32x4_t)a, (float32x4_t)b); }
ALWAYS_INLINE vf fused(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
ALWAYS_INLINE vf minimum_of(const float* p, vf b) { return minimum(splat(*p), b); }
ALWAYS_INLINE vf fused_of(const float* p, vf b, vf c) { return fused(splat(*p), b, c); }
ALWAYS_INLINE vf clamp_unit(vf z) {
  return (vf)vminq_f32(vmaxq_f32((float32x4_t)z, vdupq_n_f32(-1.f)), vdupq_n_f32(1.f));
}
ALWAYS_INLINE bool any(vi mask) {
  int32_t hit = 0;
  for (int i = 0; i < kW; ++i) hit |= mask[i];
  return hit != 0;
}

ALWAYS_INLINE vb splat_run(const uint8_t* p) {
  int32_t v;
  __builtin_memcpy(&v, p, 4);
  return (vb)(v - vi{});
}
ALWAYS_INLINE vi add_distances(vi sum, vb a, vb b) {
  return (vi)vpadalq_u16((uint32x4_t)sum, vpaddlq_u8(vabdq_u8((uint8x16_t)a, (uint8x16_t)b)));
}
ALWAYS_INLINE vi join_parts(const vi* parts) { return parts[0]; }

ALWAYS_INLINE vi rounded(vf z) { return (vi)(z + splat(kRoundingOffset)); }
ALWAYS_INLINE vb_quarter low_bytes(vi v) { return __builtin_convertvector(v, vb_quarter); }
ALWAYS_INLINE void store_low_bytes(uint8_t* p, int64_t pitch, const vi (&v)[4]) {
  UNROLL_FOR (i, 4) {
    const vb_quarter bytes = low_bytes(v[i]);
    __builtin_memcpy(p + i * pitch, &bytes, sizeof(bytes));
  }
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
