// SSE2, which every x86-64 has: 4 lanes, 16 registers, no FMA.  isa.h says what each function does.
#pragma once
#include <immintrin.h>

#include "four_lanes.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kRegisters = 16;
constexpr int kRun = 8;  // psadbw sums to every 64 bits

ALWAYS_INLINE void stream(float* p, vf v) { _mm_stream_ps(p, v); }
ALWAYS_INLINE void fence() { _mm_sfence(); }

ALWAYS_INLINE vf minimum(vf a, vf b) { return _mm_min_ps(a, b); }
ALWAYS_INLINE vf fused(vf a, vf b, vf c) { return a * b + c; }
ALWAYS_INLINE vf minimum_of(const float* p, vf b) { return minimum(splat(*p), b); }
ALWAYS_INLINE vf fused_of(const float* p, vf b, vf c) { return fused(splat(*p), b, c); }
ALWAYS_INLINE vf clamp_unit(vf z) { return _mm_min_ps(_mm_max_ps(z, _mm_set1_ps(-1.f)), _mm_set1_ps(1.f)); }
ALWAYS_INLINE bool any(vi mask) { return _mm_movemask_ps((__m128)mask) != 0; }

ALWAYS_INLINE vb splat_run(const uint8_t* p) {
  int64_t v;
  __builtin_memcpy(&v, p, 8);
  return (vb)_mm_set1_epi64x(v);
}
ALWAYS_INLINE vi add_distances(vi sum, vb a, vb b) {
  return (vi)_mm_add_epi32((__m128i)sum, _mm_sad_epu8((__m128i)a, (__m128i)b));
}
ALWAYS_INLINE vi join_parts(const vi* parts) { return (vi)even_lanes((vf)parts[0], (vf)parts[1]); }

ALWAYS_INLINE vi rounded(vf z) { return (vi)_mm_cvtps_epi32(z); }
ALWAYS_INLINE vb_quarter low_bytes(vi v) {
  const __m128i words = _mm_packs_epi32((__m128i)v, (__m128i)v);
  const __m128i bytes = _mm_packus_epi16(words, words);
  vb_quarter low;
  __builtin_memcpy(&low, &bytes, sizeof(low));
  return low;
}
ALWAYS_INLINE void store_low_bytes(uint8_t* p, int64_t pitch, const vi (&v)[4]) {
  UNROLL_FOR (i, 4) {
    const vb_quarter bytes = low_bytes(v[i]);
    __builtin_memcpy(p + i * pitch, &bytes, sizeof(bytes));
  }
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
