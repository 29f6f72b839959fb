// The contract between the CPU binding and the kernels of one instruction set.
//
// A pass plans its work once per call; execute.h runs the plan.  A plan has up to two stages.  The tasks of a stage
// are independent, write disjoint memory and may run on any thread in any order; the second stage starts when the first
// has ended.  What a task computes depends on the arguments alone, never on the number of threads: that makes results
// bitwise equal for any thread count.  Kernels allocate nothing: execute.h hands them a
// workspace, `shared` by all tasks of the call, and one per `worker` (thread).
#pragma once
#include "../args/conv2d.h"
#include "../args/int8.h"
#include "../args/integrate_and_fire.h"
#include "../args/match.h"
#include "../args/moments.h"
#include "../args/quantize.h"

namespace adderops {
namespace cpu {

constexpr int kStages = 2;
constexpr int kShapeBytes = 1024;

// Sizes that no machine has are kTooLarge (sizes.h).
template <typename Args>
struct Plan {
  struct Stage {
    int64_t tasks;  // 0: no such stage
    void (*run)(const Plan&, const Args&, int64_t task, char* shared, char* worker);
  };
  int64_t shared_bytes;
  int64_t worker_bytes;
  Stage stages[kStages];
  alignas(8) unsigned char shape[kShapeBytes];  // the kernel's own struct: all that it computed from the arguments
};

// A pass chooses among kernels; the plain loops of the definition are one of them.
template <typename Args>
using Pass = Plan<Args> (*)(const Args&);

struct Kernels {
  const char* name;
  Pass<Conv2dArgs> forward, grad_x, grad_w;
  Pass<Int8Args> int8;
  Pass<IntegrateAndFireArgs> integrate_and_fire;
  Pass<QuantizeArgs> quantize;  // from here on kDefinitionKernels has none
  Pass<MomentsArgs> moments, moments_gradient;
  Pass<MeanAbsArgs> mean_abs;
  Pass<MatchArgs> match;
};

// Plain loops over the definition: float64, and the reference that tests compare the others with.
extern const Kernels kDefinitionKernels;

// float32, bfloat16 and float16 by SIMD: kernels/ compiled once per instruction set, by kernels_<isa>.cpp.
#if defined(__x86_64__)
extern const Kernels kSse2Kernels, kAvx2Kernels, kAvx512Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
#else
extern const Kernels kGenericKernels;
#endif

// The instruction sets that this machine runs, weakest first; `count` receives how many.
const Kernels* const* available_kernels(int* count);

// The strongest instruction set, or the one named by ADDEROPS_CPU_ISA; null if that name is not available here.
const Kernels* selected_kernels();

}  // namespace cpu
}  // namespace adderops
