// Images to uint8 on any device (ops.h says what a device supplies).
#pragma once
#include <cmath>

#include "args/quantize.h"
#include "tensors.h"

namespace adderops {

template <class Device>
Tensor quantize(const Tensor& x, double scale, int64_t zero_point, int64_t quant_max) {
  const char* op = "quantize";
  REQUIRE(x.dim() == 4, op, ": x: expected 4 dimensions (N, C, H, W), got shape ", shape_of(x));
  check_storage(op, "x", x);
  QuantizeArgs args{x.size(0),  x.size(1), x.size(2), x.size(3), check_element_type(op, x),
                    operand(x), nullptr,   0,         0,         0};
  REQUIRE(args.type != ElementType::kFloat64, op, ": x: expected dtype float32, bfloat16 or float16, got float64");
  args.inverse_scale = static_cast<float>(1 / scale);
  REQUIRE(scale > 0 && std::isfinite(scale) && args.inverse_scale > 0 && std::isfinite(args.inverse_scale), op,
          ": scale: expected a positive number whose inverse is one in float32, got ", scale);
  check_range(op, "quant_max", quant_max, 1, 255);
  check_range(op, "zero_point", zero_point, 0, quant_max);
  args.zero_point = static_cast<int32_t>(zero_point), args.quant_max = static_cast<int32_t>(quant_max);
  Tensor y = empty(op, x, {args.N, args.C, args.H, args.W}, ScalarType::Byte, MemoryFormat::ChannelsLast);
  args.y = static_cast<uint8_t*>(y.data_ptr());
  if (y.numel()) Device::run(op, x, &Device::Kernels::quantize, args);
  return y;
}

}  // namespace adderops
