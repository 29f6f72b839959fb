// Runs a pass: picks the instruction set, allocates the workspace, and spreads the tasks over torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

#include "../checks.h"
#include "../sizes.h"
#include "kernels.h"
#include "workspace.h"

namespace adderops {
namespace cpu {

inline const Kernels& kernels_for(const char* op, ElementType type) {
  const Kernels* kernels = selected_kernels();
  if (!kernels) {
    std::string names;
    int count = 0;
    const Kernels* const* all = available_kernels(&count);
    for (int i = 0; i < count; ++i) names += std::string(i ? ", " : "") + all[i]->name;
    raise(op, ": ADDEROPS_CPU_ISA: expected one of ", names, " on this machine, got '", std::getenv("ADDEROPS_CPU_ISA"),
          "'");
  }
  return type == ElementType::kFloat64 ? kDefinitionKernels : *kernels;
}

inline int64_t round_up(int64_t value, int64_t step) { return product(sum(value, step - 1) / step, step); }

// Threads take tasks from a counter; which thread runs a task never matters (kernels.h).
template <typename Args>
void execute(const char* op, Pass<Args> pass, const Args& args) {
  const Plan<Args> plan = pass(args);
  int64_t most = 1;
  for (const auto& stage : plan.stages) most = std::max(most, stage.tasks);
  const int64_t threads = torch::stable::get_num_threads(), workers = std::min(threads, most);
  // One page between the workers' parts keeps them from falling on the same cache sets.
  const int64_t shared_bytes = round_up(plan.shared_bytes, kAlignment);
  const int64_t worker_bytes = sum(round_up(plan.worker_bytes, kAlignment), kAlignment);
  const Workspace workspace(op, sum(shared_bytes, product(workers, worker_bytes)), threads);
  char* const shared = workspace.get();
  char* const scratch = shared + shared_bytes;
  for (const auto& stage : plan.stages) {
    if (!stage.tasks) continue;
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, std::min(workers, stage.tasks), 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker)
        for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < stage.tasks;)
          stage.run(plan, args, task, shared, scratch + worker * worker_bytes);
    });
  }
}

}  // namespace cpu
}  // namespace adderops
