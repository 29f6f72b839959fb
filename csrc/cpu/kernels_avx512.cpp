// The kernels for AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#define ISA_HEADER "isa/avx512.h"
#include "kernels/passes.h"
const adderops::cpu::Kernels adderops::cpu::kAvx512Kernels = passes("avx512");
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
