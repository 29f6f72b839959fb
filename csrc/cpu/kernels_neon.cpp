// The kernels for NEON: what every AArch64 has.
#if defined(__aarch64__)
#define ISA_HEADER "isa/neon.h"
#include "kernels/passes.h"
const adderops::cpu::Kernels adderops::cpu::kNeonKernels = passes("neon");
#endif
