// The three conv2d passes with one output per thread, straight from the definition: they test host.py without the real
// kernels.
// Two of the `tiles` have a deliberate bug: 1 asks for a byte of workspace too few, 2 writes a pixel too far to the
// right.
#include "cuda/kernels.h"
#include "definition/conv2d.h"

namespace adderops {
namespace cuda {
namespace {

enum Which { kY, kDX, kDW };

// `scratch` has room for an element of every thread: it passes through there.
template <typename T, int W>
__global__ void pass_kernel(Conv2dArgs args, T* scratch, int64_t count, int64_t s1, int64_t s2, int64_t s3,
                            int offset) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const int64_t d = i % s3, c = i / s3 % s2, b = i / s3 / s2 % s1, a = i / s3 / s2 / s1;
  const auto value = W == kY    ? definition::forward<T>(args, a, b, c, d)
                     : W == kDX ? definition::grad_x<T>(args, a, b, c, d)
                                : definition::grad_w<T>(args, a, b, c, d);
  from_float(value, scratch + i);
  const int64_t* const stride = args.out.stride;
  static_cast<T*>(args.out.data)[a * stride[0] + b * stride[1] + c * stride[2] + (d + offset) * stride[3]] = scratch[i];
}

struct Shape {
  int64_t size[4];
  int64_t count() const { return size[0] * size[1] * size[2] * size[3]; }
};
template <int W>
Shape shape_of(const Conv2dProblem& p) {
  if (W == kY) return {p.N, p.C_out, p.OH, p.OW};
  if (W == kDX) return {p.N, p.C_in, p.H, p.W};
  return {p.C_out, p.C_in / p.groups, p.KH, p.KW};
}

template <int W>
int64_t workspace(const Conv2dArgs& args, const Device&, const Choice& choice) {
  const int64_t bytes = args.type == ElementType::kFloat64 ? 8 : args.type == ElementType::kFloat32 ? 4 : 2;
  return shape_of<W>(args.problem).count() * bytes - (choice.tile == 1);
}

template <typename T, int W>
cudaError_t run_type(const Conv2dArgs& args, int offset, void* workspace, cudaStream_t stream) {
  const Shape s = shape_of<W>(args.problem);
  const int64_t count = s.count();
  LAUNCH((pass_kernel<T, W>), int((count + 63) / 64), 64, stream, args, static_cast<T*>(workspace), count, s.size[1],
         s.size[2], s.size[3], offset);
  return cudaGetLastError();
}
template <int W>
cudaError_t run(const Conv2dArgs& args, const Device&, const Choice& choice, void* workspace, cudaStream_t stream) {
  switch (args.type) {
    case ElementType::kFloat32: return run_type<float, W>(args, choice.tile == 2, workspace, stream);
    case ElementType::kFloat64: return run_type<double, W>(args, choice.tile == 2, workspace, stream);
    case ElementType::kBFloat16: return run_type<BFloat16, W>(args, choice.tile == 2, workspace, stream);
    case ElementType::kFloat16: return run_type<Float16, W>(args, choice.tile == 2, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

extern const Pass<Conv2dArgs> kForward = {workspace<kY>, run<kY>, 3};
extern const Pass<Conv2dArgs> kGradX = {workspace<kDX>, run<kDX>, 3};
extern const Pass<Conv2dArgs> kGradW = {workspace<kDW>, run<kDW>, 3};

}  // namespace cuda
}  // namespace adderops
