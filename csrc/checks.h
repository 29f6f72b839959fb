// The checks that memory safety needs.  Every error text has the form "operator: argument: expected X, got Y".
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "args/conv2d.h"

namespace adderops {

using torch::stable::Tensor;

// Throws a RuntimeError whose text is the parts: no file, no line.
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

// Parts of error texts.
std::string text_of(const std::vector<int64_t>& values);
std::string shape_of(const Tensor& tensor);
std::string dtype_of(const Tensor& tensor);

// Does the tensor's storage hold all of its elements?  The storage of a parameter that FSDP has freed does not.
void check_storage(const char* op, const char* name, const Tensor& tensor);

// Checks that the tensor is on the device of x, the call's first.
void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& x);

// Checks one more tensor of a call, of any dtype: the device of x, this shape, its storage.
void check_shape(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                 const std::vector<int64_t>& shape);

// The same, and the dtype of x.
void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                  const std::vector<int64_t>& shape);

// The element type of x, which must be one of the four.
ElementType check_element_type(const char* op, const Tensor& x);

void check_range(const char* op, const char* name, int64_t value, int64_t least, int64_t most);

// The geometry of a convolution, as in the schemas.
struct Geometry {
  std::vector<int64_t> stride;    // h, w
  std::vector<int64_t> padding;   // top, bottom, left, right
  std::vector<int64_t> dilation;  // h, w
  int64_t groups;
  using Arguments = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, int64_t>;
};

// Checks x, w (any dtype, but the same) and the geometry of a convolution.
Conv2dProblem check_convolution(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry);

}  // namespace adderops
