// What every machine of the architecture has, 4 lanes: SSE2 on x86-64, NEON on AArch64 (there with FMA and 32
// registers), elsewhere whatever the compiler makes of its vector extensions.
#define SIMD_BYTES 16
#if defined(__aarch64__)
#define SIMD_NAME "neon"
#define SIMD_KERNELS kNeonKernels
#else
#define SIMD_NAME "baseline"
#define SIMD_KERNELS kBaselineKernels
#endif
#include "kernels_simd.inc"
