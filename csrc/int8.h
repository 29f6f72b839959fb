// The int8 adder convolution on any device (ops.h says what a device supplies).
#pragma once
#include <limits>

#include "args/int8.h"
#include "sizes.h"
#include "tensors.h"

namespace adderops {

// The epilogue, as in the schema.
struct Int8Options {
  std::optional<Tensor> scale, offset, residual;
  double residual_scale;
  bool relu, quantize;
  int64_t zero_point, quant_max, padding_value;
  using Arguments = std::tuple<std::optional<Tensor>, std::optional<Tensor>, std::optional<Tensor>, double, bool, bool,
                               int64_t, int64_t, int64_t>;
};

// Checks one number per filter, float32.
inline void check_per_filter(const char* op, const char* name, const Tensor& tensor, const Tensor& x, int64_t C_out) {
  REQUIRE(tensor.scalar_type() == ScalarType::Float, op, ": ", name, ": expected dtype float32, got ",
          dtype_of(tensor));
  check_shape(op, name, tensor, x, {C_out});
}

inline Conv2dProblem check_int8(const char* op, const Tensor& x, const Tensor& w, const Int8Options& options,
                                const Geometry& geometry) {
  REQUIRE(x.scalar_type() == ScalarType::Byte, op, ": x: expected dtype uint8, got ", dtype_of(x));
  const Conv2dProblem p = check_convolution(op, x, w, geometry);
  const int64_t terms = product(p.C_in / p.groups, p.KH, p.KW), most_terms = std::numeric_limits<int32_t>::max() / 255;
  REQUIRE(terms <= most_terms, op, ": w: expected at most ", most_terms, " terms, whose sum fits 32 bits, got ", terms);
  check_range(op, "padding_value", options.padding_value, 0, 255);
  check_range(op, "quant_max", options.quant_max, 1, 255);
  check_range(op, "zero_point", options.zero_point, 0, options.quant_max);
  REQUIRE(options.scale.has_value() == options.offset.has_value(), op,
          ": offset: expected both scale and offset or neither, got one");
  REQUIRE(options.scale || !(options.residual || options.relu || options.quantize), op,
          ": scale: expected a tensor with residual, relu or quantize, got none");
  if (options.scale) {
    check_per_filter(op, "scale", *options.scale, x, p.C_out);
    check_per_filter(op, "offset", *options.offset, x, p.C_out);
  }
  if (options.residual) {
    check_shape(op, "residual", *options.residual, x, {p.N, p.C_out, p.OH, p.OW});
    const ScalarType type = options.residual->scalar_type();
    REQUIRE(type == ScalarType::Float || type == ScalarType::Byte, op,
            ": residual: expected dtype uint8 or float32, got ", dtype_of(*options.residual));
  }
  return p;
}

template <class Device>
Tensor adder_conv2d_int8(const Tensor& x, const Tensor& w, const Int8Options& options, const Geometry& geometry) {
  const char* op = "adder_conv2d_int8";
  Int8Args args{};
  const Conv2dProblem& p = args.problem = check_int8(op, x, w, options, geometry);
  const std::optional<Tensor> dense_x = dense(op, "x", x, MemoryFormat::ChannelsLast);
  const std::optional<Tensor> dense_w = dense(op, "w", w, MemoryFormat::ChannelsLast);
  const std::optional<Tensor> scale = dense(op, "scale", options.scale);
  const std::optional<Tensor> offset = dense(op, "offset", options.offset);
  const std::optional<Tensor> residual = dense(op, "residual", options.residual, MemoryFormat::ChannelsLast);
  args.x = elements<uint8_t>(dense_x);
  args.w = elements<uint8_t>(dense_w);
  args.scale = elements<float>(scale);
  args.offset = elements<float>(offset);
  args.residual = elements<void>(residual);
  args.float_residual = residual && residual->scalar_type() == ScalarType::Float;
  args.residual_scale = residual ? static_cast<float>(options.residual_scale) : 0.f;
  args.padding = static_cast<uint8_t>(options.padding_value);
  args.output = !scale ? Int8Output::kSums : options.quantize ? Int8Output::kUInt8 : Int8Output::kFloat32;
  set_epilogue_bounds(&args, options.relu, static_cast<int32_t>(options.zero_point),
                      static_cast<int32_t>(options.quant_max));
  const ScalarType type = !scale ? ScalarType::Int : options.quantize ? ScalarType::Byte : ScalarType::Float;
  Tensor y = empty(op, x, {p.N, p.C_out, p.OH, p.OW}, type, MemoryFormat::ChannelsLast);
  args.y = y.data_ptr();
  if (y.numel()) Device::run(op, x, &Device::Kernels::int8, args);
  return y;
}

}  // namespace adderops
