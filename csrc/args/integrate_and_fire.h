// Arguments of integrate-and-fire neurons, one per element of a step, over T steps:
//
//   u = decay * u + gain * x[t];   spike where u >= fire * threshold, then u - threshold or 0
//
// u starts as `initial` and, like the threshold, is float32 (float64 where x is).
#pragma once
#include "tensor.h"

namespace adderops {

// A number of each neuron, in the layout of `size` below; a stride is 0 where neurons share it.
struct NeuronParameter {
  const void* data;  // null: 0
  int64_t stride[3];
};

// Steps are dense; each output is null if it is not wanted.
struct IntegrateAndFireArgs {
  int64_t T;
  int64_t size[3];  // of a step, in the order of memory: (N, C, H*W), or (N, H*W, C)
  ElementType type;
  const void* x;
  int64_t x_step;  // elements from step to step; 0: the same current in all of them
  void* spikes;    // T steps, of the type of x: 1 or, if `scaled`, the threshold
  void* counts;    // a step: the number of spikes
  void* membrane;  // a step: u after the last
  NeuronParameter threshold, initial;
  double decay, gain, fire;
  bool subtract, scaled;
};

}  // namespace adderops
