// How a kernel states its plan (../kernels.h): a shape with the layout of its workspace, and a function per stage.
//
// A kernel's shape is a plain struct that holds all that follows from the arguments alone.  It is computed once per
// call and travels in the plan to every task.  Its members `shared` and `worker` are Layouts with the Parts in them.
#pragma once
#include "../../sizes.h"
#include "../kernels.h"
#include "integers.h"

namespace adderops {
namespace cpu {
namespace {

// An array in the workspace: in the part that all tasks share, or in the worker's own.
template <typename T>
struct Part {
  int64_t offset;
  T* in(char* workspace) const { return reinterpret_cast<T*>(workspace + offset); }
};

// Lays out arrays one after the other, 64-byte aligned.
struct Layout {
  int64_t bytes;
  template <typename T>
  void add(Part<T>* part, int64_t count) {
    part->offset = bytes;
    bytes = sum(bytes, ceil_div(product(count, sizeof(T)), 64) * 64);
  }
};

template <typename Args, typename Shape>
using Task = void (*)(const Args&, const Shape&, int64_t task, char* shared, char* worker);

template <typename Args, typename Shape, Task<Args, Shape> task_of>
void run_task(const Plan<Args>& plan, const Args& args, int64_t task, char* shared, char* worker) {
  task_of(args, *reinterpret_cast<const Shape*>(plan.shape), task, shared, worker);
}

// `first` and `second`: what the two stages run for each of their tasks.
template <typename Args, typename Shape, Task<Args, Shape> first>
Plan<Args> make_plan(const Shape& shape, int64_t first_tasks) {
  static_assert(sizeof(Shape) <= sizeof(Plan<Args>::shape) && alignof(Shape) <= 8, "kShapeBytes is too small");
  static_assert(__is_trivially_copyable(Shape), "a plan is copied byte by byte");
  Plan<Args> plan{
      shape.shared.bytes, shape.worker.bytes, {{first_tasks, run_task<Args, Shape, first>}, {0, nullptr}}, {}};
  __builtin_memcpy(plan.shape, &shape, sizeof(shape));
  return plan;
}
template <typename Args, typename Shape, Task<Args, Shape> first, Task<Args, Shape> second>
Plan<Args> make_plan(const Shape& shape, int64_t first_tasks, int64_t second_tasks) {
  Plan<Args> plan = make_plan<Args, Shape, first>(shape, first_tasks);
  plan.stages[1] = {second_tasks, run_task<Args, Shape, second>};
  return plan;
}

// Calls f with a zero of the element type; float64 goes through the definition.
template <typename F>
void dispatch(ElementType type, const F& f) {
  if (type == ElementType::kFloat32) f(float{});
  if (type == ElementType::kBFloat16) f(BFloat16{});
  if (type == ElementType::kFloat16) f(Float16{});
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
