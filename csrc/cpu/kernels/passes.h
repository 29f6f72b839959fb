// The passes of one instruction set, each by the kernel that serves the call best.
#pragma once
#include "depthwise.h"
#include "forward.h"
#include "grad_w.h"
#include "grad_x.h"
#include "int8.h"
#include "int8_depthwise.h"
#include "integrate_and_fire.h"
#include "match.h"
#include "mean_abs.h"
#include "moments.h"
#include "quantize.h"

namespace adderops {
namespace cpu {
namespace {

inline Plan<Conv2dArgs> forward_pass(const Conv2dArgs& args) {
  return is_depthwise(args.problem) ? depthwise_forward_plan(args) : forward_plan(args);
}
inline Plan<Conv2dArgs> grad_x_pass(const Conv2dArgs& args) {
  return is_depthwise(args.problem) ? depthwise_grad_x_plan(args) : grad_x_plan(args);
}
inline Plan<Conv2dArgs> grad_w_pass(const Conv2dArgs& args) {
  return is_depthwise(args.problem) ? depthwise_grad_w_plan(args) : grad_w_plan(args);
}
inline Plan<Int8Args> int8_pass(const Int8Args& args) {
  return is_depthwise(args.problem) ? int8_depthwise_plan(args) : int8_dense_plan(args);
}

constexpr Kernels passes(const char* name) {
  return {name,          forward_pass, grad_x_pass,           grad_w_pass,   int8_pass, integrate_and_fire_plan,
          quantize_plan, moments_plan, moments_gradient_plan, mean_abs_plan, match_plan};
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
