// Integrate-and-fire neurons over T steps (args/integrate_and_fire.h): one read and one write per neuron and step.
//
//   integrate_and_fire_kernel          float32 and halves whose steps are whole, aligned vectors of 16 bytes
//
//     neurons in memory order   | t0: 16 bytes | t1: 16 bytes | ..     thread: 4 or 8 neighbouring neurons, all steps;
//     x[t]                      +------- block: 128 threads -----      membranes, thresholds and counts in registers;
//     x[t + 1]                    kNeuronSteps loads, then as many     the grid covers all neurons: more than 2^31
//     ..                          steps and stores                     blocks of them would be terabytes
//
//   direct_integrate_and_fire_kernel   float64 and the rest: one neuron per thread, straight from the definition
//
// The loads of a group do not wait for its stores: they keep the memory busy where there are few threads.
#pragma once
#include "../definition/integrate_and_fire.h"
#include "tile.cuh"

namespace adderops {
namespace cuda {

constexpr int kNeuronSteps = 4;

// Element j of a vector of 16 bytes, and the place of its bits, of which `word` has none yet.
template <typename T>
struct Lanes {  // two halves per word, the first in its low bits
  static constexpr int kCount = 8;
  static __device__ __forceinline__ float value(const Words4& words, int j) {
    return to_float(T{(uint16_t)(words.v[j / 2] >> j % 2 * 16)});
  }
  static __device__ __forceinline__ uint32_t bits(float v, int j) {
    T narrow;
    from_float(v, &narrow);
    return (uint32_t)narrow.bits << j % 2 * 16;
  }
  static __device__ __forceinline__ int word(int j) { return j / 2; }
};
template <>
struct Lanes<float> {
  static constexpr int kCount = 4;
  static __device__ __forceinline__ float value(const Words4& words, int j) { return float_from_bits(words.v[j]); }
  static __device__ __forceinline__ uint32_t bits(float v, int) { return bits_from_float(v); }
  static __device__ __forceinline__ int word(int j) { return j; }
};

// The neurons of a thread: `spike` is 1 or the threshold, in its place of a vector.
template <typename T>
struct Neurons {
  static constexpr int kCount = Lanes<T>::kCount;
  definition::Dynamics<float> dynamics;
  float u[kCount], v[kCount];
  uint32_t spike[kCount];
  int count[kCount];

  __device__ __forceinline__ void load(const IntegrateAndFireArgs& args, int64_t first) {
    dynamics = definition::dynamics<float>(args);
    const int64_t row = first / args.size[2];
    int64_t c = first - row * args.size[2], a = row / args.size[1], b = row - a * args.size[1];
    const auto at = [&](const NeuronParameter& p) {
      return static_cast<const float*>(p.data)[a * p.stride[0] + b * p.stride[1] + c * p.stride[2]];
    };
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      v[j] = at(args.threshold), u[j] = args.initial.data ? at(args.initial) : 0.f;
      spike[j] = Lanes<T>::bits(args.scaled ? v[j] : 1.f, j);
      count[j] = 0;
      if (++c < args.size[2]) continue;
      c = 0;
      if (++b == args.size[1]) b = 0, ++a;
    }
  }

  // One step; returns its spikes.
  __device__ __forceinline__ Words4 advance(const Words4& x) {
    Words4 spikes = {};
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const bool fired = definition::fires<float>(dynamics, Lanes<T>::value(x, j), v[j], &u[j]);
      if (fired) spikes.v[Lanes<T>::word(j)] |= spike[j];
      count[j] += fired;
    }
    return spikes;
  }

  __device__ __forceinline__ void store(const IntegrateAndFireArgs& args, int64_t first) const {
#pragma unroll
    for (int j = 0; j < kCount; j += 4) {
      const Float4 counts = {(float)count[j], (float)count[j + 1], (float)count[j + 2], (float)count[j + 3]};
      const Float4 membranes = {u[j], u[j + 1], u[j + 2], u[j + 3]};
      if (args.counts) store_16(static_cast<float*>(args.counts) + first + j, counts);
      if (args.membrane) store_16(static_cast<float*>(args.membrane) + first + j, membranes);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kDirectThreads) integrate_and_fire_kernel(IntegrateAndFireArgs args) {
  const int64_t step = args.size[0] * args.size[1] * args.size[2];
  const int64_t first = ((int64_t)blockIdx.x * kDirectThreads + threadIdx.x) * Neurons<T>::kCount;
  if (first >= step) return;
  const T* x = static_cast<const T*>(args.x) + first;
  T* spikes = static_cast<T*>(args.spikes) + (args.spikes ? first : 0);
  Neurons<T> neurons;
  neurons.load(args, first);
  int left = (int)args.T;
#pragma unroll 1
  for (; left >= kNeuronSteps; left -= kNeuronSteps) {
    Words4 loaded[kNeuronSteps];
#pragma unroll
    for (int s = 0; s < kNeuronSteps; ++s, x += args.x_step) loaded[s] = load_16<Words4>(x);
#pragma unroll
    for (int s = 0; s < kNeuronSteps; ++s) {
      const Words4 fired = neurons.advance(loaded[s]);
      if (args.spikes) store_16(spikes, fired), spikes += step;
    }
  }
#pragma unroll 1
  for (; left; --left, x += args.x_step) {
    const Words4 fired = neurons.advance(load_16<Words4>(x));
    if (args.spikes) store_16(spikes, fired), spikes += step;
  }
  neurons.store(args, first);
}

template <typename T>
__global__ void __launch_bounds__(kDirectThreads) direct_integrate_and_fire_kernel(IntegrateAndFireArgs args) {
  const int64_t neurons = args.size[0] * args.size[1] * args.size[2];
  for (int64_t i = (int64_t)blockIdx.x * kDirectThreads + threadIdx.x; i < neurons;
       i += (int64_t)gridDim.x * kDirectThreads)
    definition::integrate_and_fire<T>(args, i);
}

}  // namespace cuda
}  // namespace adderops
