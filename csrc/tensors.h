// The tensors of a call: as operands of the kernels, as dense copies, and as new results.
#pragma once
#include <optional>

#include "checks.h"

namespace adderops {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;

Operand operand(const Tensor& tensor);

// The order in memory of each image (C, H, W), if it is contiguous.
enum class Order { kOther, kChannelsFirst, kChannelsLast };
Order order_of(const Operand& o, int64_t C, int64_t H, int64_t W);

// The tensor if it is dense in this format, else a copy that is.  The copy is freed when the call ends, while CUDA
// kernels may still read it: torch's allocator hands its memory only to work queued later on the same stream.
Tensor dense(const char* op, const char* name, const Tensor& tensor, MemoryFormat format = MemoryFormat::Contiguous);
std::optional<Tensor> dense(const char* op, const char* name, const std::optional<Tensor>& tensor,
                            MemoryFormat format = MemoryFormat::Contiguous);

// The data of a tensor, or null without one.
template <typename T>
const T* elements(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

// New tensors on the device of `like`.  An error of torch's allocator is raised with the operator in front.
Tensor empty(const char* op, const Tensor& like, const std::vector<int64_t>& shape, ScalarType type,
             MemoryFormat format = MemoryFormat::Contiguous);
// channels_last when the channels of `like` are the dense dimension, contiguous otherwise; the dtype of `like`.
Tensor empty_in_format_of(const char* op, const Tensor& like, const std::vector<int64_t>& shape);

}  // namespace adderops
