#include "checks.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>

#include "sizes.h"

namespace adderops {

using torch::headeronly::ScalarType;

std::string text_of(const std::vector<int64_t>& values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

std::string shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return text_of(shape);
}

std::string dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    default: return "scalar type " + std::to_string(static_cast<int>(tensor.scalar_type()));
  }
}

void check_storage(const char* op, const char* name, const Tensor& tensor) {
  if (!tensor.numel()) return;
  int64_t elements = sum(tensor.storage_offset(), 1), bytes = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) elements = sum(elements, product(tensor.size(i) - 1, tensor.stride(i)));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes));
  const int64_t needed = product(elements, static_cast<int64_t>(tensor.element_size()));
  REQUIRE(bytes >= needed && tensor.data_ptr(), op, ": ", name, ": expected a storage of ", needed,
          " bytes or more, got ", bytes, "; was it freed?");
}

void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& x) {
  REQUIRE(tensor.is_cpu() == x.is_cpu() && tensor.get_device() == x.get_device(), op, ": ", name,
          ": expected the device of x, got another");
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                 const std::vector<int64_t>& shape) {
  check_device(op, name, tensor, x);
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  REQUIRE(same, op, ": ", name, ": expected shape ", text_of(shape), ", got ", shape_of(tensor));
  check_storage(op, name, tensor);
}

void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                  const std::vector<int64_t>& shape) {
  REQUIRE(tensor.scalar_type() == x.scalar_type(), op, ": ", name, ": expected the dtype of x, ", dtype_of(x), ", got ",
          dtype_of(tensor));
  check_shape(op, name, tensor, x, shape);
}

ElementType check_element_type(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::kFloat32;
    case ScalarType::Double: return ElementType::kFloat64;
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Half: return ElementType::kFloat16;
    default: break;
  }
  raise(op, ": x: expected dtype float32, float64, bfloat16 or float16, got ", dtype_of(x));
}

void check_range(const char* op, const char* name, int64_t value, int64_t least, int64_t most) {
  REQUIRE(value >= least && value <= most, op, ": ", name, ": expected an integer from ", least, " to ", most, ", got ",
          value);
}

namespace {

void check_list(const char* op, const char* name, const std::vector<int64_t>& values, size_t count, int64_t least) {
  REQUIRE(values.size() == count, op, ": ", name, ": expected ", count, " integers, got ", text_of(values));
  for (int64_t v : values)
    REQUIRE(v >= least && v <= std::numeric_limits<int32_t>::max(), op, ": ", name, ": expected integers from ", least,
            " to 2^31 - 1, got ", text_of(values));
}

int64_t out_size(const char* op, const char* axis, int64_t size, int64_t before, int64_t after, int64_t kernel,
                 int64_t dilation, int64_t stride) {
  const int64_t span = sum(product(dilation, kernel - 1), 1), padded = sum(size, before, after);
  REQUIRE(padded >= span, op, ": w: expected a kernel no larger than the padded input in ", axis, ", got ", span, " > ",
          padded);
  return (padded - span) / stride + 1;
}

}  // namespace

Conv2dProblem check_convolution(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry) {
  REQUIRE(x.dim() == 4, op, ": x: expected 4 dimensions (N, C_in, H, W), got shape ", shape_of(x));
  REQUIRE(w.dim() == 4, op, ": w: expected 4 dimensions (C_out, C_in/groups, KH, KW), got shape ", shape_of(w));
  check_list(op, "stride", geometry.stride, 2, 1);
  check_list(op, "padding", geometry.padding, 4, 0);
  check_list(op, "dilation", geometry.dilation, 2, 1);
  const int64_t groups = geometry.groups;
  REQUIRE(groups >= 1 && x.size(1) % groups == 0 && w.size(0) % groups == 0, op,
          ": groups: expected a positive divisor of C_in = ", x.size(1), " and C_out = ", w.size(0), ", got ", groups);
  REQUIRE(w.size(0) > 0 && w.size(1) > 0 && w.size(2) > 0 && w.size(3) > 0, op,
          ": w: expected no empty dimension, got shape ", shape_of(w));
  check_storage(op, "x", x);
  check_tensor(op, "w", w, x, {w.size(0), x.size(1) / groups, w.size(2), w.size(3)});

  Conv2dProblem p{};
  p.N = x.size(0), p.C_in = x.size(1), p.H = x.size(2), p.W = x.size(3);
  p.C_out = w.size(0), p.KH = w.size(2), p.KW = w.size(3);
  p.stride_h = geometry.stride[0], p.stride_w = geometry.stride[1];
  p.pad_top = geometry.padding[0], p.pad_left = geometry.padding[2];
  p.dilation_h = geometry.dilation[0], p.dilation_w = geometry.dilation[1];
  p.groups = groups;
  p.OH = out_size(op, "height", p.H, p.pad_top, geometry.padding[1], p.KH, p.dilation_h, p.stride_h);
  p.OW = out_size(op, "width", p.W, p.pad_left, geometry.padding[3], p.KW, p.dilation_w, p.stride_w);
  return p;
}

}  // namespace adderops
