// Moments of pairs of feature maps on any device (ops.h says what a device supplies).  One call is for many layers.
#pragma once
#include "args/moments.h"
#include "sizes.h"
#include "tensors.h"

namespace adderops {

// The centres and phi, as in the schemas.
struct MomentsOptions {
  double centre_a, centre_c;
  bool exponential;
  using Arguments = std::tuple<double, double, bool>;
};

// Checks one tensor of a list: images of a type that the kernels read, on the device of the first.
inline ElementType check_images(const char* op, const std::string& name, const Tensor& images, const Tensor& first) {
  REQUIRE(images.dim() == 4 && images.numel() > 0, op, ": ", name, ": expected shape (N, C, H, W) without zeros, got ",
          shape_of(images));
  const ScalarType type = images.scalar_type();
  REQUIRE(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, op, ": ", name,
          ": expected dtype float32, bfloat16 or float16, got ", dtype_of(images));
  check_device(op, name.c_str(), images, first);
  check_storage(op, name.c_str(), images);
  return check_element_type(op, images);
}

inline std::string item(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// Checks what the kernels' 32-bit places need, of every element and of a dense result.  An expanded tensor may have any
// number of elements.
inline void check_places(const char* op, const std::string& name, const Tensor& images) {
  const int64_t pixels = product(images.size(0), images.size(2), images.size(3)), most = int64_t(1) << 32;
  int64_t span = 1;
  for (int64_t i = 0; i < 4; ++i) span = sum(span, product(images.size(i) - 1, images.stride(i)));
  REQUIRE(
      pixels <= most / 2 - 65536 && product(pixels, images.size(1)) <= most && span <= most, op, ": ", name,
      ": expected fewer than 2^31 - 2^16 pixels and at most 2^32 elements, the gaps between them included, got shape ",
      shape_of(images), " over ", span, " elements");
}

// Checks the layers of a call, and their `scales` (2, layers), which is dense.  Without results.
inline std::vector<MomentsArgs> moments_args(const char* op, const std::vector<Tensor>& student,
                                             const std::vector<Tensor>& teacher, const Tensor& scales,
                                             const MomentsOptions& options) {
  const size_t layers = student.size();
  REQUIRE(layers > 0, op, ": student: expected at least one layer, got none");
  REQUIRE(teacher.size() == layers, op, ": teacher: expected ", layers, " layers, as of the student, got ",
          teacher.size());
  std::vector<MomentsArgs> list;
  for (size_t i = 0; i < layers; ++i) {
    const Tensor &a = student[i], &c = teacher[i];
    MomentsArgs args{};
    args.type[0] = check_images(op, item("student", i), a, student[0]);
    args.type[1] = check_images(op, item("teacher", i), c, student[0]);
    check_places(op, item("student", i), a), check_places(op, item("teacher", i), c);
    args.N = a.size(0), args.H = a.size(2), args.W = a.size(3);
    REQUIRE(c.size(0) == args.N && c.size(2) == args.H && c.size(3) == args.W, op, ": ", item("teacher", i),
            ": expected the images and the size of the student, ", shape_of(a), ", got ", shape_of(c));
    args.C[0] = a.size(1), args.C[1] = c.size(1);
    args.y[0] = operand(a), args.y[1] = operand(c);
    args.centre[0] = static_cast<float>(options.centre_a), args.centre[1] = static_cast<float>(options.centre_c);
    args.exponential = options.exponential;
    list.push_back(args);
  }
  REQUIRE(scales.scalar_type() == ScalarType::Float, op, ": scales: expected dtype float32, got ", dtype_of(scales));
  check_shape(op, "scales", scales, student[0], {2, static_cast<int64_t>(layers)});
  return list;
}
inline void set_scales(std::vector<MomentsArgs>* list, const Tensor& dense_scales) {
  const float* scale = static_cast<const float*>(dense_scales.data_ptr());
  for (size_t i = 0; i < list->size(); ++i)
    (*list)[i].scale[0] = scale + i, (*list)[i].scale[1] = scale + list->size() + i;
}

// (D + 1, D), in floats.
inline int64_t moments_size(const MomentsArgs& args) {
  const int64_t D = sum(args.C[0], args.C[1]);
  return product(D + 1, D);
}
inline int64_t moments_size(const std::vector<MomentsArgs>& list) {
  int64_t size = 0;
  for (const MomentsArgs& args : list) size = sum(size, moments_size(args));
  return size;
}

template <typename Args>
List<Args> list_of(const std::vector<Args>& list) {
  return {list.data(), static_cast<int64_t>(list.size())};
}

template <class Device>
Tensor kernel_moments(const std::vector<Tensor>& student, const std::vector<Tensor>& teacher, const Tensor& scales,
                      const MomentsOptions& options) {
  const char* op = "_kernel_moments";
  std::vector<MomentsArgs> list = moments_args(op, student, teacher, scales, options);
  const Tensor dense_scales = dense(op, "scales", scales);
  set_scales(&list, dense_scales);
  Tensor out = empty(op, student[0], {moments_size(list)}, ScalarType::Float);
  float* at = static_cast<float*>(out.data_ptr());
  for (MomentsArgs& args : list) args.out = at, at += moments_size(args);
  Device::run(op, student[0], &Device::Kernels::moments, list_of(list));
  return out;
}

template <class Device>
std::vector<Tensor> kernel_moments_grad(const Tensor& grad, const std::vector<Tensor>& student,
                                        const std::vector<Tensor>& teacher, const Tensor& scales,
                                        const MomentsOptions& options) {
  const char* op = "_kernel_moments_grad";
  std::vector<MomentsArgs> list = moments_args(op, student, teacher, scales, options);
  REQUIRE(grad.scalar_type() == ScalarType::Float, op, ": grad: expected dtype float32, got ", dtype_of(grad));
  check_shape(op, "grad", grad, student[0], {moments_size(list)});
  const Tensor dense_scales = dense(op, "scales", scales), dense_grad = dense(op, "grad", grad);
  set_scales(&list, dense_scales);
  const float* at = static_cast<const float*>(dense_grad.data_ptr());
  std::vector<Tensor> out;
  for (size_t i = 0; i < list.size(); ++i) {
    MomentsArgs& args = list[i];
    args.grad = at, at += moments_size(args);
    out.push_back(empty_in_format_of(op, student[i], {args.N, args.C[0], args.H, args.W}));
    args.grad_y = operand(out.back());
  }
  Device::run(op, student[0], &Device::Kernels::moments_gradient, list_of(list));
  return out;
}

template <class Device>
Tensor mean_abs(const std::vector<Tensor>& x) {
  const char* op = "_mean_abs";
  REQUIRE(!x.empty(), op, ": x: expected at least one tensor, got none");
  std::vector<MeanAbsArgs> list;
  for (size_t i = 0; i < x.size(); ++i) {
    const ElementType type = check_images(op, item("x", i), x[i], x[0]);
    check_places(op, item("x", i), x[i]);
    list.push_back({x[i].size(0), x[i].size(1), x[i].size(2), x[i].size(3), type, operand(x[i]), nullptr});
  }
  Tensor out = empty(op, x[0], {static_cast<int64_t>(x.size())}, ScalarType::Float);
  for (size_t i = 0; i < x.size(); ++i) list[i].out = static_cast<float*>(out.data_ptr()) + i;
  Device::run(op, x[0], &Device::Kernels::mean_abs, list_of(list));
  return out;
}

}  // namespace adderops
