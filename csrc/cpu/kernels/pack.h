// Packed weights: panels in the order that the kernels read, [term][lane], as float32.
#pragma once
#include "vector.h"

namespace adderops {
namespace cpu {
namespace {

// The sum of each lane's weights, and of their absolute values.
struct LaneSums {
  vf value, size;
  ALWAYS_INLINE void add(vf w) { value += w, size += absolute(w); }
};

// dst[place(k) * dst_stride + lane] = w[lane][k] for `lanes` <= kW filters of `terms` contiguous weights each; the
// other lanes become 0.  Adds the weights to the sums of their lanes.
template <typename T, typename Place>
inline void pack_filters(const T* w, int64_t filter_stride, int64_t lanes, int64_t terms, const Place& place,
                         float* dst, int64_t dst_stride, LaneSums* sums) {
  for (int64_t k = 0; k < terms; k += kW) {
    const int64_t nk = smaller(kW, terms - k);
    vf v[kW];
    for (int i = 0; i < kW; ++i)
      v[i] = i >= lanes ? vf{} : nk == kW ? load(w + i * filter_stride + k) : load_n(w + i * filter_stride + k, nk);
    transpose(v);
    for (int i = 0; i < nk; ++i) {
      sums->add(v[i]);
      store(dst + place(k + i) * dst_stride, v[i]);
    }
  }
}

// Whether a filter's weights are contiguous in the order (ci, kh, kw).
inline bool dense_filters(const Conv2dProblem& p, const int64_t* stride) {
  return (p.KW == 1 || stride[3] == 1) && (p.KH == 1 || stride[2] == p.KW) &&
         (p.C_in == p.groups || stride[1] == p.KH * p.KW);
}

// Packs one vector of filters, from co on: term (tap, ci) goes to dst[(tap * channels + ci) * dst_stride].
template <typename T>
inline LaneSums pack_vector(const Conv2dArgs& args, int64_t co, int64_t lanes, float* dst, int64_t dst_stride) {
  const Conv2dProblem& p = args.problem;
  const int64_t channels = p.C_in / p.groups, taps = p.KH * p.KW;
  const int64_t* stride = args.w.stride;
  const T* w = static_cast<const T*>(args.w.data) + co * stride[0];
  LaneSums sums{};
  if (dense_filters(p, stride)) {
    pack_filters(
        w, stride[0], lanes, channels * taps, [channels, taps](int64_t k) { return k % taps * channels + k / taps; },
        dst, dst_stride, &sums);
    return sums;
  }
  for (int64_t t = 0; t < taps; ++t) {
    const T* tap = w + t / p.KW * stride[2] + t % p.KW * stride[3];
    if (stride[1] == 1) {  // (co, kh, kw, ci) in memory
      LaneSums of_tap{};
      pack_filters(
          tap, stride[0], lanes, channels, [](int64_t k) { return k; }, dst + t * channels * dst_stride, dst_stride,
          &of_tap);
      sums.value += of_tap.value, sums.size += of_tap.size;
      continue;
    }
    for (int64_t ci = 0; ci < channels; ++ci) {
      const vf v = load_strided(tap + ci * stride[1], stride[0], lanes);
      sums.add(v);
      store(dst + (t * channels + ci) * dst_stride, v);
    }
  }
  return sums;
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
