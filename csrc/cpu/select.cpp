// Picks the instruction set: the processor is asked once, ADDEROPS_CPU_ISA at every call.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace adderops {
namespace cpu {

const Kernels* const* available_kernels(int* count) {
  static const Kernels* all[3];
  static const int found = [] {
    int n = 0;
#if defined(__x86_64__)
    all[n++] = &kSse2Kernels;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2) all[n++] = &kAvx2Kernels;
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
      all[n++] = &kAvx512Kernels;
#elif defined(__aarch64__)
    all[n++] = &kNeonKernels;
#else
    all[n++] = &kGenericKernels;
#endif
    return n;
  }();
  *count = found;
  return all;
}

const Kernels* selected_kernels() {
  int count = 0;
  const Kernels* const* all = available_kernels(&count);
  const char* name = std::getenv("ADDEROPS_CPU_ISA");
  if (!name || !*name) return all[count - 1];
  for (int i = 0; i < count; ++i)
    if (!std::strcmp(all[i]->name, name)) return all[i];
  return nullptr;
}

}  // namespace cpu
}  // namespace adderops
