// Every operator, once: its schema, what it computes, and the function that computes it on a device.
// Formulas: adderops/functional.py and args/*.h.
//
// `Device` is Cpu (cpu/ops.cpp) or Cuda (cuda/device.h).  It supplies
//   Kernels                   a struct of the device's passes, with the same names on every device
//   run(op, x, pass, args)    runs a pass on the device of x: allocates the workspace, spreads the work over threads or
//                             queues it on a stream, raises the errors of the device
//   kName                     its name in error texts
// cpu/ops.cpp defines the schemas and registers the functions for the CPU; cuda/ops.cpp registers them for CUDA.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "boxing.h"
#include "conv2d.h"
#include "int8.h"
#include "moments.h"
#include "quantize.h"

namespace adderops {

struct Operator {
  const char* schema;
  void (*function)(StableIValue* stack, uint64_t arguments, uint64_t results);
};

// The operators that every device has.  x (N, C_in, H, W) and w (C_out, C_in/groups, KH, KW) have any strides; bias
// (C_out); stride (h, w), padding (top, bottom, left, right), dilation (h, w).
template <class Device>
constexpr Operator kOperators[] = {
    // -> (N, C_out, OH, OW), channels_last where x is
    {"adder_conv2d(Tensor x, Tensor w, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups)"
     " -> Tensor",
     boxed<adder_conv2d<Device>>},
    // grad_y (N, C_out, OH, OW) -> (N, C_in, H, W): the clamped training gradient, not the derivative
    {"adder_conv2d_grad_x(Tensor grad_y, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation, int groups)"
     " -> Tensor",
     boxed<adder_conv2d_grad_x<Device>>},
    // grad_y (N, C_out, OH, OW) -> (C_out, C_in/groups, KH, KW): the full-precision training gradient, not the
    // derivative
    {"adder_conv2d_grad_w(Tensor grad_y, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation, int groups)"
     " -> Tensor",
     boxed<adder_conv2d_grad_w<Device>>},
    // uint8 x and w with one scale, x is padding_value outside the image -> (N, C_out, OH, OW), channels_last:
    //   without scale: Y = -sum |x - w|, int32;
    //   with scale, offset (C_out): z = (offset + scale * Y) + residual_scale * residual, float32; residual uint8 or
    //   float32; relu: at least 0, or zero_point if quantize; quantize: rounded to uint8 in [0, quant_max]
    {"adder_conv2d_int8(Tensor x, Tensor w, Tensor? scale, Tensor? offset, Tensor? residual, float residual_scale, "
     "bool relu, bool quantize, int zero_point, int quant_max, int padding_value, int[] stride, int[] padding, "
     "int[] dilation, int groups) -> Tensor",
     boxed<adder_conv2d_int8<Device>>},
    // (N, C, H, W), float32, bfloat16 or float16 -> uint8, channels_last: round(x / scale) + zero_point, clamped to
    // [0, quant_max]
    {"quantize(Tensor x, float scale, int zero_point, int quant_max) -> Tensor", boxed<quantize<Device>>},
};

// The operators that only the CPU has, float32.  With CUDA kernels they move to the list above.
template <class Device>
constexpr Operator kCpuOperators[] = {
    // student, teacher (N, C, H, W) -> (2C + 1, 2C): E[z z^T], and E[z] as the last row (args/moments.h)
    {"_kernel_moments(Tensor student, Tensor teacher, float scale_a, float scale_c, float centre_a, float centre_c, "
     "bool exponential) -> Tensor",
     boxed<kernel_moments<Device>>},
    // weights (2C + 1, C) -> (N, C, H, W) in the format of student: a gradient through those moments
    {"_kernel_moments_grad(Tensor weights, Tensor student, Tensor teacher, float scale_a, float scale_c, "
     "float centre_a, float centre_c, bool exponential) -> Tensor",
     boxed<kernel_moments_grad<Device>>},
    // (N, C, H, W), contiguous or channels_last -> (N): sum |x| of each image
    {"_abs_sum(Tensor x) -> Tensor", boxed<abs_sum<Device>>},
};

inline void define(torch::stable::detail::StableLibrary& library, const Operator& op) { library.def(op.schema); }

inline void implement(torch::stable::detail::StableLibrary& library, const Operator& op) {
  const std::string name(op.schema, std::strchr(op.schema, '('));
  library.impl(name.c_str(), op.function);
}

}  // namespace adderops
