// The adder convolution on the CPU: tensors to arguments, and the pass that computes them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../checks.h"
#include "execute.h"

namespace adderops {
namespace cpu {
namespace {

using Ints = std::vector<int64_t>;

Tensor adder_conv2d(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, Ints stride, Ints padding,
                    Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  std::optional<Tensor> dense_bias;
  if (bias) {
    check_tensor(op, "bias", *bias, x, {p.C_out});
    dense_bias = dense(op, "bias", *bias);
    args.bias = dense_bias->data_ptr();
  }
  Tensor y = empty_in_format_of(op, x, {p.N, p.C_out, p.OH, p.OW});
  args.out = operand(y);
  collapse_full_kernel(&args, false);
  if (y.numel()) execute(op, kernels_for(op, args.type).forward, args);
  return y;
}

Tensor adder_conv2d_grad_x(const Tensor& grad_y, const Tensor& x, const Tensor& w, Ints stride, Ints padding,
                           Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d_grad_x";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  check_tensor(op, "grad_y", grad_y, x, {p.N, p.C_out, p.OH, p.OW});
  args.grad_y = operand(grad_y);
  Tensor grad_x = empty_in_format_of(op, x, {p.N, p.C_in, p.H, p.W});
  args.out = operand(grad_x);
  collapse_full_kernel(&args, true);
  if (grad_x.numel()) execute(op, kernels_for(op, args.type).grad_x, args);
  return grad_x;
}

Tensor adder_conv2d_grad_w(const Tensor& grad_y, const Tensor& x, const Tensor& w, Ints stride, Ints padding,
                           Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d_grad_w";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  check_tensor(op, "grad_y", grad_y, x, {p.N, p.C_out, p.OH, p.OW});
  args.grad_y = operand(grad_y);
  Tensor grad_w = empty_in_format_of(op, w, {p.C_out, p.C_in / p.groups, p.KH, p.KW});
  args.out = operand(grad_w);
  if (!grad_y.numel()) return torch::stable::zero_(grad_w);  // an empty batch: a sum of nothing
  collapse_full_kernel(&args, true);
  execute(op, kernels_for(op, args.type).grad_w, args);
  return grad_w;
}

std::string cpu_isa() { return kernels_for("_cpu_isa", ElementType::kFloat32).name; }

std::vector<std::string> cpu_isas() {
  int count = 0;
  const Kernels* const* all = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back(all[i]->name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adderops, CPU, m) {
  m.impl("adder_conv2d", TORCH_BOX(&adder_conv2d));
  m.impl("adder_conv2d_grad_x", TORCH_BOX(&adder_conv2d_grad_x));
  m.impl("adder_conv2d_grad_w", TORCH_BOX(&adder_conv2d_grad_w));
}

STABLE_TORCH_LIBRARY_IMPL(adderops, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace cpu
}  // namespace adderops
