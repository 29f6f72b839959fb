// Mean |x| of a tensor of any strides and float type.  Each lane sums at most 64 numbers, then those sums are added: the
// error grows as in short sums.
//
//   images   the sums of the images [N], double
//   floats   some rows of an image, channels last, for images that are neither contiguous nor channels_last
//
//   stage 0: task = image, read in the order of memory if it is dense, else `rows` at a time through `floats`
//   stage 1: one task adds up the images in order and divides
#pragma once
#include "plan.h"
#include "rows.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int64_t kMeanAbsFloats = 8 * 1024;  // at a time

struct MeanAbsShape {
  bool dense;
  int64_t rows;
  struct Shared : Layout {
    Part<double> images;
  } shared;
  struct Worker : Layout {
    Part<float> floats;
  } worker;
};

inline MeanAbsShape mean_abs_shape(const MeanAbsArgs& a) {
  const int64_t* s = a.x.stride;
  MeanAbsShape f{};
  const bool columns = a.W == 1 || s[3] == 1, channels = a.C == 1 || s[1] == 1;
  f.dense = (columns && (a.H == 1 || s[2] == a.W) && (a.C == 1 || s[1] == a.H * a.W)) ||
            (channels && (a.W == 1 || s[3] == a.C) && (a.H == 1 || s[2] == a.W * a.C));
  f.rows = smaller(a.H, larger(1, kMeanAbsFloats / product(a.W, a.C)));
  f.shared.add(&f.shared.images, a.N);
  if (!f.dense) f.worker.add(&f.worker.floats, product(f.rows, a.W, a.C) + kW);
  return f;
}

template <typename T>
inline vf abs_sums(const T* x, int64_t count) {
  vf total{};
  for (int64_t begin = 0; begin < count; begin += 64 * kW) {
    const int64_t end = smaller(count, begin + 64 * kW);
    vf sums[4] = {};
    int64_t i = begin;
    for (; i + 4 * kW <= end; i += 4 * kW)
      UNROLL_FOR (u, 4) sums[u] += absolute(load(x + i + u * kW));
    for (; i < end; i += kW) sums[0] += absolute(load_n(x + i, smaller(kW, end - i)));
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  return total;
}

inline void mean_abs_image(const MeanAbsArgs& a, const MeanAbsShape& f, int64_t n, char* shared, char* worker) {
  vf total{};
  if (f.dense) {
    dispatch(a.type, [&](auto zero) {
      typedef decltype(zero) T;
      total = abs_sums(static_cast<const T*>(a.x.data) + n * a.x.stride[0], a.C * a.H * a.W);
    });
  } else {
    float* const floats = f.worker.floats.in(worker);
    for (int64_t h = 0; h < a.H; h += f.rows) {
      const int64_t rows = smaller(f.rows, a.H - h);
      load_rows(a.type, a.x, a.H, a.W, {n, 1, h, rows, 0, a.W}, 0, a.C, floats, a.C);
      total += abs_sums(floats, rows * a.W * a.C);
    }
  }
  float sum = 0.f;
  for (int i = 0; i < kW; ++i) sum += total[i];
  f.shared.images.in(shared)[n] = sum;
}

inline void mean_abs_reduce(const MeanAbsArgs& a, const MeanAbsShape& f, int64_t, char* shared, char*) {
  double sum = 0;
  for (int64_t n = 0; n < a.N; ++n) sum += f.shared.images.in(shared)[n];
  *a.out = (float)(sum / (double)(a.N * a.C * a.H * a.W));
}

inline Plan<MeanAbsArgs> mean_abs_plan(const MeanAbsArgs& a) {
  return make_plan<MeanAbsArgs, MeanAbsShape, mean_abs_image, mean_abs_reduce>(mean_abs_shape(a), a.N, 1);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
