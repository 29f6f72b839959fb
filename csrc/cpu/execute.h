// How a pass runs: the instruction set picked, a workspace allocated, its tasks spread over torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "kernels.h"

namespace adderops {
namespace cpu {

inline const Kernels& kernels_for(const char* op, ElementType type) {
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

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

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
  static inline thread_local std::unique_ptr<char, Free> kept_;
  static inline thread_local int64_t kept_bytes_ = 0;
  std::unique_ptr<char, Free> block_;
};

// Threads take tasks from a counter: which thread runs a task never matters (kernels.h).
template <typename Args>
void execute(const Pass<Args>& pass, const Args& args) {
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

}  // namespace cpu
}  // namespace adderops
