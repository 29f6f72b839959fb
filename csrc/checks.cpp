#include "checks.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <initializer_list>
#include <limits>

#include "sizes.h"

namespace adderops {
namespace {

using torch::headeronly::ScalarType;

std::string list(const std::vector<int64_t>& values) {
  std::string text = "(";
  for (size_t i = 0; i < values.size(); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + ")";
}

std::string shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return list(shape);
}

std::string name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Byte: return "uint8";
    default: return "scalar type " + std::to_string(static_cast<int>(type));
  }
}

ElementType element_type(const char* op, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return ElementType::kFloat32;
    case ScalarType::Double: return ElementType::kFloat64;
    case ScalarType::BFloat16: return ElementType::kBFloat16;
    case ScalarType::Half: return ElementType::kFloat16;
    default: break;
  }
  raise(op, ": x: expected dtype float32, float64, bfloat16 or float16, got ", name_of(x.scalar_type()));
}

void check_list(const char* op, const char* name, const std::vector<int64_t>& values, size_t count, int64_t least) {
  REQUIRE(values.size() == count, op, ": ", name, ": expected ", count, " integers, got ", list(values));
  for (int64_t v : values)
    REQUIRE(v >= least && v <= std::numeric_limits<int32_t>::max(), op, ": ", name, ": expected integers from ", least,
            " to 2^31 - 1, got ", list(values));
}

int64_t out_size(const char* op, const char* axis, int64_t size, int64_t before, int64_t after, int64_t kernel,
                 int64_t dilation, int64_t stride) {
  const int64_t span = sum(product(dilation, kernel - 1), 1), padded = sum(size, before, after);
  REQUIRE(padded >= span, op, ": w: expected a kernel no larger than the padded input in ", axis, ", got ", span, " > ",
          padded);
  return (padded - span) / stride + 1;
}

// How (C, H, W) lie in one piece, if they do.
enum class Order { kOther, kChannelsFirst, kChannelsLast };
Order order(const Operand& o, int64_t C, int64_t H, int64_t W) {
  const int64_t* s = o.stride;
  if ((W == 1 || s[3] == 1) && (H == 1 || s[2] == W) && (C == 1 || s[1] == product(H, W))) return Order::kChannelsFirst;
  if ((W == 1 || s[3] == C) && (H == 1 || s[2] == product(W, C)) && s[1] == 1) return Order::kChannelsLast;
  return Order::kOther;
}

}  // namespace

namespace {

// x, w and the geometry of any convolution.
Conv2dProblem check_problem(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry) {
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

// One number for each filter, float32, beside x.
Tensor per_filter(const char* op, const char* name, const Tensor& tensor, const Tensor& x, int64_t C_out) {
  REQUIRE(tensor.scalar_type() == ScalarType::Float, op, ": ", name, ": expected dtype float32, got ",
          name_of(tensor.scalar_type()));
  check_shape(op, name, tensor, x, {C_out});
  return dense(op, name, tensor);
}

void check_byte(const char* op, const char* name, int64_t value, int64_t least = 0, int64_t most = 255) {
  REQUIRE(value >= least && value <= most, op, ": ", name, ": expected an integer from ", least, " to ", most, ", got ",
          value);
}

}  // namespace

void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                  const std::vector<int64_t>& shape) {
  REQUIRE(tensor.scalar_type() == x.scalar_type(), op, ": ", name, ": expected the dtype of x, ",
          name_of(x.scalar_type()), ", got ", name_of(tensor.scalar_type()));
  check_shape(op, name, tensor, x, shape);
}

void check_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                 const std::vector<int64_t>& shape) {
  REQUIRE(tensor.is_cpu() == x.is_cpu() && tensor.get_device() == x.get_device(), op, ": ", name,
          ": expected the device of x, got another");
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  REQUIRE(same, op, ": ", name, ": expected shape ", list(shape), ", got ", shape_of(tensor));
  check_storage(op, name, tensor);
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

namespace {

// Calls f, which allocates.  The text is torch's, which callers know that try again with a smaller batch; what follows
// in it says where in libtorch's headers.
template <typename F>
Tensor allocated(const char* op, const std::string& what, const F& f) {
  try {
    return f();
  } catch (const std::runtime_error& error) {
    const std::string text = error.what();
    raise(op, ": ", what, "expected memory, got: ", text.substr(0, text.find(" (originally from ")));
  }
}

}  // namespace

Tensor dense(const char* op, const char* name, const Tensor& tensor, torch::headeronly::MemoryFormat format) {
  return allocated(op, std::string(name) + ": ", [&] { return torch::stable::contiguous(tensor, format); });
}

Tensor empty(const char* op, const Tensor& like, const std::vector<int64_t>& shape, ScalarType type,
             torch::headeronly::MemoryFormat format) {
  int64_t bytes = 8;  // an element's, at most
  for (int64_t size : shape) bytes = product(bytes, size);
  REQUIRE(bytes < kTooLarge, op, ": expected a result of fewer than 2^59 elements, got shape ", list(shape));
  return allocated(
      op, "", [&] { return torch::stable::empty(shape, type, std::nullopt, like.device(), std::nullopt, format); });
}

Conv2dArgs check_conv2d(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry) {
  Conv2dArgs args{};
  args.problem = check_problem(op, x, w, geometry);
  args.type = element_type(op, x);
  args.x = operand(x);
  args.w = operand(w);
  return args;
}

Int8Call check_conv2d_int8(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry,
                           const Int8Options& options) {
  REQUIRE(x.scalar_type() == ScalarType::Byte, op, ": x: expected dtype uint8, got ", name_of(x.scalar_type()));
  Int8Call call{};
  Int8Args& args = call.args;
  const Conv2dProblem& p = args.problem = check_problem(op, x, w, geometry);
  const int64_t terms = product(p.C_in / p.groups, p.KH, p.KW);
  REQUIRE(terms <= std::numeric_limits<int32_t>::max() / 255, op, ": w: expected at most ",
          std::numeric_limits<int32_t>::max() / 255, " terms, whose sum fits 32 bits, got ", terms);
  check_byte(op, "padding_value", options.padding_value);
  check_byte(op, "quant_max", options.quant_max, 1);
  check_byte(op, "zero_point", options.zero_point, 0, options.quant_max);
  REQUIRE(options.scale.has_value() == options.offset.has_value(), op,
          ": offset: expected both scale and offset or neither, got one");
  REQUIRE(options.scale || !(options.residual || options.relu || options.quantize), op,
          ": scale: expected a tensor with residual, relu or quantize, got none");
  auto keep = [&](const Tensor& tensor) {
    call.owners.push_back(tensor);
    return call.owners.back().data_ptr();
  };
  auto channels_last = [&](const char* name, const Tensor& tensor) {
    return keep(dense(op, name, tensor, torch::headeronly::MemoryFormat::ChannelsLast));
  };
  args.x = static_cast<const uint8_t*>(channels_last("x", x));
  args.w = static_cast<const uint8_t*>(channels_last("w", w));
  if (options.scale) {
    args.scale = static_cast<const float*>(keep(per_filter(op, "scale", *options.scale, x, p.C_out)));
    args.offset = static_cast<const float*>(keep(per_filter(op, "offset", *options.offset, x, p.C_out)));
    args.output = options.quantize ? Int8Output::kUInt8 : Int8Output::kFloat32;
  }
  if (options.residual) {
    args.float_residual = options.residual->scalar_type() == ScalarType::Float;
    check_shape(op, "residual", *options.residual, x, {p.N, p.C_out, p.OH, p.OW});
    REQUIRE(args.float_residual || options.residual->scalar_type() == ScalarType::Byte, op,
            ": residual: expected dtype uint8 or float32, got ", name_of(options.residual->scalar_type()));
    args.residual = channels_last("residual", *options.residual);
    args.residual_scale = static_cast<float>(options.residual_scale);
  }
  const float zero = options.quantize ? static_cast<float>(options.zero_point) : 0.f;
  args.least = options.relu ? zero : options.quantize ? 0.f : -std::numeric_limits<float>::infinity();
  args.most = static_cast<float>(options.quant_max);
  args.padding = static_cast<uint8_t>(options.padding_value);
  return call;
}

QuantizeArgs check_quantize(const char* op, const Tensor& x, double scale, int64_t zero_point, int64_t quant_max) {
  REQUIRE(x.dim() == 4, op, ": x: expected 4 dimensions (N, C, H, W), got shape ", shape_of(x));
  check_storage(op, "x", x);
  QuantizeArgs args{x.size(0), x.size(1), x.size(2), x.size(3), element_type(op, x), operand(x), nullptr, 0, 0, 0};
  REQUIRE(args.type != ElementType::kFloat64, op, ": x: expected dtype float32, bfloat16 or float16, got float64");
  args.inverse_scale = static_cast<float>(1 / scale);
  REQUIRE(scale > 0 && std::isfinite(scale) && args.inverse_scale > 0 && std::isfinite(args.inverse_scale), op,
          ": scale: expected a positive number whose inverse is one in float32, got ", scale);
  check_byte(op, "quant_max", quant_max, 1);
  check_byte(op, "zero_point", zero_point, 0, quant_max);
  args.zero_point = static_cast<int32_t>(zero_point), args.quant_max = static_cast<int32_t>(quant_max);
  return args;
}

Tensor empty_int8_output(const char* op, const Tensor& x, const Int8Args& args) {
  const ScalarType type = args.output == Int8Output::kSums      ? ScalarType::Int
                          : args.output == Int8Output::kFloat32 ? ScalarType::Float
                                                                : ScalarType::Byte;
  const Conv2dProblem& p = args.problem;
  return empty(op, x, {p.N, p.C_out, p.OH, p.OW}, type, torch::headeronly::MemoryFormat::ChannelsLast);
}

void check_images(const char* op, const char* name, const Tensor& images, bool in_pieces) {
  REQUIRE(images.is_cpu() && images.scalar_type() == ScalarType::Float, op, ": ", name,
          ": expected float32 on the CPU, got ", name_of(images.scalar_type()));
  REQUIRE(images.dim() == 4 && images.numel() > 0, op, ": ", name, ": expected shape (N, C, H, W) without zeros, got ",
          shape_of(images));
  check_storage(op, name, images);
  REQUIRE(!in_pieces || order(operand(images), images.size(1), images.size(2), images.size(3)) != Order::kOther, op,
          ": ", name, ": expected images that are contiguous or channels_last, got other strides");
}

Operand operand(const Tensor& tensor) {
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

void collapse_full_kernel(Conv2dArgs* args, bool writes_gradient) {
  Conv2dProblem& p = args->problem;
  if (p.groups != 1 || p.OH != 1 || p.OW != 1 || p.KH != p.H || p.KW != p.W || p.pad_top || p.pad_left ||
      p.dilation_h != 1 || p.dilation_w != 1 || product(p.H, p.W) == 1)
    return;
  const Order first = order(args->x, p.C_in, p.H, p.W);
  if (first == Order::kOther || order(args->w, p.C_in, p.H, p.W) != first ||
      (writes_gradient && order(args->out, p.C_in, p.H, p.W) != first))
    return;
  for (Operand* o : {&args->x, &args->w, writes_gradient ? &args->out : nullptr})
    if (o) o->stride[1] = o->stride[2] = o->stride[3] = 1;
  p.C_in = product(p.C_in, p.H, p.W);
  p.H = p.W = p.KH = p.KW = p.stride_h = p.stride_w = 1;
}

Tensor empty_in_format_of(const char* op, const Tensor& like, const std::vector<int64_t>& shape) {
  const bool channels_last = like.size(1) > 1 && like.stride(1) == 1 && !like.is_contiguous();
  return empty(
      op, like, shape, like.scalar_type(),
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous);
}

}  // namespace adderops
