// Arguments of quantize: round(x * inverse_scale) + zero_point, clamped to [0, quant_max]; a NaN becomes quant_max.
#pragma once
#include "tensor.h"

namespace adderops {

// x has any strides and any type but float64.
struct QuantizeArgs {
  int64_t N, C, H, W;
  ElementType type;
  Operand x;
  uint8_t* y;  // (N, H, W, C)
  float inverse_scale;
  int32_t zero_point, quant_max;
};

}  // namespace adderops
