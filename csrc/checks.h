// Tensors -> Conv2dArgs, and every error text of the C++ side: operator, argument, expected, got.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "args/conv2d.h"
#include "args/int8.h"

namespace adderops {

using torch::stable::Tensor;

// A RuntimeError of the parts and nothing else: no file, no line.
template <typename... Parts>
[[noreturn]] __attribute__((noinline, cold)) void raise(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}
#define REQUIRE(condition, ...)                       \
  do {                                                \
    if (!(condition)) ::adderops::raise(__VA_ARGS__); \
  } while (false)

// The integers of a call as the schema has them.
struct Geometry {
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
  int64_t groups;
};

// Checks x, w and the geometry, and fills everything of the result but grad_y, out and bias.
Conv2dArgs check_conv2d(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry);

// What the int8 convolution takes beside x, w and the geometry; csrc/ops.cpp has the schema.
struct Int8Options {
  const std::optional<Tensor>&scale, &offset, &residual;
  double residual_scale;
  bool relu, quantize;
  int64_t zero_point, quant_max, padding_value;
};

// Checks an int8 call, makes its tensors dense in channels_last, and fills everything but y.
struct Int8Call {
  Int8Args args;
  std::vector<Tensor> owners;  // of the memory that args points to
};
Int8Call check_conv2d_int8(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry,
                           const Int8Options& options);

// y of the call, channels_last.
Tensor empty_int8_output(const char* op, const Tensor& x, const Int8Args& args);

// Everything of a call of quantize but y.
QuantizeArgs check_quantize(const char* op, const Tensor& x, double scale, int64_t zero_point, int64_t quant_max);

// Checks one more tensor of the call: same device and dtype as x, and this shape.
void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                  const std::vector<int64_t>& shape);

// Checks float32 images on the CPU, (N, C, H, W), of which none is 0; `in_pieces`: each image is one piece of memory.
void check_images(const char* op, const char* name, const Tensor& images, bool in_pieces = false);

// The same for a tensor of any dtype.  Like every check here it ends with check_storage.
void check_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                 const std::vector<int64_t>& shape);

// Does the tensor's storage hold all of its elements?  That of a parameter that FSDP has freed does not.
void check_storage(const char* op, const char* name, const Tensor& tensor);

Operand operand(const Tensor& tensor);

// The tensor, or a contiguous copy.
Tensor dense(const char* op, const char* name, const Tensor& tensor,
             torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous);

// A kernel as large as its input is a linear layer: (C_in, H, W) become C_in*H*W channels of a single pixel, where x, w
// and the gradient of either have them in one piece.  To be called when `out` is filled.
void collapse_full_kernel(Conv2dArgs* args, bool writes_gradient);

// New tensors on the device of `like`; an error of torch's allocator is raised again with the operator in front.
Tensor empty(const char* op, const Tensor& like, const std::vector<int64_t>& shape, torch::headeronly::ScalarType type,
             torch::headeronly::MemoryFormat format = torch::headeronly::MemoryFormat::Contiguous);
// channels_last when the channels of `like` are the dense dimension, contiguous otherwise; the dtype of `like`.
Tensor empty_in_format_of(const char* op, const Tensor& like, const std::vector<int64_t>& shape);

}  // namespace adderops
