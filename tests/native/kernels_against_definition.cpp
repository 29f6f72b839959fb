// Runs every kernel set that this machine has against the plain loops of definition.h, without torch: proof that the
// kernels need none, and a way to execute them for another architecture under an emulator.
// Integer-valued data make every sum exact, so the results must be equal bit for bit.  Exit status 0: all equal.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

using namespace adderops;

namespace {

struct Random {
  uint64_t state;
  int64_t below(int64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(n));
  }
};

struct Tensor {
  std::vector<float> data;
  Operand operand;
  Tensor(const int64_t (&size)[4], bool channels_last) : data(size[0] * size[1] * size[2] * size[3]) {
    const int64_t a = size[1], h = size[2], w = size[3];
    if (channels_last)
      operand = {data.data(), {h * w * a, 1, w * a, a}};
    else
      operand = {data.data(), {a * h * w, h * w, w, 1}};
  }
  void fill(Random* random) {
    for (float& v : data) v = static_cast<float>(random->below(33) - 16) / 4;
  }
};

void run(const cpu::Pass& pass, const Conv2dArgs& args) {
  const cpu::Plan plan = pass.plan(args);
  // sizes that aligned_alloc accepts, and never zero
  char* shared = static_cast<char*>(std::aligned_alloc(64, (plan.shared_bytes / 64 + 1) * 64));
  char* worker = static_cast<char*>(std::aligned_alloc(64, (plan.worker_bytes / 64 + 1) * 64));
  for (int stage = 0; stage < plan.stages; ++stage)
    for (int64_t task = 0; task < plan.tasks[stage]; ++task) pass.run(args, stage, task, shared, worker);
  std::free(shared);
  std::free(worker);
}

bool check(const char* isa, const char* name, const cpu::Pass& pass, const cpu::Pass& definition, Conv2dArgs args,
           const Tensor& like) {
  Tensor got = like, expected = like;
  got.operand.data = got.data.data(), expected.operand.data = expected.data.data();
  args.out = got.operand;
  run(pass, args);
  args.out = expected.operand;
  run(definition, args);
  for (size_t i = 0; i < got.data.size(); ++i)
    if (!(got.data[i] == expected.data[i])) {
      const Conv2dProblem& p = args.problem;
      std::printf("%s %s: element %zu: %g, expected %g (N %d, C_in %d, %dx%d, C_out %d, kernel %dx%d, groups %d)\n",
                  isa, name, i, got.data[i], expected.data[i], int(p.N), int(p.C_in), int(p.H), int(p.W), int(p.C_out),
                  int(p.KH), int(p.KW), int(p.groups));
      return false;
    }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  int count = 0, failed = 0;
  const cpu::Kernels* const* all = cpu::available_kernels(&count);
  Random random{1};
  for (int i = 0; i < cases; ++i) {
    Conv2dProblem p{};
    p.groups = random.below(3) ? 1 : 1 + random.below(3);
    p.C_in = p.groups * (1 + random.below(40)), p.C_out = p.groups * (1 + random.below(40));
    if (i % 8 == 0) p.groups = p.C_in, p.C_out = p.C_in * (1 + random.below(2));
    p.N = 1 + random.below(3), p.H = 5 + random.below(8), p.W = 5 + random.below(12);
    p.KH = 1 + random.below(4), p.KW = 1 + random.below(4);
    p.stride_h = 1 + random.below(3), p.stride_w = 1 + random.below(3);
    p.dilation_h = p.dilation_w = 1;
    p.pad_top = random.below(3), p.pad_left = random.below(3);
    p.OH = (p.H + 2 * p.pad_top - p.KH) / p.stride_h + 1, p.OW = (p.W + 2 * p.pad_left - p.KW) / p.stride_w + 1;

    Tensor x({p.N, p.C_in, p.H, p.W}, random.below(2)), w({p.C_out, p.C_in / p.groups, p.KH, p.KW}, random.below(2));
    Tensor y({p.N, p.C_out, p.OH, p.OW}, random.below(2)), bias({1, p.C_out, 1, 1}, false);
    for (Tensor* t : {&x, &w, &y, &bias}) t->fill(&random);
    Conv2dArgs forward{p, ElementType::kFloat32, x.operand, w.operand, {}, {}, bias.data.data()};
    Conv2dArgs backward{p, ElementType::kFloat32, x.operand, w.operand, y.operand, {}, nullptr};
    for (int k = 0; k < count; ++k) {
      const cpu::Kernels &kernels = *all[k], &definition = cpu::kDefinitionKernels;
      failed += !check(kernels.name, "forward", kernels.forward, definition.forward, forward, y);
      failed += !check(kernels.name, "grad_x", kernels.grad_x, definition.grad_x, backward, x);
      failed += !check(kernels.name, "grad_w", kernels.grad_w, definition.grad_w, backward, w);
    }
  }
  for (int k = 0; k < count; ++k) std::printf("%s ", all[k]->name);
  std::printf(": %d cases, %d failed\n", cases, failed);
  return failed != 0;
}
