// The generic kernels, compiled for this machine, as the only instruction set.
#define ISA_HEADER "isa/generic.h"
#include "cpu/kernels/passes.h"

const adderops::cpu::Kernels* const* adderops::cpu::available_kernels(int* count) {
  static const Kernels generic = passes("generic"), *const all[] = {&generic};
  *count = 1;
  return all;
}
