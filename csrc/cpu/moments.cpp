// The moments of the kernels of two layers on the CPU (moments_args.h): tensors to arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../checks.h"
#include "execute.h"

namespace adderops {
namespace cpu {
namespace {

MomentsArgs moments_args(const char* op, const Tensor& student, const Tensor& teacher, double scale_a, double scale_c,
                         double centre_a, double centre_c, bool exponential) {
  check_images(op, "student", student);
  check_tensor(op, "teacher", teacher, student, {student.size(0), student.size(1), student.size(2), student.size(3)});
  MomentsArgs a{};
  a.N = student.size(0), a.C = student.size(1), a.H = student.size(2), a.W = student.size(3);
  a.student = operand(student), a.teacher = operand(teacher);
  a.scale[0] = static_cast<float>(scale_a), a.scale[1] = static_cast<float>(scale_c);
  a.centre[0] = static_cast<float>(centre_a), a.centre[1] = static_cast<float>(centre_c);
  a.exponential = exponential;
  return a;
}

Tensor kernel_moments(const Tensor& student, const Tensor& teacher, double scale_a, double scale_c, double centre_a,
                      double centre_c, bool exponential) {
  const char* op = "_kernel_moments";
  MomentsArgs a = moments_args(op, student, teacher, scale_a, scale_c, centre_a, centre_c, exponential);
  Tensor out = empty(op, student, {product(2, a.C) + 1, product(2, a.C)}, student.scalar_type());
  a.second = static_cast<float*>(out.data_ptr());
  a.mean = a.second + 4 * a.C * a.C;
  execute(op, kernels_for(op, ElementType::kFloat32).moments, a);
  return out;
}

Tensor kernel_moments_grad(const Tensor& weights, const Tensor& student, const Tensor& teacher, double scale_a,
                           double scale_c, double centre_a, double centre_c, bool exponential) {
  const char* op = "_kernel_moments_grad";
  MomentsArgs a = moments_args(op, student, teacher, scale_a, scale_c, centre_a, centre_c, exponential);
  check_tensor(op, "weights", weights, student, {product(2, a.C) + 1, a.C});
  const Tensor contiguous = dense(op, "weights", weights);
  a.weights = static_cast<const float*>(contiguous.data_ptr());
  Tensor out = empty_in_format_of(op, student, {a.N, a.C, a.H, a.W});
  a.out = operand(out);
  execute(op, kernels_for(op, ElementType::kFloat32).moments_gradient, a);
  return out;
}

Tensor abs_sum(const Tensor& x) {
  const char* op = "_abs_sum";
  check_images(op, "x", x, true);
  Tensor out = empty(op, x, {x.size(0)}, x.scalar_type());
  MomentsArgs a{};
  a.N = x.size(0), a.C = x.size(1), a.H = x.size(2), a.W = x.size(3);
  a.student = operand(x);
  a.mean = static_cast<float*>(out.data_ptr());
  execute(op, kernels_for(op, ElementType::kFloat32).abs_sum, a);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adderops, CPU, m) {
  m.impl("_kernel_moments", TORCH_BOX(&kernel_moments));
  m.impl("_kernel_moments_grad", TORCH_BOX(&kernel_moments_grad));
  m.impl("_abs_sum", TORCH_BOX(&abs_sum));
}

}  // namespace cpu
}  // namespace adderops
