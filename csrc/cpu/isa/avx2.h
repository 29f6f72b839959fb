// AVX2 and FMA: 8 lanes, 16 registers.  isa.h says what each function does.
#pragma once
#include <immintrin.h>
#include <stdint.h>

#include "compiler.h"

namespace adderops {
namespace cpu {
namespace {

typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint8_t vb __attribute__((vector_size(32)));
typedef uint8_t vb_quarter __attribute__((vector_size(8)));

constexpr int kW = 8;
constexpr int kRegisters = 16;
constexpr int kRun = 8;  // vpsadbw sums to every 64 bits

ALWAYS_INLINE __m256i lanes_below(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

ALWAYS_INLINE vf splat(float v) { return _mm256_set1_ps(v); }
ALWAYS_INLINE vf load(const float* p) { return _mm256_loadu_ps(p); }
ALWAYS_INLINE void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
ALWAYS_INLINE vf load_n(const float* p, int64_t n) { return _mm256_maskload_ps(p, lanes_below(n)); }
ALWAYS_INLINE void store_n(float* p, vf v, int64_t n) { _mm256_maskstore_ps(p, lanes_below(n), v); }
ALWAYS_INLINE void stream(float* p, vf v) { _mm256_stream_ps(p, v); }
ALWAYS_INLINE void fence() { _mm_sfence(); }
ALWAYS_INLINE vi widened(const uint16_t* p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }

ALWAYS_INLINE vf minimum(vf a, vf b) { return _mm256_min_ps(a, b); }
ALWAYS_INLINE vf fused(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS_INLINE vf minimum_of(const float* p, vf b) { return minimum(splat(*p), b); }
ALWAYS_INLINE vf fused_of(const float* p, vf b, vf c) { return fused(splat(*p), b, c); }
ALWAYS_INLINE vf accumulate(vf sum, vf v) { return sum + v; }  // older AVX2 machines add on ports of their own

template <bool Multiplier>
ALWAYS_INLINE vf difference(vf a, vf b) {
  return a - b;
}

// On the bits of a float, signed min with 1 and then unsigned min with -1 is the clamp: integer minima run on more
// ports than float minima do.
ALWAYS_INLINE vf clamp_unit(vf z) {
  const __m256i one = _mm256_set1_epi32(0x3f800000), minus_one = _mm256_set1_epi32((int)0xbf800000u);
  return (vf)_mm256_min_epu32(_mm256_min_epi32((__m256i)z, one), minus_one);
}

ALWAYS_INLINE bool any(vi mask) { return _mm256_movemask_ps((__m256)mask) != 0; }

ALWAYS_INLINE vf even_lanes(vf a, vf b) { return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14); }

// 4x4 squares within 128 bits first, then the 128-bit parts themselves.
ALWAYS_INLINE void transpose(vf v[kW]) {
  vf t[kW];
  UNROLL_FOR (square, kW / 4) {
    const int i = 4 * square;
    const vf a = SHUFFLE(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    const vf b = SHUFFLE(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    const vf c = SHUFFLE(v[i + 2], v[i + 3], 0, 8, 1, 9, 4, 12, 5, 13);
    const vf d = SHUFFLE(v[i + 2], v[i + 3], 2, 10, 3, 11, 6, 14, 7, 15);
    t[i] = SHUFFLE(a, c, 0, 1, 8, 9, 4, 5, 12, 13);
    t[i + 1] = SHUFFLE(a, c, 2, 3, 10, 11, 6, 7, 14, 15);
    t[i + 2] = SHUFFLE(b, d, 0, 1, 8, 9, 4, 5, 12, 13);
    t[i + 3] = SHUFFLE(b, d, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  UNROLL_FOR (i, 4) {
    v[i] = SHUFFLE(t[i], t[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = SHUFFLE(t[i], t[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

ALWAYS_INLINE vb splat_run(const uint8_t* p) {
  int64_t v;
  __builtin_memcpy(&v, p, 8);
  return (vb)_mm256_set1_epi64x(v);
}
ALWAYS_INLINE vi add_distances(vi sum, vb a, vb b) {
  return (vi)_mm256_add_epi32((__m256i)sum, _mm256_sad_epu8((__m256i)a, (__m256i)b));
}
ALWAYS_INLINE vi join_parts(const vi* parts) { return (vi)even_lanes((vf)parts[0], (vf)parts[1]); }

ALWAYS_INLINE vi rounded(vf z) { return (vi)_mm256_cvtps_epi32(z); }
ALWAYS_INLINE vb_quarter low_bytes(vi v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  const __m128i bytes = _mm_packus_epi16(words, words);
  vb_quarter low;
  __builtin_memcpy(&low, &bytes, sizeof(low));
  return low;
}

// Packs of pairs put a vector's bytes into every 128 bits.
ALWAYS_INLINE void store_low_bytes(uint8_t* p, int64_t pitch, const vi (&v)[4]) {
  const __m256i pairs[2] = {_mm256_packs_epi32((__m256i)v[0], (__m256i)v[1]),
                            _mm256_packs_epi32((__m256i)v[2], (__m256i)v[3])};
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(pairs[0], pairs[1]), order);
  const __m128 first = (__m128)_mm256_castsi256_si128(bytes), second = (__m128)_mm256_extracti128_si256(bytes, 1);
  _mm_storel_pi((__m64*)p, first), _mm_storeh_pi((__m64*)(p + pitch), first);
  _mm_storel_pi((__m64*)(p + 2 * pitch), second), _mm_storeh_pi((__m64*)(p + 3 * pitch), second);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
