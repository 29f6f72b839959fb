// Plain loops over the definition: float64, and calls whose windows hold little but padding (kernels/region.h).
// Task = one plane of the output, or some neurons.
#include "../definition/conv2d.h"
#include "../definition/int8.h"
#include "../definition/integrate_and_fire.h"
#include "kernels.h"

namespace adderops {
namespace cpu {
namespace {

template <typename T>
T* target(const Conv2dArgs& args, int64_t a, int64_t b, int64_t c, int64_t d) {
  const Operand& o = args.out;
  return static_cast<T*>(o.data) + (a * o.stride[0] + b * o.stride[1] + c * o.stride[2] + d * o.stride[3]);
}

struct Forward {
  static int64_t tasks(const Conv2dProblem& p) { return p.N * p.C_out; }
  template <typename T>
  static void run(const Conv2dArgs& args, int64_t task) {
    const Conv2dProblem& p = args.problem;
    const int64_t n = task / p.C_out, co = task % p.C_out;
    for (int64_t oh = 0; oh < p.OH; ++oh)
      for (int64_t ow = 0; ow < p.OW; ++ow)
        from_float(definition::forward<T>(args, n, co, oh, ow), target<T>(args, n, co, oh, ow));
  }
};

struct GradX {
  static int64_t tasks(const Conv2dProblem& p) { return p.N * p.C_in; }
  template <typename T>
  static void run(const Conv2dArgs& args, int64_t task) {
    const Conv2dProblem& p = args.problem;
    const int64_t n = task / p.C_in, ci = task % p.C_in;
    for (int64_t ih = 0; ih < p.H; ++ih)
      for (int64_t iw = 0; iw < p.W; ++iw)
        from_float(definition::grad_x<T>(args, n, ci, ih, iw), target<T>(args, n, ci, ih, iw));
  }
};

struct GradW {
  static int64_t tasks(const Conv2dProblem& p) { return p.C_out * (p.C_in / p.groups); }
  template <typename T>
  static void run(const Conv2dArgs& args, int64_t task) {
    const Conv2dProblem& p = args.problem;
    const int64_t channels = p.C_in / p.groups, co = task / channels, ci = task % channels;
    for (int64_t kh = 0; kh < p.KH; ++kh)
      for (int64_t kw = 0; kw < p.KW; ++kw)
        from_float(definition::grad_w<T>(args, co, ci, kh, kw), target<T>(args, co, ci, kh, kw));
  }
};

void int8_run(const Plan<Int8Args>&, const Int8Args& args, int64_t task, char*, char*) {
  const Conv2dProblem& p = args.problem;
  const int64_t n = task / p.C_out, co = task % p.C_out;
  for (int64_t oh = 0; oh < p.OH; ++oh)
    for (int64_t ow = 0; ow < p.OW; ++ow)
      definition::int8_finish(args, definition::int8_sum(args, n, co, oh, ow), co,
                              ((n * p.OH + oh) * p.OW + ow) * p.C_out + co);
}

Plan<Int8Args> int8_plan(const Int8Args& args) {
  return {0, 0, {{args.problem.N * args.problem.C_out, int8_run}, {}}, {}};
}

constexpr int64_t kNeurons = 1024;  // of a task

int64_t neurons(const IntegrateAndFireArgs& args) { return args.size[0] * args.size[1] * args.size[2]; }

template <typename T>
void integrate_and_fire(const IntegrateAndFireArgs& args, int64_t task) {
  const int64_t first = task * kNeurons, end = first + kNeurons < neurons(args) ? first + kNeurons : neurons(args);
  for (int64_t neuron = first; neuron < end; ++neuron) definition::integrate_and_fire<T>(args, neuron);
}

void integrate_and_fire_run(const Plan<IntegrateAndFireArgs>&, const IntegrateAndFireArgs& args, int64_t task, char*,
                            char*) {
  switch (args.type) {
    case ElementType::kFloat32: return integrate_and_fire<float>(args, task);
    case ElementType::kFloat64: return integrate_and_fire<double>(args, task);
    case ElementType::kBFloat16: return integrate_and_fire<BFloat16>(args, task);
    case ElementType::kFloat16: return integrate_and_fire<Float16>(args, task);
  }
}

Plan<IntegrateAndFireArgs> integrate_and_fire_plan(const IntegrateAndFireArgs& args) {
  return {0, 0, {{(neurons(args) + kNeurons - 1) / kNeurons, integrate_and_fire_run}, {}}, {}};
}

template <typename P>
void run(const Plan<Conv2dArgs>&, const Conv2dArgs& args, int64_t task, char*, char*) {
  switch (args.type) {
    case ElementType::kFloat32: return P::template run<float>(args, task);
    case ElementType::kFloat64: return P::template run<double>(args, task);
    case ElementType::kBFloat16: return P::template run<BFloat16>(args, task);
    case ElementType::kFloat16: return P::template run<Float16>(args, task);
  }
}

template <typename P>
Plan<Conv2dArgs> plan(const Conv2dArgs& args) {
  return {0, 0, {{P::tasks(args.problem), run<P>}, {}}, {}};
}

}  // namespace

extern const Kernels kDefinitionKernels = {"definition", plan<Forward>, plan<GradX>,
                                           plan<GradW>,  int8_plan,     integrate_and_fire_plan};

}  // namespace cpu
}  // namespace adderops
