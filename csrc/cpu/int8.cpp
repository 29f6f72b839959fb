// The int8 convolution on the CPU (int8_args.h), and the way to its bytes: tensors to arguments.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>

#include "../checks.h"
#include "execute.h"

namespace adderops {
namespace cpu {
namespace {

using Ints = std::vector<int64_t>;

Tensor adder_conv2d_int8(const Tensor& x, const Tensor& w, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& offset, const std::optional<Tensor>& residual,
                         double residual_scale, bool relu, bool quantize, int64_t zero_point, int64_t quant_max,
                         int64_t padding_value, Ints stride, Ints padding, Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d_int8";
  Int8Call call = check_conv2d_int8(
      op, x, w, {stride, padding, dilation, groups},
      {scale, offset, residual, residual_scale, relu, quantize, zero_point, quant_max, padding_value});
  Tensor y = empty_int8_output(op, x, call.args);
  call.args.y = y.data_ptr();
  if (y.numel()) execute(op, kernels_for(op, ElementType::kFloat32).int8, call.args);
  return y;
}

Tensor quantize(const Tensor& x, double scale, int64_t zero_point, int64_t quant_max) {
  const char* op = "quantize";
  QuantizeArgs args = check_quantize(op, x, scale, zero_point, quant_max);
  Tensor y = empty(op, x, {args.N, args.C, args.H, args.W}, torch::headeronly::ScalarType::Byte,
                   torch::headeronly::MemoryFormat::ChannelsLast);
  args.y = static_cast<uint8_t*>(y.data_ptr());
  if (y.numel()) execute(op, kernels_for(op, ElementType::kFloat32).quantize, args);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adderops, CPU, m) {
  m.impl("adder_conv2d_int8", TORCH_BOX(&adder_conv2d_int8));
  m.impl("quantize", TORCH_BOX(&quantize));
}

}  // namespace cpu
}  // namespace adderops
