// AVX2 and FMA: 8 lanes, 16 registers.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define SIMD_BYTES 32
#define SIMD_NAME "avx2"
#define SIMD_KERNELS kAvx2Kernels
#include "kernels_simd.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
