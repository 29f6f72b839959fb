// AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers.  isa.h says what each function does.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "compiler.h"

namespace adderops {
namespace cpu {
namespace {

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint8_t vb __attribute__((vector_size(64)));
typedef uint8_t vb_quarter __attribute__((vector_size(16)));

constexpr int kW = 16;
constexpr int kRegisters = 32;
constexpr int kRun = 8;  // vpsadbw sums to every 64 bits

ALWAYS_INLINE vf splat(float v) { return _mm512_set1_ps(v); }
ALWAYS_INLINE vf load(const float* p) { return _mm512_loadu_ps(p); }
ALWAYS_INLINE void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
ALWAYS_INLINE vf load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p); }
ALWAYS_INLINE void store_n(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), v); }
ALWAYS_INLINE void stream(float* p, vf v) { _mm512_stream_ps(p, v); }
ALWAYS_INLINE void fence() { _mm_sfence(); }
ALWAYS_INLINE vi widened(const uint16_t* p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }

ALWAYS_INLINE vf minimum(vf a, vf b) { return _mm512_min_ps(a, b); }
ALWAYS_INLINE vf fused(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }

// The arithmetic instruction broadcasts for free, where a separate vbroadcastss takes a slot of the vector ports;
// compilers hoist the broadcast out, hence the assembly.
ALWAYS_INLINE vf minimum_of(const float* p, vf b) {
  vf r;
  __asm__("vminps %2%{1to16%}, %1, %0" : "=v"(r) : "v"(b), "m"(*p));
  return r;
}
ALWAYS_INLINE vf fused_of(const float* p, vf b, vf c) {
  __asm__("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(c) : "v"(b), "m"(*p));
  return c;
}

// sum + v*1, the same value: minima and additions share their ports on AMD's Zen 4; on Intel it makes no difference.
ALWAYS_INLINE vf accumulate(vf sum, vf v) { return fused(v, splat(1.f), sum); }

template <bool Multiplier>
ALWAYS_INLINE vf difference(vf a, vf b) {
  if (Multiplier) return _mm512_fmsub_ps(a, splat(1.f), b);
  return a - b;
}

// One instruction: the operand of smaller magnitude, with the sign of the first.
ALWAYS_INLINE vf clamp_unit(vf z) { return _mm512_range_ps(z, _mm512_set1_ps(1.f), 0x2); }

ALWAYS_INLINE bool any(vi mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }

ALWAYS_INLINE vf even_lanes(vf a, vf b) {
  return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}

// 4x4 squares within 128 bits first, then the 128-bit parts themselves.
ALWAYS_INLINE void transpose(vf v[kW]) {
  vf t[kW];
  UNROLL_FOR (square, kW / 4) {
    const int i = 4 * square;
    const vf a = SHUFFLE(v[i], v[i + 1], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    const vf b = SHUFFLE(v[i], v[i + 1], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    const vf c = SHUFFLE(v[i + 2], v[i + 3], 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
    const vf d = SHUFFLE(v[i + 2], v[i + 3], 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    t[i] = SHUFFLE(a, c, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    t[i + 1] = SHUFFLE(a, c, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    t[i + 2] = SHUFFLE(b, d, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    t[i + 3] = SHUFFLE(b, d, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  UNROLL_FOR (i, 4) {
    const vf a = SHUFFLE(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const vf b = SHUFFLE(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    const vf c = SHUFFLE(t[i + 8], t[i + 12], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    const vf d = SHUFFLE(t[i + 8], t[i + 12], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    v[i] = SHUFFLE(a, c, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    v[i + 8] = SHUFFLE(a, c, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    v[i + 4] = SHUFFLE(b, d, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
    v[i + 12] = SHUFFLE(b, d, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
}

ALWAYS_INLINE vb splat_run(const uint8_t* p) {
  int64_t v;
  __builtin_memcpy(&v, p, 8);
  return (vb)_mm512_set1_epi64(v);
}
ALWAYS_INLINE vi add_distances(vi sum, vb a, vb b) {
  return (vi)_mm512_add_epi32((__m512i)sum, _mm512_sad_epu8((__m512i)a, (__m512i)b));
}
ALWAYS_INLINE vi join_parts(const vi* parts) { return (vi)even_lanes((vf)parts[0], (vf)parts[1]); }

ALWAYS_INLINE vi rounded(vf z) { return (vi)_mm512_cvtps_epi32(z); }
ALWAYS_INLINE vb_quarter low_bytes(vi v) { return (vb_quarter)_mm512_cvtepi32_epi8((__m512i)v); }

// Packs of pairs put a vector's bytes into every 128 bits.
ALWAYS_INLINE void store_low_bytes(uint8_t* p, int64_t pitch, const vi (&v)[4]) {
  const __m512i pairs[2] = {_mm512_packs_epi32((__m512i)v[0], (__m512i)v[1]),
                            _mm512_packs_epi32((__m512i)v[2], (__m512i)v[3])};
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(pairs[0], pairs[1]));
  _mm_storeu_si128((__m128i*)p, _mm512_castsi512_si128(bytes));
  _mm_storeu_si128((__m128i*)(p + pitch), _mm512_extracti32x4_epi32(bytes, 1));
  _mm_storeu_si128((__m128i*)(p + 2 * pitch), _mm512_extracti32x4_epi32(bytes, 2));
  _mm_storeu_si128((__m128i*)(p + 3 * pitch), _mm512_extracti32x4_epi32(bytes, 3));
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
