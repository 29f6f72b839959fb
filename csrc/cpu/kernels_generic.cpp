// The kernels for all other architectures, as the compiler's vector extensions make them.
#if !defined(__x86_64__) && !defined(__aarch64__)
#define ISA_HEADER "isa/generic.h"
#include "kernels/passes.h"
const adderops::cpu::Kernels adderops::cpu::kGenericKernels = passes("baseline");
#endif
