// The kernels for SSE2: what every x86-64 has.
#if defined(__x86_64__)
#define ISA_HEADER "isa/sse2.h"
#include "kernels/passes.h"
const adderops::cpu::Kernels adderops::cpu::kSse2Kernels = passes("baseline");
#endif
