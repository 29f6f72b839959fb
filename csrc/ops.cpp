// The operators of adderops: every schema, once.  Formulas: adderops/functional.py; contract: conv2d_problem.h.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// x (N, C_in, H, W) with any strides, w (C_out, C_in/groups, KH, KW), bias (C_out); stride (h, w),
// padding (top, bottom, left, right), dilation (h, w).
STABLE_TORCH_LIBRARY(adderops, m) {
  // -> (N, C_out, OH, OW), channels_last where x is
  m.def(
      "adder_conv2d(Tensor x, Tensor w, Tensor? bias, int[] stride, int[] padding, int[] dilation, int groups)"
      " -> Tensor");
  // grad_y (N, C_out, OH, OW) -> (N, C_in, H, W): the clamped training gradient, not the derivative
  m.def(
      "adder_conv2d_grad_x(Tensor grad_y, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation, int groups)"
      " -> Tensor");
  // grad_y (N, C_out, OH, OW) -> (C_out, C_in/groups, KH, KW): the full-precision training gradient, not the derivative
  m.def(
      "adder_conv2d_grad_w(Tensor grad_y, Tensor x, Tensor w, int[] stride, int[] padding, int[] dilation, int groups)"
      " -> Tensor");
  // uint8, one scale for x and w; x is padding_value outside the image -> (N, C_out, OH, OW), channels_last:
  //   Y = -sum |x - w| as int32, without scale;
  //   z = (offset + scale * Y) + residual_scale * residual as float32; scale and offset (C_out), residual uint8
  //   or float32; with relu at least 0, or zero_point; with quantize rounded to uint8 of at most quant_max
  m.def(
      "adder_conv2d_int8(Tensor x, Tensor w, Tensor? scale, Tensor? offset, Tensor? residual, float residual_scale, "
      "bool relu, bool quantize, int zero_point, int quant_max, int padding_value, int[] stride, int[] padding, "
      "int[] dilation, int groups) -> Tensor");
  // (N, C, H, W), float32, bfloat16 or float16 -> uint8, channels_last: round(x / scale) + zero_point, bounded
  m.def("quantize(Tensor x, float scale, int zero_point, int quant_max) -> Tensor");
  // What adderops.distill computes on the CPU, float32 alone; csrc/args/moments.h has the formulas.
  // -> (2C + 1, 2C): E[z z^T], and E[z] as the last row
  m.def(
      "_kernel_moments(Tensor student, Tensor teacher, float scale_a, float scale_c, float centre_a, float centre_c, "
      "bool exponential) -> Tensor");
  // weights (2C + 1, C) -> (N, C, H, W) in the format of student
  m.def(
      "_kernel_moments_grad(Tensor weights, Tensor student, Tensor teacher, float scale_a, float scale_c, "
      "float centre_a, float centre_c, bool exponential) -> Tensor");
  // (N, C, H, W), contiguous or channels_last -> (N)
  m.def("_abs_sum(Tensor x) -> Tensor");
  // the CPU instruction set that the next call uses, and all that this machine runs, weakest first
  m.def("_cpu_isa() -> str");
  m.def("_cpu_isas() -> str[]");
  // Only where adderops._cuda is loaded: the architectures of the CUDA kernels as TORCH_CUDA_ARCH_LIST names them; the
  // one of a list that a device of a compute capability (10*major + minor) runs, or 0.
  m.def("_cuda_archs() -> str");
  m.def("_cuda_code_for(str archs, int capability) -> int");
}

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) { return PyModule_Create(&module); }
