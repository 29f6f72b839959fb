// The CPU side of the operators: allocates, picks the instruction set, spreads the tasks over torch's threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "../checks.h"
#include "kernels.h"

namespace adderops {
namespace cpu {
namespace {

using Ints = std::vector<int64_t>;

const Kernels& kernels_for(const char* op, ElementType type) {
  const Kernels* kernels = selected_kernels();
  if (!kernels) {
    std::string names;
    int count = 0;
    const Kernels* const* all = available_kernels(&count);
    for (int i = 0; i < count; ++i) names += std::string(i ? ", " : "") + all[i]->name;
    STD_TORCH_CHECK(false, op, ": ADDEROPS_CPU_ISA: expected one of ", names, " on this machine, got '",
                    std::getenv("ADDEROPS_CPU_ISA"), "'");
  }
  return type == ElementType::kFloat64 ? kDefinitionKernels : *kernels;
}

struct Free {
  void operator()(char* p) const { std::free(p); }
};

constexpr int64_t kAlignment = 4096;
constexpr int64_t kKept = 32 << 20;

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// A call's workspace.  Each calling thread keeps the last one up to kKept bytes: fresh pages from the system would cost
// a small call more than its arithmetic does.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    if (bytes <= kept_bytes_) {
      block_ = std::move(kept_);
    } else {
      kept_.reset();
      block_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, bytes)));
      if (!block_) throw std::bad_alloc();
      kept_bytes_ = bytes;
    }
  }
  ~Workspace() {
    if (kept_bytes_ <= kKept)
      kept_ = std::move(block_);
    else
      kept_bytes_ = 0;
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  char* get() const { return block_.get(); }

 private:
  static thread_local std::unique_ptr<char, Free> kept_;
  static thread_local int64_t kept_bytes_;
  std::unique_ptr<char, Free> block_;
};
thread_local std::unique_ptr<char, Free> Workspace::kept_;
thread_local int64_t Workspace::kept_bytes_ = 0;

// Threads take tasks from a counter: which thread runs a task never matters (kernels.h).
void execute(const Pass& pass, const Conv2dArgs& args) {
  const Plan plan = pass.plan(args);
  int64_t most = 1;
  for (int s = 0; s < plan.stages; ++s) most = std::max(most, plan.tasks[s]);
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), most);
  // One page between the workers' blocks keeps them from falling on the same cache sets.
  const int64_t shared_bytes = round_up(plan.shared_bytes, kAlignment);
  const int64_t worker_bytes = round_up(plan.worker_bytes, kAlignment) + kAlignment;
  const Workspace workspace(shared_bytes + workers * worker_bytes);
  char* const shared = workspace.get();
  char* const scratch = shared + shared_bytes;
  for (int stage = 0; stage < plan.stages; ++stage) {
    std::atomic<int64_t> next{0};
    const int64_t tasks = plan.tasks[stage];
    torch::stable::parallel_for(0, std::min(workers, tasks), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
          pass.run(args, stage, task, shared, scratch + worker * worker_bytes);
    });
  }
}

Tensor adder_conv2d(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, Ints stride, Ints padding,
                    Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  std::optional<Tensor> dense_bias;
  if (bias) {
    check_tensor(op, "bias", *bias, x, {p.C_out});
    dense_bias = torch::stable::contiguous(*bias);
    args.bias = dense_bias->data_ptr();
  }
  Tensor y = empty_in_format_of(x, {p.N, p.C_out, p.OH, p.OW});
  args.out = operand(y);
  collapse_full_kernel(&args, false);
  if (y.numel()) execute(kernels_for(op, args.type).forward, args);
  return y;
}

Tensor adder_conv2d_grad_x(const Tensor& grad_y, const Tensor& x, const Tensor& w, Ints stride, Ints padding,
                           Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d_grad_x";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  check_tensor(op, "grad_y", grad_y, x, {p.N, p.C_out, p.OH, p.OW});
  args.grad_y = operand(grad_y);
  Tensor grad_x = empty_in_format_of(x, {p.N, p.C_in, p.H, p.W});
  args.out = operand(grad_x);
  collapse_full_kernel(&args, true);
  if (grad_x.numel()) execute(kernels_for(op, args.type).grad_x, args);
  return grad_x;
}

Tensor adder_conv2d_grad_w(const Tensor& grad_y, const Tensor& x, const Tensor& w, Ints stride, Ints padding,
                           Ints dilation, int64_t groups) {
  const char* op = "adder_conv2d_grad_w";
  Conv2dArgs args = check_conv2d(op, x, w, {stride, padding, dilation, groups});
  const Conv2dProblem& p = args.problem;
  check_tensor(op, "grad_y", grad_y, x, {p.N, p.C_out, p.OH, p.OW});
  args.grad_y = operand(grad_y);
  Tensor grad_w = empty_in_format_of(w, {p.C_out, p.C_in / p.groups, p.KH, p.KW});
  args.out = operand(grad_w);
  if (!grad_y.numel()) return torch::stable::zero_(grad_w);  // an empty batch: a sum of nothing
  collapse_full_kernel(&args, true);
  execute(kernels_for(op, args.type).grad_w, args);
  return grad_w;
}

std::string cpu_isa() { return kernels_for("_cpu_isa", ElementType::kFloat32).name; }

std::vector<std::string> cpu_isas() {
  int count = 0;
  const Kernels* const* all = available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.push_back(all[i]->name);
  return names;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(adderops, CPU, m) {
  m.impl("adder_conv2d", TORCH_BOX(&adder_conv2d));
  m.impl("adder_conv2d_grad_x", TORCH_BOX(&adder_conv2d_grad_x));
  m.impl("adder_conv2d_grad_w", TORCH_BOX(&adder_conv2d_grad_w));
}

STABLE_TORCH_LIBRARY_IMPL(adderops, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("_cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace cpu
}  // namespace adderops
