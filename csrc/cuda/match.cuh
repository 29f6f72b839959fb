// The terms of L_mid and their gradients by the rows (args/match.h), for many groups of layers in a launch:
//
//   match_kernel          a warp is a row: three dot products, each lane every 32nd element, then the lanes by shuffles;
//                         three combinations of two rows each; its term and var_c to rows[row]
//   match_finish_kernel   a warp is a layer: the means over its rows, each lane every 32nd, then the lanes
//
// MatchGroup::first numbers the warps.  A row of `mixed` is read twice, the second time from L1.  The lanes add up in a
// fixed order, and the same sums reach all of them.
#pragma once
#include "../args/match.h"
#include "../definition/match.h"
#include "dialect.cuh"

namespace adderops {
namespace cuda {

constexpr int kMatchThreads = 128;

struct MatchGroup {
  const float *mixed_a, *mixed_c, *w_a, *w_c;
  float *mix, *grad_w_a, *grad_w_c;
  float *terms, *var_c;
  int rows, C_a, C_c;      // of a layer
  int first, first_layer;  // rows and layers of this launch before this group's
};
constexpr int kMatchGroups = 40;  // kernel arguments are limited to 4 KB
struct MatchList {
  MatchGroup groups[kMatchGroups];
  int count;
  int rows, layers;  // of all groups
  float eps;
};
static_assert(sizeof(MatchList) + 8 <= 4096 - 64, "what a launch takes");

struct alignas(8) RowResult {
  float term, var_c;
};

__device__ __forceinline__ float sum_of_warp(float sum) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  return sum;
}

__global__ void __launch_bounds__(kMatchThreads) match_kernel(MatchList list, RowResult* rows) {
  const int lane = threadIdx.x % 32;
  for (int number = (int)((blockIdx.x * kMatchThreads + threadIdx.x) / 32); number < list.rows;
       number += (int)gridDim.x * (kMatchThreads / 32)) {
    int at = 0;
    while (at + 1 < list.count && number >= list.groups[at + 1].first) ++at;
    const MatchGroup& group = list.groups[at];
    const int C_a = group.C_a, C_c = group.C_c, D = C_a + C_c;
    const int64_t row = number - group.first;
    const float *const mixed_a = group.mixed_a + row * D, *const mixed_c = group.mixed_c + row * D;
    const float *const w_a = group.w_a + row * C_a, *const w_c = group.w_c + row * C_c;
    float var_a = 0, var_c = 0, cov_ac = 0;
    for (int i = lane; i < C_a; i += 32) var_a = fmaf(mixed_a[i], w_a[i], var_a);
    for (int i = lane; i < C_c; i += 32) {
      var_c = fmaf(mixed_c[C_a + i], w_c[i], var_c);
      cov_ac = fmaf(mixed_a[C_a + i], w_c[i], cov_ac);
    }
    const definition::MatchedRow found =
        definition::matched_row(sum_of_warp(var_a), sum_of_warp(var_c), sum_of_warp(cov_ac), list.eps);
    const float inverse = 1.f / (float)group.rows;
    const float g_a = 2 * found.g_a * inverse, g_c = 2 * found.g_c * inverse, g_ac = found.g_ac * inverse;
    for (int i = lane; i < C_a; i += 32) {
      group.mix[row * D + i] = g_a * w_a[i];
      group.grad_w_a[row * C_a + i] = g_a * mixed_a[i] + g_ac * mixed_c[i];
    }
    for (int i = lane; i < C_c; i += 32) {
      group.mix[row * D + C_a + i] = g_ac * w_c[i];
      group.grad_w_c[row * C_c + i] = g_c * mixed_c[C_a + i] + g_ac * mixed_a[C_a + i];
    }
    if (lane == 0) rows[number] = {found.term, found.var_c};
  }
}

__global__ void __launch_bounds__(kMatchThreads) match_finish_kernel(MatchList list, const RowResult* rows) {
  const int number = (int)((blockIdx.x * kMatchThreads + threadIdx.x) / 32), lane = threadIdx.x % 32;
  if (number >= list.layers) return;
  int at = 0;
  while (at + 1 < list.count && number >= list.groups[at + 1].first_layer) ++at;
  const MatchGroup& group = list.groups[at];
  const int layer = number - group.first_layer;
  const RowResult* const from = rows + group.first + (int64_t)layer * group.rows;
  float term = 0, var_c = 0;
  for (int i = lane; i < group.rows; i += 32) term += from[i].term, var_c += from[i].var_c;
  term = sum_of_warp(term), var_c = sum_of_warp(var_c);
  if (lane) return;
  group.terms[layer] = term / (float)group.rows;
  group.var_c[layer] = var_c / (float)group.rows;
}

}  // namespace cuda
}  // namespace adderops
