// Integrate-and-fire neurons over T steps (args/integrate_and_fire.h).
//
//   membranes, thresholds, spike_bits, counts   of the neurons of one task, in L1 [kNeurons] each
//
//   stage 0: task = kNeurons neighbouring neurons, all steps
//
//   x[t]      [ kNeurons elements ]    kNeuronSteps steps are streams of memory that are read together, as many are
//   x[t + 1]  [ kNeurons elements ]    written; a vector of membranes stays in a register from the first to the last
//   ...         kW kW kW ...           of them: multiply, multiply, add, compare, subtract and select per step
//
// Many float32 spikes are stored past the caches, so that no line of memory is read only to be written.
//
// Products and sums are rounded one by one, as everywhere, so all instruction sets give the same bits.  The last lanes of
// a task are loaded and stored in part.
#pragma once
#include "../../args/integrate_and_fire.h"
#include "plan.h"
#include "vector.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int64_t kNeurons = 1024;
constexpr int kNeuronSteps = 4;
constexpr int64_t kStreamed = 2 << 20;  // spikes of a call that hardly stay in cache until they are read

struct IntegrateAndFireShape {
  int64_t neurons;  // of a step
  bool streamed;    // spikes go past the caches
  Layout shared;    // none
  struct Worker : Layout {
    Part<float> membranes, thresholds;
    Part<int32_t> spike_bits, counts;
  } worker;
};

inline IntegrateAndFireShape integrate_and_fire_shape(const IntegrateAndFireArgs& args) {
  IntegrateAndFireShape f{};
  f.neurons = product(args.size[0], args.size[1], args.size[2]);
  const bool aligned = f.neurons % kW == 0 && reinterpret_cast<uintptr_t>(args.spikes) % kVectorBytes == 0;
  f.streamed = aligned && args.type == ElementType::kFloat32 && product(args.T, f.neurons) >= kStreamed;
  f.worker.add(&f.worker.membranes, kNeurons);
  f.worker.add(&f.worker.thresholds, kNeurons);
  f.worker.add(&f.worker.spike_bits, kNeurons);
  f.worker.add(&f.worker.counts, kNeurons);
  return f;
}

// The parameter of `count` neurons from the `first` on.
inline void load_parameter(const IntegrateAndFireArgs& args, const NeuronParameter& p, int64_t first, int64_t count,
                           float* to) {
  if (!p.data) return (void)__builtin_memset(to, 0, (size_t)count * 4);
  const int64_t row = first / args.size[2], pitch = p.stride[2];
  int64_t a = row / args.size[1], b = row % args.size[1], c = first % args.size[2];
  for (int64_t n; count; count -= n, to += n, c = 0) {
    n = smaller(count, args.size[2] - c);
    const float* const from = static_cast<const float*>(p.data) + a * p.stride[0] + b * p.stride[1] + c * pitch;
    if (pitch == 1) {
      __builtin_memcpy(to, from, (size_t)n * 4);
    } else if (pitch == 0) {
      const float value = *from;
      for (int64_t i = 0; i < n; ++i) to[i] = value;
    } else {
      for (int64_t i = 0; i < n; ++i) to[i] = from[i * pitch];
    }
    if (++b == args.size[1]) b = 0, ++a;
  }
}

// The first n <= kW currents.  Halves by the arithmetic of definition/elements.h, a vector at a time.
template <typename T>
ALWAYS_INLINE vi load_bits(const T* p, int64_t n) {
  if (n == kW) return widened(&p->bits);
  uint16_t some[kW] = {};
  __builtin_memcpy(some, p, (size_t)n * 2);
  return widened(some);
}
ALWAYS_INLINE vf load_currents(const float* p, int64_t n) { return n == kW ? load(p) : load_n(p, n); }
ALWAYS_INLINE vf load_currents(const BFloat16* p, int64_t n) { return (vf)(load_bits(p, n) << 16); }
ALWAYS_INLINE vf load_currents(const Float16* p, int64_t n) {
  const vi bits = load_bits(p, n), magnitude = bits & 0x7fff;
  const vi finite = (vi)((vf)(magnitude << 13) * splat(0x1p112f)), special = magnitude << 13 | 0x7f800000;
  return (vf)((bits & 0x8000) << 16 | (magnitude > 0x7bff ? special : finite));
}

// The bits of numbers in the type of the spikes, and the first n <= kW of such bits to memory.
ALWAYS_INLINE vi bits_of(const float*, vf v) { return (vi)v; }
ALWAYS_INLINE void store_bits(float* p, vi bits, int64_t n, bool streamed) {
  if (streamed && n == kW)
    stream(p, (vf)bits);
  else
    store_lanes(p, bits, n);
}
template <typename T>
ALWAYS_INLINE vi bits_of(const T*, vf v) {
  T narrow[kW];
  store(narrow, v);
  return widened(&narrow->bits);
}
template <typename T>
ALWAYS_INLINE void store_bits(T* p, vi bits, int64_t n, bool) {
  typedef uint16_t vh __attribute__((vector_size(kVectorBytes / 2)));
  store_lanes(p, __builtin_convertvector(bits, vh), n);
}

// The neurons of a task, and where their next steps are.
template <typename T>
struct Neurons {
  const T* x;
  T* spikes;
  bool streamed;
  int64_t x_step, step, count;
  float decay, gain, fire;
  float *membranes, *thresholds;
  int32_t *spike_bits, *counts;
};

// `Steps` steps of the neurons [i, i + n), n <= kW.  All currents are loaded before the first spikes are stored: a load
// waits for a store just before it whose address differs by a multiple of 4096.
template <int Steps, bool Subtract, typename T>
ALWAYS_INLINE void advance(const Neurons<T>& f, int64_t i, int64_t n) {
  const vf decay = splat(f.decay), gain = splat(f.gain), v = load(f.thresholds + i), theta = splat(f.fire) * v;
  const vi spike = load_lanes<vi>(f.spike_bits + i, kW);
  vf u = load(f.membranes + i), currents[Steps];
  vi count = load_lanes<vi>(f.counts + i, kW), fired[Steps];
  UNROLL_FOR (t, Steps) currents[t] = load_currents(f.x + t * f.x_step + i, n);
  UNROLL_FOR (t, Steps) {
    u = decay * u + gain * currents[t];
    fired[t] = (vi)(u >= theta);
    u = fired[t] ? (Subtract ? u - v : vf{}) : u;
    count -= fired[t];
  }
  if (f.spikes) {
    UNROLL_FOR (t, Steps) store_bits(f.spikes + t * f.step + i, fired[t] & spike, n, f.streamed);
  }
  store(f.membranes + i, u);
  store_lanes(f.counts + i, count, kW);
}

template <int Steps, bool Subtract, typename T>
inline void advance_all(Neurons<T>* neurons) {
  const Neurons<T> f = *neurons;  // a copy, which the stores cannot change
  int64_t i = 0;
  for (; i + kW <= f.count; i += kW) advance<Steps, Subtract>(f, i, kW);
  if (i < f.count) advance<Steps, Subtract>(f, i, f.count - i);
  neurons->x += Steps * f.x_step;
  if (f.spikes) neurons->spikes += Steps * f.step;
}

template <typename T, bool Subtract>
inline void run_steps(const IntegrateAndFireArgs& args, Neurons<T> neurons) {
  int64_t t = 0;
  for (; t + kNeuronSteps <= args.T; t += kNeuronSteps) advance_all<kNeuronSteps, Subtract>(&neurons);
  for (; t < args.T; ++t) advance_all<1, Subtract>(&neurons);
}

inline void integrate_and_fire_task(const IntegrateAndFireArgs& args, const IntegrateAndFireShape& f, int64_t task,
                                    char*, char* worker) {
  const int64_t first = task * kNeurons, count = smaller(kNeurons, f.neurons - first);
  float *const membranes = f.worker.membranes.in(worker), *const thresholds = f.worker.thresholds.in(worker);
  int32_t *const spike_bits = f.worker.spike_bits.in(worker), *const counts = f.worker.counts.in(worker);
  load_parameter(args, args.initial, first, count, membranes);
  load_parameter(args, args.threshold, first, count, thresholds);
  __builtin_memset(counts, 0, kNeurons * 4);
  dispatch(args.type, [&](auto zero) {
    typedef decltype(zero) T;
    const Neurons<T> neurons = {static_cast<const T*>(args.x) + first,
                                args.spikes ? static_cast<T*>(args.spikes) + first : nullptr,
                                f.streamed,
                                args.x_step,
                                f.neurons,
                                count,
                                (float)args.decay,
                                (float)args.gain,
                                (float)args.fire,
                                membranes,
                                thresholds,
                                spike_bits,
                                counts};
    vi spike = bits_of(neurons.x, splat(1.f));
    for (int64_t i = 0; i < count; i += kW) {
      if (args.scaled) spike = bits_of(neurons.x, load(thresholds + i));
      store_lanes(spike_bits + i, spike, kW);
    }
    args.subtract ? run_steps<T, true>(args, neurons) : run_steps<T, false>(args, neurons);
    if (f.streamed) fence();
  });
  if (args.counts)
    for (int64_t i = 0; i < count; ++i) static_cast<float*>(args.counts)[first + i] = (float)counts[i];
  if (args.membrane) __builtin_memcpy(static_cast<float*>(args.membrane) + first, membranes, (size_t)count * 4);
}

inline Plan<IntegrateAndFireArgs> integrate_and_fire_plan(const IntegrateAndFireArgs& args) {
  const IntegrateAndFireShape f = integrate_and_fire_shape(args);
  return make_plan<IntegrateAndFireArgs, IntegrateAndFireShape, integrate_and_fire_task>(f,
                                                                                         ceil_div(f.neurons, kNeurons));
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
