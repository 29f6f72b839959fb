// Integrate-and-fire neurons on any device (ops.h says what a device supplies).
#pragma once
#include <torch/csrc/stable/ops.h>

#include <limits>

#include "args/integrate_and_fire.h"
#include "sizes.h"
#include "tensors.h"

namespace adderops {

// The neurons, and which outputs are wanted, as in the schema.
struct NeuronOptions {
  std::optional<Tensor> initial;
  double decay, gain, fire;
  bool subtract, scaled, spikes, counts, membrane;
  using Arguments = std::tuple<std::optional<Tensor>, double, double, double, bool, bool, bool, bool, bool>;
};

// The strides of images (N, C, S), S = H*W or as many dimensions as there are: of `tensor`, whose dimensions are those of
// x from `first` on.  0 where it has none, or of one element; nothing if its pixels are not evenly spaced.
struct ImageStrides {
  int64_t n, c, s;
};
inline std::optional<ImageStrides> image_strides(const Tensor& tensor, int64_t first, const Tensor& x) {
  const auto stride = [&](int64_t dim) {
    return dim >= first && tensor.size(dim - first) > 1 ? tensor.stride(dim - first) : 0;
  };
  const int64_t dims = std::min(x.dim(), first + tensor.dim());
  ImageStrides strides{stride(1), dims > 2 ? stride(2) : 0, 0};
  int64_t expected = -1;  // of the next dimension with several elements
  for (int64_t dim = dims - 1; dim > 2; --dim) {
    if (x.size(dim) == 1) continue;
    if (expected < 0) strides.s = stride(dim);
    if (expected >= 0 && stride(dim) != expected) return std::nullopt;
    expected = product(stride(dim), x.size(dim));
  }
  return strides;
}

// A step of x as images (N, C, S).
struct Step {
  int64_t N, C, S;
  Order order;
  std::vector<int64_t> shape;

  explicit Step(const Tensor& x) : N(x.size(1)), C(1), S(1), order(Order::kOther) {
    for (int64_t dim = 1; dim < x.dim(); ++dim) shape.push_back(x.size(dim));
    if (x.dim() > 2) C = x.size(2);
    for (int64_t dim = 3; dim < x.dim(); ++dim) S = product(S, x.size(dim));
    const std::optional<ImageStrides> strides = image_strides(x, 0, x);
    if (strides && (N == 1 || strides->n == product(C, S))) {
      if ((C == 1 || strides->c == 1) && (S == 1 || strides->s == C)) order = Order::kChannelsLast;
      if ((C == 1 || strides->c == S) && (S == 1 || strides->s == 1)) order = Order::kChannelsFirst;
    }
  }

  // Sizes and strides, outermost first, in the order of memory of a dense step.  Where there is one pixel, the channels
  // are innermost, and where there is one channel too, the images.
  void in_order(int64_t n, int64_t c, int64_t s, int64_t (&sorted)[3]) const {
    const bool one = C == 1 && S == 1, last = S == 1 || order == Order::kChannelsLast;
    sorted[0] = one ? c : n, sorted[1] = one || last ? s : c, sorted[2] = one ? n : last ? c : s;
  }

  // A result of these steps, or of one (T = nothing), in the memory format of x.
  Tensor empty_like(const char* op, const Tensor& x, std::optional<int64_t> T, ScalarType type) const {
    std::vector<int64_t> result = shape;
    if (T) result.insert(result.begin(), *T);
    if (order != Order::kChannelsLast) return empty(op, x, result, type);
    const Tensor y = empty(op, x, {T.value_or(1), N, S, C}, type);
    return torch::stable::view(torch::stable::transpose(y, 2, 3), result);
  }
};

// Checks a parameter.  `copy` holds its elements if they are not evenly spaced.
inline NeuronParameter neuron_parameter(const char* op, const char* name, const Tensor& tensor, const Tensor& x,
                                        const Step& step, bool state, std::optional<Tensor>* copy) {
  const ScalarType type = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  REQUIRE(tensor.scalar_type() == type, op, ": ", name, ": expected dtype ",
          type == ScalarType::Double ? "float64" : "float32", " with x of ", dtype_of(x), ", got ", dtype_of(tensor));
  check_device(op, name, tensor, x);
  check_storage(op, name, tensor);
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) shape.push_back(tensor.size(dim));
  const std::vector<int64_t> neurons(step.shape.begin() + 1, step.shape.end());
  const bool one = shape.empty() || shape == std::vector<int64_t>{1};
  const bool per_channel = x.dim() > 2 && shape == std::vector<int64_t>{step.C};
  const bool of_state = state && shape == step.shape;
  REQUIRE(one || per_channel || shape == neurons || of_state, op, ": ", name, ": expected one number, ",
          x.dim() > 2 ? "one per channel, " : "", "shape ", text_of(neurons), state ? " or " + text_of(step.shape) : "",
          ", got shape ", shape_of(tensor));
  const int64_t first = one ? x.dim() : of_state ? 1 : 2;
  std::optional<ImageStrides> strides = image_strides(tensor, first, x);
  if (!strides) {
    *copy = dense(op, name, tensor);
    strides = image_strides(**copy, first, x);
  }
  NeuronParameter parameter{copy->value_or(tensor).data_ptr(), {}};
  step.in_order(strides->n, strides->c, strides->s, parameter.stride);
  return parameter;
}

template <class Device>
std::vector<Tensor> integrate_and_fire(const Tensor& x, const Tensor& threshold, const NeuronOptions& options) {
  const char* op = "integrate_and_fire";
  REQUIRE(x.dim() > 1, op, ": x: expected 2 dimensions (T, N) or more, got shape ", shape_of(x));
  IntegrateAndFireArgs args{};
  args.T = x.size(0), args.type = check_element_type(op, x);
  REQUIRE(args.T <= std::numeric_limits<int32_t>::max(), op, ": x: expected fewer than 2^31 steps, got ", args.T);
  REQUIRE(options.spikes || options.counts || options.membrane, op, ": spikes: expected one output or more, got none");
  check_storage(op, "x", x);
  const Step step(x);
  step.in_order(step.N, step.C, step.S, args.size);

  std::optional<Tensor> dense_threshold, dense_initial;
  args.threshold = neuron_parameter(op, "threshold", threshold, x, step, false, &dense_threshold);
  if (options.initial) args.initial = neuron_parameter(op, "initial", *options.initial, x, step, true, &dense_initial);
  args.decay = options.decay, args.gain = options.gain, args.fire = options.fire;
  args.subtract = options.subtract, args.scaled = options.scaled;

  const bool constant = args.T > 1 && x.stride(0) == 0;
  Tensor steps = x;
  if (constant) steps = torch::stable::narrow(steps, 0, 0, 1);
  if (step.order == Order::kOther) steps = dense(op, "x", steps);
  args.x = steps.data_ptr(), args.x_step = constant ? 0 : steps.stride(0);

  std::vector<Tensor> out;
  const auto result = [&](bool wanted, std::optional<int64_t> T, ScalarType type) -> void* {
    if (!wanted) return nullptr;
    out.push_back(step.empty_like(op, x, T, type));
    return out.back().data_ptr();
  };
  const ScalarType wide = args.type == ElementType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  args.spikes = result(options.spikes, args.T, x.scalar_type());
  args.counts = result(options.counts, std::nullopt, wide);
  args.membrane = result(options.membrane, std::nullopt, wide);
  if (product(step.N, step.C, step.S)) Device::run(op, x, &Device::Kernels::integrate_and_fire, args);
  return out;
}

}  // namespace adderops
