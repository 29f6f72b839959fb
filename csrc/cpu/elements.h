// bfloat16 and float16 as 16-bit patterns, converted by integer arithmetic that every compiler vectorises.
// Rounding is to nearest, ties to even; infinities stay, NaNs stay quiet NaNs.
// Static functions only: every instruction set compiles its own copy.
#pragma once
#include <stdint.h>

namespace adderops {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
static inline uint32_t bits_from_float(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

static inline float to_float(float v) { return v; }
static inline double to_float(double v) { return v; }
static inline float to_float(BFloat16 v) { return float_from_bits(uint32_t(v.bits) << 16); }
static inline float to_float(Float16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal, exactly.
  const float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return float_from_bits(sign | (magnitude >= 0x7c00u ? special : bits_from_float(scaled)));
}

static inline void from_float(float v, float* out) { *out = v; }
static inline void from_float(double v, double* out) { *out = v; }
static inline void from_float(float v, BFloat16* out) {
  const uint32_t b = bits_from_float(v);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  out->bits = uint16_t((b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded);
}
static inline void from_float(float v, Float16* out) {
  const uint32_t b = bits_from_float(v), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 leaves the subnormal mantissa, already rounded, in the low bits.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out->bits = uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite));
}

}  // namespace adderops
