// Vectors of four floats as far as the compiler's vector extensions serve every architecture: the common part of
// sse2.h, neon.h and generic.h.
#pragma once
#include <stdint.h>

#include "compiler.h"

namespace adderops {
namespace cpu {
namespace {

typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint8_t vb __attribute__((vector_size(16)));
typedef uint8_t vb_quarter __attribute__((vector_size(4)));
typedef float vf_unaligned __attribute__((vector_size(16), aligned(4), may_alias));

constexpr int kW = 4;

ALWAYS_INLINE vf splat(float v) { return v - vf{}; }  // v - 0, not 0 + v: keeps -0
ALWAYS_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_unaligned*>(p); }
ALWAYS_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_unaligned*>(p) = v; }
ALWAYS_INLINE vf load_n(const float* p, int64_t n) {
  vf v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
ALWAYS_INLINE void store_n(float* p, vf v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}
ALWAYS_INLINE vi widened(const uint16_t* p) {
  typedef uint16_t vh __attribute__((vector_size(8)));
  vh v;
  __builtin_memcpy(&v, p, sizeof(v));
  return __builtin_convertvector(v, vi);
}

ALWAYS_INLINE vf accumulate(vf sum, vf v) { return sum + v; }
template <bool Multiplier>
ALWAYS_INLINE vf difference(vf a, vf b) {
  return a - b;
}

ALWAYS_INLINE vf even_lanes(vf a, vf b) { return SHUFFLE(a, b, 0, 2, 4, 6); }

ALWAYS_INLINE void transpose(vf v[kW]) {
  const vf a = SHUFFLE(v[0], v[1], 0, 4, 1, 5), b = SHUFFLE(v[0], v[1], 2, 6, 3, 7);
  const vf c = SHUFFLE(v[2], v[3], 0, 4, 1, 5), d = SHUFFLE(v[2], v[3], 2, 6, 3, 7);
  v[0] = SHUFFLE(a, c, 0, 1, 4, 5), v[1] = SHUFFLE(a, c, 2, 3, 6, 7);
  v[2] = SHUFFLE(b, d, 0, 1, 4, 5), v[3] = SHUFFLE(b, d, 2, 3, 6, 7);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
