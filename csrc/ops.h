// Every operator, once: its schema, what it computes, and the function that computes it on a device.
// Formulas: adderops/functional.py and args/*.h.
//
// `Device` is Cpu (cpu/ops.cpp) or Cuda (cuda/device.h).  It supplies
//   Kernels                   a struct of the device's passes, with the same names on every device
//   run(op, x, pass, args)    runs a pass, or a List of them, on the device of x: allocates the workspace, spreads the
//                             work over threads or queues it on a stream, raises the errors of the device
//   kName                     its name in error texts
// cpu/ops.cpp defines the schemas and registers the functions for the CPU; cuda/ops.cpp registers them for CUDA.
#pragma once
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "boxing.h"
#include "conv2d.h"
#include "int8.h"
#include "integrate_and_fire.h"
#include "match.h"
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
    // x (T, N, C, ...) or (T, N); threshold, initial float32 (float64 where x is): one number, (C), (C, ...), initial also
    // (N, C, ...) -> those wanted of spikes, as x, and counts and final membrane (N, C, ...), as threshold; in the format
    // of x's steps: u = decay * u + gain * x[t]; where u >= fire * threshold a spike of 1 or, if scaled, the threshold,
    // and u - threshold or, unless subtract, 0
    {"integrate_and_fire(Tensor x, Tensor threshold, Tensor? initial, float decay, float gain, float fire, "
     "bool subtract, bool scaled, bool spikes, bool counts, bool membrane) -> Tensor[]",
     boxed<integrate_and_fire<Device>>},
    // (N, C, H, W), float32, bfloat16 or float16 -> uint8, channels_last: round(x / scale) + zero_point, clamped to
    // [0, quant_max]
    {"quantize(Tensor x, float scale, int zero_point, int quant_max) -> Tensor", boxed<quantize<Device>>},
    // Lists have one entry per layer; student (N, C_a, H, W), teacher (N, C_c, H, W), float32, bfloat16 or float16, any
    // strides; scales (2, layers), float32 -> of every layer, one after the other, (C_a + C_c + 1, C_a + C_c): E[z z^T],
    // and E[z] as the last row (args/moments.h)
    {"_kernel_moments(Tensor[] student, Tensor[] teacher, Tensor scales, float centre_a, float centre_c, "
     "bool exponential) -> Tensor",
     boxed<kernel_moments<Device>>},
    // grad, of that result -> the gradient by each student, in its dtype and format
    {"_kernel_moments_grad(Tensor grad, Tensor[] student, Tensor[] teacher, Tensor scales, float centre_a, "
     "float centre_c, bool exponential) -> Tensor[]",
     boxed<kernel_moments_grad<Device>>},
    // (N, C, H, W) each, as above -> (tensors): mean |x| of each
    {"_mean_abs(Tensor[] x) -> Tensor", boxed<mean_abs<Device>>},
    // Lists have one entry per group of layers with the same numbers of channels; mixed (layers, rows, C_a + C_c),
    // w_a (layers, rows, C_a), w_c (layers, rows, C_c), float32 -> [terms, var_c, of all layers; then of each group mix,
    // grad_w_a, grad_w_c] (args/match.h)
    {"_match_rows(Tensor[] mixed_a, Tensor[] mixed_c, Tensor[] w_a, Tensor[] w_c, float eps) -> Tensor[]",
     boxed<match_rows<Device>>},
};

inline void define(torch::stable::detail::StableLibrary& library, const Operator& op) { library.def(op.schema); }

inline void implement(torch::stable::detail::StableLibrary& library, const Operator& op) {
  const std::string name(op.schema, std::strchr(op.schema, '('));
  library.impl(name.c_str(), op.function);
}

}  // namespace adderops
