#include "tensors.h"

#include <torch/csrc/stable/ops.h>

#include "sizes.h"

namespace adderops {
namespace {

// Calls f, which allocates.  The text is torch's: callers that retry with a smaller batch know it.  Its end, a place in
// libtorch's headers, is cut off.
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

Operand operand(const Tensor& tensor) {
  return {tensor.data_ptr(), {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

Order order_of(const Operand& o, int64_t C, int64_t H, int64_t W) {
  const int64_t* s = o.stride;
  if ((W == 1 || s[3] == 1) && (H == 1 || s[2] == W) && (C == 1 || s[1] == product(H, W))) return Order::kChannelsFirst;
  if ((W == 1 || s[3] == C) && (H == 1 || s[2] == product(W, C)) && s[1] == 1) return Order::kChannelsLast;
  return Order::kOther;
}

Tensor dense(const char* op, const char* name, const Tensor& tensor, MemoryFormat format) {
  return allocated(op, std::string(name) + ": ", [&] { return torch::stable::contiguous(tensor, format); });
}

std::optional<Tensor> dense(const char* op, const char* name, const std::optional<Tensor>& tensor,
                            MemoryFormat format) {
  if (!tensor) return std::nullopt;
  return dense(op, name, *tensor, format);
}

Tensor empty(const char* op, const Tensor& like, const std::vector<int64_t>& shape, ScalarType type,
             MemoryFormat format) {
  int64_t bytes = 8;  // of the largest element
  for (int64_t size : shape) bytes = product(bytes, size);
  REQUIRE(bytes < kTooLarge, op, ": expected a result of fewer than 2^59 elements, got shape ", text_of(shape));
  return allocated(
      op, "", [&] { return torch::stable::empty(shape, type, std::nullopt, like.device(), std::nullopt, format); });
}

Tensor empty_in_format_of(const char* op, const Tensor& like, const std::vector<int64_t>& shape) {
  const bool channels_last = like.size(1) > 1 && like.stride(1) == 1 && !like.is_contiguous();
  return empty(op, like, shape, like.scalar_type(),
               channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace adderops
