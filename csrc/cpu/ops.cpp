// The library adderops._C: every schema, and the operators on the CPU.
#include "../ops.h"

#include <Python.h>

#include "execute.h"

namespace adderops {
namespace cpu {
namespace {

struct Cpu {
  using Kernels = cpu::Kernels;
  static constexpr const char* kName = "the CPU";

  template <typename Pass, typename Args>
  static void run(const char* op, const Tensor& x, Pass Kernels::* pass, const Args& args) {
    const bool float64 = x.scalar_type() == ScalarType::Double;
    execute(op, kernels_for(op, float64 ? ElementType::kFloat64 : ElementType::kFloat32).*pass, args);
  }
  template <typename Pass, typename Args>
  static void run(const char* op, const Tensor& x, Pass Kernels::* pass, const List<Args>& list) {
    for (int64_t i = 0; i < list.count; ++i) run(op, x, pass, list.items[i]);
  }
};

std::string isa() { return kernels_for("_cpu_isa", ElementType::kFloat32).name; }

std::vector<std::string> isas() {
  int count = 0;
  const Kernels* const* all = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back(all[i]->name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY(adderops, m) {
  for (const Operator& op : kOperators<Cpu>) define(m, op);
  // the CPU instruction set that the next call uses, and all that this machine runs, weakest first
  m.def("_cpu_isa() -> str");
  m.def("_cpu_isas() -> str[]");
  // Only where adderops._cuda is loaded: the architectures of the CUDA kernels as TORCH_CUDA_ARCH_LIST names them; the
  // one of a list that a device of a compute capability (10*major + minor) runs, or 0; the CUDA that they are built
  // with, 13000 for 13.0.
  m.def("_cuda_archs() -> str");
  m.def("_cuda_code_for(str archs, int capability) -> int");
  m.def("_cuda_version() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(adderops, CPU, m) {
  for (const Operator& op : kOperators<Cpu>) implement(m, op);
}

STABLE_TORCH_LIBRARY_IMPL(adderops, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", boxed<isa>);
  m.impl("_cpu_isas", boxed<isas>);
}

}  // namespace cpu
}  // namespace adderops

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C(void) { return PyModule_Create(&module); }
