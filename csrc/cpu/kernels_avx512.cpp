// AVX-512 (F, BW, DQ, VL): 16 lanes, 32 registers.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define SIMD_BYTES 64
#define SIMD_NAME "avx512"
#define SIMD_KERNELS kAvx512Kernels
#include "kernels_simd.inc"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
