// Tensors -> Conv2dArgs, and every error text of the C++ side: operator, argument, expected, got.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "conv2d_problem.h"

namespace adderops {

using torch::stable::Tensor;

// The integers of a call as the schema has them.
struct Geometry {
  const std::vector<int64_t>& stride;
  const std::vector<int64_t>& padding;
  const std::vector<int64_t>& dilation;
  int64_t groups;
};

// Checks x, w and the geometry, and fills everything of the result but grad_y, out and bias.
Conv2dArgs check_conv2d(const char* op, const Tensor& x, const Tensor& w, const Geometry& geometry);

// Checks one more tensor of the call: same device and dtype as x, and this shape.
void check_tensor(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                  const std::vector<int64_t>& shape);

// Checks float32 images on the CPU, (N, C, H, W), of which none is 0; `in_pieces`: each image is one piece of memory.
void check_images(const char* op, const char* name, const Tensor& images, bool in_pieces = false);

Operand operand(const Tensor& tensor);

// A kernel as large as its input is a linear layer: (C_in, H, W) become C_in*H*W channels of a single pixel, where x, w
// and the gradient of either have them in one piece.  To be called when `out` is filled.
void collapse_full_kernel(Conv2dArgs* args, bool writes_gradient);

// channels_last when the channels of `like` are the dense dimension, contiguous otherwise; `like` gives device, dtype.
Tensor empty_in_format_of(const Tensor& like, const std::vector<int64_t>& shape);

}  // namespace adderops
