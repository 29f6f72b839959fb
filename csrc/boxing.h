// Functions in the form that torch's dispatcher calls: arguments on a stack, in the order of the schema.  Unlike with
// TORCH_BOX, one parameter may be a struct of several arguments, which lists their types as `Arguments`.
#pragma once
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <tuple>
#include <type_traits>

#include "checks.h"

namespace adderops {
namespace boxing {

// A parameter of type T: how many arguments of the schema it holds, and how it takes them off the stack.
template <typename T, typename = void>
struct Parameter {
  static constexpr uint64_t kArguments = 1;
  static T take(const StableIValue*& stack) { return torch::stable::detail::to<T>(*stack++); }
};
template <typename T>
struct Parameter<T, std::void_t<typename T::Arguments>> {
  static constexpr uint64_t kArguments = std::tuple_size_v<typename T::Arguments>;
  static T take(const StableIValue*& stack) { return fields(stack, static_cast<typename T::Arguments*>(nullptr)); }
  template <typename... Fields>
  static T fields(const StableIValue*& stack, std::tuple<Fields...>*) {
    return T{torch::stable::detail::to<Fields>(*stack++)...};  // braces: from left to right
  }
};

template <typename Result, typename... Parameters>
Result call(Result (*function)(Parameters...), [[maybe_unused]] const StableIValue* stack, uint64_t count) {
  constexpr uint64_t kArguments = (Parameter<std::decay_t<Parameters>>::kArguments + ... + 0);
  REQUIRE(count == kArguments, "adderops: expected a schema of ", kArguments, " arguments, got ", count);
  const std::tuple<std::decay_t<Parameters>...> parameters{Parameter<std::decay_t<Parameters>>::take(stack)...};
  return std::apply(function, parameters);
}

}  // namespace boxing

// The boxed form of a function with one result.
template <auto function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t) {
  stack[0] = torch::stable::detail::from(boxing::call(function, stack, arguments));
}

}  // namespace adderops
