// The library adderops._cuda: the operators on CUDA.  adderops._C (schemas, CPU kernels) works without it.
#include "../ops.h"

#include <Python.h>

#include "device.h"

namespace adderops {
namespace cuda {

STABLE_TORCH_LIBRARY_IMPL(adderops, CUDA, m) {
  for (const Operator& op : kOperators<Cuda>) implement(m, op);
}

STABLE_TORCH_LIBRARY_IMPL(adderops, CompositeExplicitAutograd, m) {
  m.impl("_cuda_archs", boxed<archs>);
  m.impl("_cuda_code_for", boxed<code_for>);
  m.impl("_cuda_version", boxed<version>);
}

}  // namespace cuda
}  // namespace adderops

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__cuda(void) { return PyModule_Create(&module); }
