// The kernels for AVX2 and FMA.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define ISA_HEADER "isa/avx2.h"
#include "kernels/passes.h"
const adderops::cpu::Kernels adderops::cpu::kAvx2Kernels = passes("avx2");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
