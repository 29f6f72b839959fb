// The CUDA side of the operators: allocates, hands the kernels the current stream, turns their status into errors.
// A library of its own, adderops._cuda: the schemas and the CPU kernels in adderops._C work without it.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <unordered_map>

#include "../checks.h"
#include "execute.h"

#if !defined(ADDEROPS_CUDA_ARCHS)
#error "ADDEROPS_CUDA_ARCHS: the architectures of the kernels, as TORCH_CUDA_ARCH_LIST names them (setup.py)"
#endif

namespace adderops {
namespace cuda {
namespace {

using Ints = std::vector<int64_t>;
namespace accelerator = torch::stable::accelerator;

// Which of the architectures in `archs` ("8.0;9.0a;12.0+PTX") a device of this capability runs, as 10 * major + minor,
// or 0: machine code of its generation, else the PTX nearest below it.  The choice is the driver's; its rule is
// documented.
int64_t code_for(const std::string& archs, int64_t capability) {
  int64_t machine_code = 0, ptx = 0;
  for (size_t at = 0; at < archs.size();) {
    const size_t end = std::min(archs.find(';', at), archs.size());
    const std::string arch = archs.substr(at, end - at);
    at = end + 1;
    const size_t dot = arch.find('.');
    if (dot == std::string::npos) continue;
    const int64_t major = std::atoll(arch.c_str()), code = 10 * major + (arch[dot + 1] - '0');
    const bool exact = dot + 2 < arch.size() && arch[dot + 2] != '+';  // 9.0a: of this one capability
    if (code > capability || (exact && code != capability)) continue;
    if (major == capability / 10) machine_code = std::max(machine_code, code);
    if (arch.find("+PTX") != std::string::npos) ptx = std::max(ptx, code);
  }
  return machine_code ? machine_code : ptx;
}

}  // namespace

void check(const char* op, cudaError_t status) {
  REQUIRE(status == cudaSuccess, op, ": CUDA error: ", cudaGetErrorString(status));
}

// Asked once for each device: a call takes microseconds, and so would the questions.
Device properties(const char* op, int index) {
  static std::mutex mutex;
  static std::unordered_map<int, Device> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(index);
  if (found != known.end()) return found->second;
  int major = 0, minor = 0, multiprocessors = 0;
  check(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  check(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  check(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index));
  // Some kernels are empty in the code for some architectures: what counts is the code that runs, not the device.
  const int64_t code = code_for(ADDEROPS_CUDA_ARCHS, 10 * major + minor);
  REQUIRE(code, op, ": x: expected a device that runs kernels for ", ADDEROPS_CUDA_ARCHS, ", got one of ", major, ".",
          minor, "; build adderops with TORCH_CUDA_ARCH_LIST=", major, ".", minor);
  return known[index] = {static_cast<int>(code), multiprocessors};
}

// Not torch::stable::accelerator::Stream, which hands out its cudaStream_t from torch 2.13 on only.
cudaStream_t current_stream(int index) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  return static_cast<cudaStream_t>(stream);
}

namespace {

// Queues a pass on the current stream of x's device.  The workspace comes from torch's allocator, which hands it out
// again only to work that this stream does later: it may be let go while the kernels still run.
void execute(const char* op, const Pass& pass, const Conv2dArgs& args, const Tensor& x) {
  const int index = x.get_device_index();
  const accelerator::DeviceGuard guard(index);
  const Device device = properties(op, index);
  const int64_t bytes = pass.workspace(args, device, kAutomatic);
  std::optional<Tensor> workspace;
  if (bytes) workspace = empty(op, x, {bytes}, torch::headeronly::ScalarType::Byte);
  check(op, pass.run(args, device, kAutomatic, workspace ? workspace->data_ptr() : nullptr, current_stream(index)));
}

Tensor adder_conv2d(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, Ints stride, Ints padding,
                    Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  std::optional<Tensor> dense_bias;
  if (bias) {
    check_tensor(op, "bias", *bias, x, {p.C_out});
    dense_bias = dense(op, "bias", *bias);
    args.bias = dense_bias->data_ptr();
  }
  Tensor y = empty_in_format_of(op, x, {p.N, p.C_out, p.OH, p.OW});
  args.out = operand(y);
  collapse_full_kernel(&args, false);
  if (y.numel()) execute(op, kForward, args, x);
  return y;
}

Tensor adder_conv2d_grad_x(const Tensor& grad_y, const Tensor& x, const Tensor& w, Ints stride, Ints padding,
                           Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d_grad_x";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  check_tensor(op, "grad_y", grad_y, x, {p.N, p.C_out, p.OH, p.OW});
  args.grad_y = operand(grad_y);
  Tensor grad_x = empty_in_format_of(op, x, {p.N, p.C_in, p.H, p.W});
  args.out = operand(grad_x);
  collapse_full_kernel(&args, true);
  if (grad_x.numel()) execute(op, kGradX, args, x);
  return grad_x;
}

Tensor adder_conv2d_grad_w(const Tensor& grad_y, const Tensor& x, const Tensor& w, Ints stride, Ints padding,
                           Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d_grad_w";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  check_tensor(op, "grad_y", grad_y, x, {p.N, p.C_out, p.OH, p.OW});
  args.grad_y = operand(grad_y);
  Tensor grad_w = empty_in_format_of(op, w, {p.C_out, p.C_in / p.groups, p.KH, p.KW});
  args.out = operand(grad_w);
  if (!grad_y.numel()) return torch::stable::zero_(grad_w);  // an empty batch: a sum of nothing
  collapse_full_kernel(&args, true);
  execute(op, kGradW, args, x);
  return grad_w;
}

std::string cuda_archs() { return ADDEROPS_CUDA_ARCHS; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adderops, CUDA, m) {
  m.impl("adder_conv2d", TORCH_BOX(&adder_conv2d));
  m.impl("adder_conv2d_grad_x", TORCH_BOX(&adder_conv2d_grad_x));
  m.impl("adder_conv2d_grad_w", TORCH_BOX(&adder_conv2d_grad_w));
}

STABLE_TORCH_LIBRARY_IMPL(adderops, CompositeExplicitAutograd, m) {
  m.impl("_cuda_archs", TORCH_BOX(&cuda_archs));
  m.impl("_cuda_code_for", TORCH_BOX(&code_for));
}

}  // namespace cuda
}  // namespace adderops

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda(void) { return PyModule_Create(&module); }
