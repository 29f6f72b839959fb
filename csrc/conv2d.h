// The adder convolution and its training gradients on any device (ops.h says what a device supplies).
#pragma once
#include <torch/csrc/stable/ops.h>

#include "sizes.h"
#include "tensors.h"

namespace adderops {

// Checks what the three passes share, and fills everything but grad_y, out and bias.
inline Conv2dArgs conv2d_args(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry) {
  Conv2dArgs args{};
  args.problem = check_convolution(op, x, w, geometry);
  args.type = check_element_type(op, x);
  args.x = operand(x);
  args.w = operand(w);
  return args;
}

// Rewrites a kernel as large as its input as a linear layer: (C_in, H, W) become C_in*H*W channels of a single pixel,
// if x, w and a gradient in `out` hold them contiguously and in the same order.
inline void collapse_full_kernel(Conv2dArgs* args, bool writes_gradient) {
  Conv2dProblem& p = args->problem;
  if (p.groups != 1 || p.OH != 1 || p.OW != 1 || p.KH != p.H || p.KW != p.W || p.pad_top || p.pad_left ||
      p.dilation_h != 1 || p.dilation_w != 1 || product(p.H, p.W) == 1)
    return;
  const Order first = order_of(args->x, p.C_in, p.H, p.W);
  if (first == Order::kOther || order_of(args->w, p.C_in, p.H, p.W) != first ||
      (writes_gradient && order_of(args->out, p.C_in, p.H, p.W) != first))
    return;
  for (Operand* o : {&args->x, &args->w, writes_gradient ? &args->out : nullptr})
    if (o) o->stride[1] = o->stride[2] = o->stride[3] = 1;
  p.C_in = product(p.C_in, p.H, p.W);
  p.H = p.W = p.KH = p.KW = p.stride_h = p.stride_w = 1;
}

template <class Device>
Tensor adder_conv2d(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, const Geometry& geometry) {
  const char* op = "adder_conv2d";
  Conv2dArgs args = conv2d_args(op, x, w, geometry);
  const Conv2dProblem& p = args.problem;
  if (bias) check_tensor(op, "bias", *bias, x, {p.C_out});
  const std::optional<Tensor> dense_bias = dense(op, "bias", bias);
  args.bias = elements<void>(dense_bias);
  Tensor y = empty_in_format_of(op, x, {p.N, p.C_out, p.OH, p.OW});
  args.out = operand(y);
  collapse_full_kernel(&args, false);
  if (y.numel()) Device::run(op, x, &Device::Kernels::forward, args);
  return y;
}

template <class Device>
Tensor adder_conv2d_grad_x(const Tensor& grad_y, const Tensor& x, const Tensor& w, const Geometry& geometry) {
  const char* op = "adder_conv2d_grad_x";
  Conv2dArgs args = conv2d_args(op, x, w, geometry);
  const Conv2dProblem& p = args.problem;
  check_tensor(op, "grad_y", grad_y, x, {p.N, p.C_out, p.OH, p.OW});
  args.grad_y = operand(grad_y);
  Tensor grad_x = empty_in_format_of(op, x, {p.N, p.C_in, p.H, p.W});
  args.out = operand(grad_x);
  collapse_full_kernel(&args, true);
  if (grad_x.numel()) Device::run(op, x, &Device::Kernels::grad_x, args);
  return grad_x;
}

template <class Device>
Tensor adder_conv2d_grad_w(const Tensor& grad_y, const Tensor& x, const Tensor& w, const Geometry& geometry) {
  const char* op = "adder_conv2d_grad_w";
  Conv2dArgs args = conv2d_args(op, x, w, geometry);
  const Conv2dProblem& p = args.problem;
  check_tensor(op, "grad_y", grad_y, x, {p.N, p.C_out, p.OH, p.OW});
  args.grad_y = operand(grad_y);
  Tensor grad_w = empty_in_format_of(op, w, {p.C_out, p.C_in / p.groups, p.KH, p.KW});
  args.out = operand(grad_w);
  if (!grad_y.numel()) return torch::stable::zero_(grad_w);  // an empty batch: a sum of nothing
  collapse_full_kernel(&args, true);
  Device::run(op, x, &Device::Kernels::grad_w, args);
  return grad_w;
}

}  // namespace adderops
