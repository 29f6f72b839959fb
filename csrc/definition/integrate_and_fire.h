// An integrate-and-fire neuron, straight from the formula in args/integrate_and_fire.h.
#pragma once
#include "../args/integrate_and_fire.h"
#include "conv2d.h"

namespace adderops {
namespace definition {

template <typename U>
ADDEROPS_SHARED_CODE U neuron_parameter(const IntegrateAndFireArgs& args, const NeuronParameter& p, int64_t neuron) {
  if (!p.data) return 0;
  const int64_t row = neuron / args.size[2];
  const int64_t a = row / args.size[1], b = row % args.size[1], c = neuron % args.size[2];
  return static_cast<const U*>(p.data)[a * p.stride[0] + b * p.stride[1] + c * p.stride[2]];
}

// What all neurons of a call have in common, in the type of their membranes.
template <typename U>
struct Dynamics {
  U decay, gain, fire;
  bool subtract;
};
template <typename U>
ADDEROPS_SHARED_CODE Dynamics<U> dynamics(const IntegrateAndFireArgs& args) {
  return {(U)args.decay, (U)args.gain, (U)args.fire, args.subtract};
}

// A step of a neuron with membrane u and threshold v: whether it fires.  A NaN never does.
template <typename U>
ADDEROPS_SHARED_CODE bool fires(const Dynamics<U>& f, U x, U v, U* u) {
  *u = f.decay * *u + f.gain * x;
  const bool fired = *u >= f.fire * v;
  if (fired) *u = f.subtract ? *u - v : 0;
  return fired;
}

// All steps of a neuron.
template <typename T>
ADDEROPS_SHARED_CODE void integrate_and_fire(const IntegrateAndFireArgs& args, int64_t neuron) {
  using U = typename Sum<T>::type;
  const int64_t step = args.size[0] * args.size[1] * args.size[2];
  const U v = neuron_parameter<U>(args, args.threshold, neuron);
  U u = neuron_parameter<U>(args, args.initial, neuron);
  const Dynamics<U> f = dynamics<U>(args);
  int32_t count = 0;
  for (int64_t t = 0; t < args.T; ++t) {
    const bool fired = fires<U>(f, to_float(static_cast<const T*>(args.x)[t * args.x_step + neuron]), v, &u);
    const U spike = fired ? args.scaled ? v : 1 : 0;
    if (args.spikes) from_float(spike, static_cast<T*>(args.spikes) + t * step + neuron);
    count += fired;
  }
  if (args.counts) static_cast<U*>(args.counts)[neuron] = (U)count;
  if (args.membrane) static_cast<U*>(args.membrane)[neuron] = u;
}

}  // namespace definition
}  // namespace adderops
