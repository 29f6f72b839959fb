// Vector functions that are the same for every instruction set, on top of isa.h.
#pragma once
#include <stddef.h>

#include "../../definition/elements.h"
#include "../isa.h"
#include "integers.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kVectorBytes = sizeof(vf);
constexpr int kFilters = kVectorBytes / kRun;  // filters per vector of packed bytes
constexpr int kParts = kW / kFilters;          // such vectors per kW filters

ALWAYS_INLINE vf absolute(vf v) { return (vf)((vi)v & 0x7fffffff); }

// b where one of them is NaN
ALWAYS_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }
ALWAYS_INLINE vf smaller(vf a, vf b) { return a < b ? a : b; }

ALWAYS_INLINE vf to_floats(vi v) { return __builtin_convertvector(v, vf); }
ALWAYS_INLINE vf to_floats(vb_quarter v) { return to_floats(__builtin_convertvector(v, vi)); }

// bfloat16 and float16 are converted lane by lane.
template <typename T>
ALWAYS_INLINE vf load_n(const T* p, int64_t n) {
  float v[kW] = {};
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(p[i]);
  return load(v);
}
template <typename T>
ALWAYS_INLINE vf load(const T* p) {
  float v[kW];
  for (int i = 0; i < kW; ++i) v[i] = to_float(p[i]);
  return load(v);
}
template <typename T>
ALWAYS_INLINE void store_n(T* p, vf v, int64_t n) {
  float f[kW];
  store(f, v);
  for (int64_t i = 0; i < n; ++i) from_float(f[i], p + i);
}
template <typename T>
ALWAYS_INLINE void store(T* p, vf v) {
  store_n(p, v, kW);
}

// Lane i = p[i * stride], for n <= kW lanes.
template <typename T>
ALWAYS_INLINE vf load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return n == kW ? load(p) : load_n(p, n);
  if (stride == 2) {
    const int64_t last = 2 * n - 1;  // reads up to the last element wanted, none beyond
    return even_lanes(load_n(p, smaller(kW, last)), last > kW ? load_n(p + kW, last - kW) : vf{});
  }
  float v[kW] = {};
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(p[i * stride]);
  return load(v);
}

ALWAYS_INLINE void store_up_to(float* p, vf v, int64_t n) { n >= kW ? store(p, v) : store_n(p, v, n); }

// The first n lanes of any vector of kW lanes; all of them if n > kW.
template <typename V, typename T>
ALWAYS_INLINE V load_lanes(const T* p, int64_t n) {
  V v{};
  __builtin_memcpy(&v, p, n >= kW ? sizeof(V) : (size_t)n * sizeof(T));
  return v;
}
template <typename V, typename T>
ALWAYS_INLINE void store_lanes(T* p, V v, int64_t n) {
  if (n >= kW)
    __builtin_memcpy(p, &v, sizeof(V));
  else
    __builtin_memcpy(p, &v, (size_t)n * sizeof(T));
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
