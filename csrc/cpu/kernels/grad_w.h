// Gradient of the weights, float32 sums:   dW[co,k] = sum_p dY[co,p] * (X[k,p] - W[co,k])
//                                                   = sum_p dY[co,p] * X[k,p]  -  W[co,k] * sum_p dY[co,p]
// This is AdderNet's full-precision training gradient (arXiv 1912.13200, section 3.2), on purpose not the derivative,
// which is sgn(X - W).  In the second form a term is one fused multiply-add.
//
//   x    the window of one band, copied to [image][row][column][ci] and zero padded; or the tensor itself
//   dY   the band's outputs, [pixel][co], likewise
//   g    partial sums [split][group][co][k in the order of x], each segment rounded up to whole vectors
//
//   stage 0: task = (split of the bands, group, part of the filters)
//            band -> up to kOuterVectors vectors of k -> kOuterRows filters: the tile of outer_product.h, which sums
//            over the band's pixels and is added to g
//
//     dY [pixel][co]      x [pixel][window]              g [co][k]
//     pixel 0  ..aaaa..   pixel 0  ..[bbb]....           filter  [ tile ][      ]   a: kOuterRows filters of dY
//     pixel 1  ..aaaa..   pixel 1     ..[bbb]....        ...     [      ][      ]   b: the same k of every window
//     ...                 ...                                      k ->
//
//   stage 1: task = one filter: adds up the splits in order, subtracts W * sum dY, puts k into the order of the weights
//
// Budget: per pixel of a tile NV loads of x, MR broadcasts of dY, MR*NV fma; with kPackFrom tiles of filters or more
// the vectors of x are first copied together.
// Tails: lanes beyond a segment and filters beyond C_out are summed and never stored.  The number of splits depends on
// the problem alone, and so does the order of every sum.  A result that is not finite is computed again by the
// definition: with infinities the two forms differ.
#pragma once
#include "../../definition/conv2d.h"
#include "input.h"
#include "outer_product.h"
#include "pack.h"
#include "plan.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int64_t kPartialBytes = 24 << 20;  // all partial sums together
constexpr int64_t kPackFrom = 6;             // tiles of filters from which packing the vectors of x pays

struct GradWShape {
  Conv2dProblem p;  // of the strided view when the kernel is 1x1
  int64_t C, M, taps;
  Input x, grad_y;
  Bands bands;
  int64_t rows, columns;       // of the window that a band reads
  int64_t segments;            // contiguous runs of taps: kernel rows, or single taps
  int64_t padded_M, padded_K;  // filters in whole tiles, terms in whole vectors
  int64_t splits, parts;       // parts: tasks per split and group
  struct Shared : Layout {
    Part<float> g;       // [split][group][padded_M][padded_K]
    Part<float> sum_dy;  // [split][group][padded_M]
  } shared;
  struct Worker : Layout {
    Part<float> x, grad_y, row, panel;
    Part<const float*> pixel, packed;
  } worker;
};

inline GradWShape grad_w_shape(const Conv2dArgs& args) {
  GradWShape f{};
  f.p = args.problem;
  Conv2dProblem& p = f.p;
  const Operand x = dense_view(args.x, &p);
  f.C = p.C_in / p.groups, f.M = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  f.x = make_input(args.type, x, p.H, p.W, f.C, reads_padding(p), kW);
  f.grad_y = make_input(args.type, args.grad_y, p.OH, p.OW, f.M, false, kOuterRows);
  const int64_t row = sum(product(p.stride_h, window_columns(p, p.OW), f.C), product(p.OW, f.M));
  f.bands = make_bands(p.N, p.OH, p.OW, row, 64 * 1024, 256);
  f.rows = window_rows(p, f.bands.rows), f.columns = window_columns(p, f.bands.columns);
  // kernel rows whose taps touch are summed as one segment
  const bool joined = f.x.pitch == f.C && p.dilation_w == 1;
  f.segments = joined ? p.KH : f.taps;
  f.padded_M = round_up(f.M, kOuterRows);
  f.padded_K = product(f.segments, round_up(product(f.taps / f.segments, f.C), kW));
  const int64_t bytes = product(p.groups, f.padded_M, f.padded_K, 4);
  f.splits = larger(1, smaller(smaller(kMostSplits, f.bands.count), kPartialBytes / bytes));
  f.parts = smaller(f.padded_M / kOuterRows, ceil_div(8, product(f.splits, p.groups)));

  const int64_t filters = product(f.splits, p.groups, f.padded_M), pixels = f.bands.pixels();
  f.shared.add(&f.shared.g, product(filters, f.padded_K));
  f.shared.add(&f.shared.sum_dy, filters);
  // tiles read up to a vector past the last pixel of x and up to a tile past that of dY
  f.worker.add(&f.worker.x, copy_floats(f.x, product(f.bands.images, f.rows, f.columns)) + kOuterVectors * kW);
  f.worker.add(&f.worker.grad_y, copy_floats(f.grad_y, pixels) + kOuterRows);
  f.worker.add(&f.worker.row, larger(f.padded_K, product(f.C, f.taps)) + kW * kW);
  f.worker.add(&f.worker.panel, product(pixels, kOuterVectors * kW));
  f.worker.add(&f.worker.pixel, pixels);
  f.worker.add(&f.worker.packed, pixels);
  return f;
}

// Adds `run` pixels, whose dY are evenly spaced, to filters [co0, co1) of g.
inline void grad_w_run(const GradWShape& f, const View<float>& x, const float* const* pixel, const float* dy,
                       int64_t pitch, int64_t run, int64_t co0, int64_t co1, float* g, bool first, char* worker) {
  const Conv2dProblem& p = f.p;
  const int64_t taps_of = f.taps / f.segments, length = taps_of * f.C;
  float* const panel = f.worker.panel.in(worker);
  const float** const packed = f.worker.packed.in(worker);
  for (int64_t segment = 0; segment < f.segments; ++segment) {
    const int64_t tap = segment * taps_of;
    const int64_t offset = tap / p.KW * p.dilation_h * x.row + tap % p.KW * p.dilation_w * x.pixel;
    for (int64_t k = 0; k < length; k += kOuterVectors * kW) {
      const int64_t nv = smaller(kOuterVectors, ceil_div(length - k, kW));
      const auto tile = nv == 1   ? outer_product_tile<1>
                        : nv == 2 ? outer_product_tile<2>
                                  : outer_product_tile<kOuterVectors>;
      float* at = g + segment * round_up(length, kW) + k;
      const float* const* base = pixel;
      int64_t in_pixel = offset + k;
      if (co1 - co0 >= kPackFrom * kOuterRows) {
        for (int64_t i = 0; i < run; ++i)
          for (int64_t j = 0; j < nv; ++j) store(panel + (i * nv + j) * kW, load(base[i] + in_pixel + j * kW));
        for (int64_t i = 0; i < run; ++i) packed[i] = panel + i * nv * kW;
        base = packed, in_pixel = 0;
      }
      for (int64_t co = co0; co < co1; co += kOuterRows)
        tile(dy + co, pitch, base, in_pixel, run, at + co * f.padded_K, f.padded_K, first);
    }
  }
}

inline void grad_w_split(const Conv2dArgs& args, const GradWShape& f, int64_t task, char* shared, char* worker) {
  const Conv2dProblem& p = f.p;
  const int64_t part = task % f.parts, group = task / f.parts % p.groups, split = task / f.parts / p.groups;
  const int64_t tiles = f.padded_M / kOuterRows;
  const int64_t co0 = tiles * part / f.parts * kOuterRows, co1 = tiles * (part + 1) / f.parts * kOuterRows;
  const int64_t filter = (split * p.groups + group) * f.padded_M;
  float* const g = f.shared.g.in(shared) + filter * f.padded_K;
  float* const sum_dy = f.shared.sum_dy.in(shared) + filter;
  const float** const pixel = f.worker.pixel.in(worker);
  zero(sum_dy + co0, co1 - co0);
  const int64_t begin = split_begin(f.bands, f.splits, split);
  for (int64_t i = begin; i < split_begin(f.bands, f.splits, split + 1); ++i) {
    const Region b = band_at(f.bands, i), window = window_of(p, b);
    copy_region(args.type, f.x, window, group * f.C, 0, f.C, f.worker.x.in(worker));
    copy_region(args.type, f.grad_y, b, group * f.M, 0, f.M, f.worker.grad_y.in(worker));
    const View<float> x = view_of(f.x, window, group * f.C, f.worker.x.in(worker));
    const View<float> dy = view_of(f.grad_y, b, group * f.M, f.worker.grad_y.in(worker));
    // the tile needs evenly spaced dY: in place only whole images without gaps are, otherwise it goes row by row
    const bool even = dy.row == b.columns * dy.pixel && dy.image == b.rows * dy.row;
    const int64_t run = even ? b.pixels() : b.columns;
    int64_t pixels = 0;
    for (int64_t n = 0; n < b.images; ++n)
      for (int64_t h = 0; h < b.rows; ++h)
        for (int64_t ow = 0; ow < b.columns; ++ow) pixel[pixels++] = x.at(n, h * p.stride_h, ow * p.stride_w);
    for (int64_t q = 0; q < pixels; q += run) {
      const float* dy_run = dy.at(q / b.columns / b.rows, q / b.columns % b.rows, 0);
      add_rows(dy_run + co0, dy.pixel, run, smaller(co1, f.M) - co0, sum_dy + co0);
      grad_w_run(f, x, pixel + q, dy_run, dy.pixel, run, co0, co1, g, i == begin && q == 0, worker);
    }
  }
}

// row[terms in the order of x] -> out[terms in the order (ci, tap)]
inline void order_by_channel(const GradWShape& f, const float* row, float* out) {
  const int64_t taps_of = f.taps / f.segments, length = round_up(taps_of * f.C, kW);
  for (int64_t ci = 0; ci < f.C; ci += kW)
    for (int64_t t0 = 0; t0 < f.taps; t0 += kW) {
      const int64_t nt = smaller(kW, f.taps - t0), nc = smaller(kW, f.C - ci);
      vf v[kW];
      for (int64_t i = 0; i < kW; ++i) {
        const int64_t t = t0 + smaller(i, nt - 1);
        v[i] = load(row + t / taps_of * length + t % taps_of * f.C + ci);
      }
      transpose(v);
      for (int64_t i = 0; i < nc; ++i) store_n(out + (ci + i) * f.taps + t0, v[i], nt);
    }
}

// One filter: adds up its partial sums, then the epilogue.
template <typename T>
inline void grad_w_filter(const Conv2dArgs& args, const GradWShape& f, int64_t task, char* shared, char* worker) {
  const int64_t group = task / f.M, co = task % f.M;
  const int64_t filter = group * f.padded_M + co, filters = f.p.groups * f.padded_M;
  const float* const all_g = f.shared.g.in(shared);
  const float* const all_sum_dy = f.shared.sum_dy.in(shared);
  float* const row = f.shared.g.in(shared) + filter * f.padded_K;  // of the first partial sum, added up in place
  float* const ordered = f.taps > 1 ? f.worker.row.in(worker) : row;
  float sum_dy = all_sum_dy[filter];
  for (int64_t i = 1; i < f.splits; ++i) {
    const float* more = all_g + (i * filters + filter) * f.padded_K;
    for (int64_t k = 0; k < f.padded_K; k += kW) store(row + k, load(row + k) + load(more + k));
    sum_dy += all_sum_dy[i * filters + filter];
  }
  if (f.taps > 1) order_by_channel(f, row, ordered);
  const int64_t *ws = args.w.stride, *os = args.out.stride, filter_co = group * f.M + co;
  T* out = static_cast<T*>(args.out.data) + filter_co * os[0];
  const T* w = static_cast<const T*>(args.w.data) + filter_co * ws[0];
  const int64_t terms = f.C * f.taps;
  const bool dense = dense_filters(args.problem, ws) && dense_filters(args.problem, os);
  for (int64_t k = 0; k < terms; k += kW) {
    const int64_t n = smaller(kW, terms - k);
    vf weight{};
    if (dense) {
      weight = n == kW ? load(w + k) : load_n(w + k, n);
    } else {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t t = (k + i) % f.taps;
        weight[i] = to_float(w[(k + i) / f.taps * ws[1] + t / f.p.KW * ws[2] + t % f.p.KW * ws[3]]);
      }
    }
    vf v = load(ordered + k) - weight * splat(sum_dy);
    const vi bad = ~(absolute(v) <= __FLT_MAX__);
    if (any(bad))
      for (int64_t i = 0; i < n; ++i) {
        const int64_t t = (k + i) % f.taps;
        if (bad[i]) v[i] = definition::grad_w<T>(args, filter_co, (k + i) / f.taps, t / f.p.KW, t % f.p.KW);
      }
    if (dense) {
      n == kW ? store(out + k, v) : store_n(out + k, v, n);
      continue;
    }
    for (int64_t i = 0; i < n; ++i) {
      const int64_t t = (k + i) % f.taps;
      from_float(v[i], out + (k + i) / f.taps * os[1] + t / f.p.KW * os[2] + t % f.p.KW * os[3]);
    }
  }
}

inline void grad_w_reduce(const Conv2dArgs& args, const GradWShape& f, int64_t task, char* shared, char* worker) {
  dispatch(args.type, [&](auto zero) { grad_w_filter<decltype(zero)>(args, f, task, shared, worker); });
}

inline Plan<Conv2dArgs> grad_w_plan(const Conv2dArgs& args) {
  const GradWShape f = grad_w_shape(args);
  if (windows_are_sparse(f.p, f.bands, f.rows, f.columns)) return kDefinitionKernels.grad_w(args);
  return make_plan<Conv2dArgs, GradWShape, grad_w_split, grad_w_reduce>(f, product(f.splits, f.p.groups, f.parts),
                                                                        f.p.C_out);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
