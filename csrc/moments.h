// Moments of two feature maps on any device (ops.h says what a device supplies).
#pragma once
#include "args/moments.h"
#include "sizes.h"
#include "tensors.h"

namespace adderops {

// phi and the centres, as in the schemas: `a` for the student, `c` for the teacher.
struct MomentsOptions {
  double scale_a, scale_c, centre_a, centre_c;
  bool exponential;
  using Arguments = std::tuple<double, double, double, double, bool>;
};

template <class Device>
void check_images(const char* op, const char* name, const Tensor& images) {
  REQUIRE(images.scalar_type() == ScalarType::Float, op, ": ", name, ": expected float32 on ", Device::kName, ", got ",
          dtype_of(images));
  REQUIRE(images.dim() == 4 && images.numel() > 0, op, ": ", name, ": expected shape (N, C, H, W) without zeros, got ",
          shape_of(images));
  check_storage(op, name, images);
}

template <class Device>
MomentsArgs moments_args(const char* op, const Tensor& student, const Tensor& teacher, const MomentsOptions& options) {
  check_images<Device>(op, "student", student);
  check_tensor(op, "teacher", teacher, student, {student.size(0), student.size(1), student.size(2), student.size(3)});
  MomentsArgs args{};
  args.N = student.size(0), args.C = student.size(1), args.H = student.size(2), args.W = student.size(3);
  args.student = operand(student), args.teacher = operand(teacher);
  args.scale[0] = static_cast<float>(options.scale_a), args.scale[1] = static_cast<float>(options.scale_c);
  args.centre[0] = static_cast<float>(options.centre_a), args.centre[1] = static_cast<float>(options.centre_c);
  args.exponential = options.exponential;
  return args;
}

template <class Device>
Tensor kernel_moments(const Tensor& student, const Tensor& teacher, const MomentsOptions& options) {
  const char* op = "_kernel_moments";
  MomentsArgs args = moments_args<Device>(op, student, teacher, options);
  Tensor out = empty(op, student, {product(2, args.C) + 1, product(2, args.C)}, student.scalar_type());
  args.second = static_cast<float*>(out.data_ptr());
  args.mean = args.second + 4 * args.C * args.C;  // the last row
  Device::run(op, student, &Device::Kernels::moments, args);
  return out;
}

template <class Device>
Tensor kernel_moments_grad(const Tensor& weights, const Tensor& student, const Tensor& teacher,
                           const MomentsOptions& options) {
  const char* op = "_kernel_moments_grad";
  MomentsArgs args = moments_args<Device>(op, student, teacher, options);
  check_tensor(op, "weights", weights, student, {product(2, args.C) + 1, args.C});
  const std::optional<Tensor> dense_weights = dense(op, "weights", weights);
  args.weights = elements<float>(dense_weights);
  Tensor out = empty_in_format_of(op, student, {args.N, args.C, args.H, args.W});
  args.out = operand(out);
  Device::run(op, student, &Device::Kernels::moments_gradient, args);
  return out;
}

template <class Device>
Tensor abs_sum(const Tensor& x) {
  const char* op = "_abs_sum";
  check_images<Device>(op, "x", x);
  MomentsArgs args{};
  args.N = x.size(0), args.C = x.size(1), args.H = x.size(2), args.W = x.size(3);
  args.student = operand(x);
  REQUIRE(order_of(args.student, args.C, args.H, args.W) != Order::kOther, op,
          ": x: expected images that are contiguous or channels_last, got other strides");
  Tensor out = empty(op, x, {args.N}, x.scalar_type());
  args.mean = static_cast<float*>(out.data_ptr());
  Device::run(op, x, &Device::Kernels::abs_sum, args);
  return out;
}

}  // namespace adderops
