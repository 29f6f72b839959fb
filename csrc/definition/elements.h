// Conversions of elements.  bfloat16 and float16 are 16-bit patterns, converted by integer arithmetic that every
// compiler vectorises.  Rounding is to nearest, ties to even; infinities stay infinities, NaNs become quiet NaNs.
// Static functions only: each instruction set compiles its own copy.
#pragma once
#include "../args/tensor.h"

// Before a function that both the CPU and the kernels of a GPU call.
#if defined(__CUDACC__)
#define ADDEROPS_SHARED_CODE static __host__ __device__ inline
#else
#define ADDEROPS_SHARED_CODE static inline
#endif

namespace adderops {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

ADDEROPS_SHARED_CODE float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#endif
}
ADDEROPS_SHARED_CODE uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
#endif
}

ADDEROPS_SHARED_CODE float to_float(float v) { return v; }
ADDEROPS_SHARED_CODE double to_float(double v) { return v; }
ADDEROPS_SHARED_CODE float to_float(BFloat16 v) { return float_from_bits(uint32_t(v.bits) << 16); }
ADDEROPS_SHARED_CODE float to_float(Float16 v) {
#if defined(__CUDA_ARCH__)
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(v.bits));
  return value;
#else
  const uint32_t sign = uint32_t(v.bits & 0x8000u) << 16, magnitude = v.bits & 0x7fffu;
  // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal, exactly.
  const float scaled = float_from_bits(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude << 13);
  return float_from_bits(sign | (magnitude >= 0x7c00u ? special : bits_from_float(scaled)));
#endif
}

ADDEROPS_SHARED_CODE void from_float(float v, float* out) { *out = v; }
ADDEROPS_SHARED_CODE void from_float(double v, double* out) { *out = v; }
ADDEROPS_SHARED_CODE void from_float(float v, BFloat16* out) {
  const uint32_t b = bits_from_float(v);
  const uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  out->bits = uint16_t((b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded);
}
ADDEROPS_SHARED_CODE void from_float(float v, Float16* out) {
  const uint32_t b = bits_from_float(v), sign = (b >> 16) & 0x8000u, magnitude = b & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 leaves the subnormal mantissa, already rounded, in the low bits.
  const uint32_t subnormal = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  out->bits = uint16_t(sign | (magnitude >= 0x477ff000u ? special : finite));
}

// Rounds -255 <= z <= 255 to the nearest integer, ties to even, and returns its low byte: float32 numbers near
// kRoundingOffset are 1 apart.
constexpr float kRoundingOffset = 12582912.f;  // 1.5 * 2^23
ADDEROPS_SHARED_CODE uint8_t rounded_byte(float z) { return uint8_t(bits_from_float(z + kRoundingOffset)); }

}  // namespace adderops
