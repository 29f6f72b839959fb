// The contract between the CPU binding and the kernels of one instruction set.
//
// A pass is a short list of stages; the tasks of a stage are independent, write disjoint memory and may run on any
// thread in any order; a stage starts when the one before it has ended.  What a task computes depends on the problem
// alone, never on the number of threads: that is what makes results bitwise equal for any thread count.
// Kernels allocate nothing: the binding hands them `shared` (one block for the call) and `worker` (one per thread).
#pragma once
#include "../args/conv2d.h"
#include "../args/int8.h"
#include "../args/moments.h"
#include "../args/quantize.h"

namespace adderops {
namespace cpu {

// What a call needs, and who computes it: a pass chooses among kernels, and the plain loops are one of them.  Sizes
// that no machine has are kTooLarge (sizes.h).
template <typename Args>
struct Plan {
  int64_t shared_bytes;
  int64_t worker_bytes;
  int stages;
  int64_t tasks[3];
  void (*run)(const Args&, int stage, int64_t task, char* shared, char* worker);
};

template <typename Args>
using Pass = Plan<Args> (*)(const Args&);

struct Kernels {
  const char* name;
  Pass<Conv2dArgs> forward, grad_x, grad_w;
  Pass<Int8Args> int8;
  Pass<QuantizeArgs> quantize;
  Pass<MomentsArgs> moments, moments_gradient, abs_sum;  // float32 alone: none among the definitions
};

// Plain loops over the definition: float64, and the yardstick of the others.
extern const Kernels kDefinitionKernels;

// float32, bfloat16 and float16 by SIMD; one source (simd.inc, forward.h, ...), compiled once an instruction set.
#if defined(__x86_64__)
extern const Kernels kBaselineKernels, kAvx2Kernels, kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#else
extern const Kernels kBaselineKernels;
#endif

// The instruction sets that this machine runs, weakest first; `count` receives how many.
const Kernels* const* available_kernels(int* count);

// The one to use now: the strongest, or the one named by ADDEROPS_CPU_ISA; null if that name is not available here.
const Kernels* selected_kernels();

}  // namespace cpu
}  // namespace adderops
