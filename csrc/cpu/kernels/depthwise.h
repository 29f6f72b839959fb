// Depthwise layers (C_in == groups; filter c*multiplier + j reads channel c alone).  Lanes are channels, and every pass
// computes its formula directly, so infinities and NaNs need no care:
//
//   Y[n,co,p]     = -sum_t |X[n,c,p+t] - W[co,t]|                              t = (kh, kw)
//   dX[n,c,h,w]   = sum over t and the channel's filters of dY * clamp(W - X, -1, 1)      a training gradient, as in
//   dW[co,t]      = sum_p dY[co,p] * (X[c,p+t] - W[co,t])                                 grad_x.h and grad_w.h
//
//   x      the panel's channels of the band's window, copied to [image][row][column][lane]; or the tensor itself
//   dY, y  [image][row][column][lane*multiplier + j]
//   w      [j][t][lane], and behind them the bias [j][lane]
//
//   forward, grad_x: one stage, task = (band, panel of kDepthwiseVectors vectors of channels)
//   grad_w: stage 0 task = (split of the bands, panel); stage 1 task = one panel: adds up the splits in order
//
//     w[j][t]       [ vector 0 | 1 | 2 | 3 ]   lanes: channels ->     a tile is one pixel (grad_w: one tap) of NV <= 4
//     x[pixel + t]  [                      ]                          vectors, which share every address and border
//     accumulators  [                      ]                          test
//
// Budget per vector and term: forward 2 loads, sub, and, add; grad_x 2 loads, sub, clamp, compare, blend, fma; grad_w
// 2 loads, sub, fma.
// Tails: channels are loaded in whole vectors, which a copy always has; lanes beyond C_in are never stored.
#pragma once
#include "input.h"
#include "plan.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kDepthwiseVectors = 4;
constexpr int kDepthwiseLanes = kDepthwiseVectors * kW;
constexpr int64_t kDepthwiseBudget = 16 * 1024;  // floats of input per band

struct DepthwiseShape {
  Conv2dProblem p;
  int64_t multiplier, taps;
  Input x, grad_y;
  Bands bands;
  int64_t panels, splits;
  int64_t sums;  // floats of a partial sum of dW
  bool sparse;   // region.h
  struct Shared : Layout {
    Part<float> sums;  // grad_w: [split][panel][j][t][lane]
  } shared;
  struct Worker : Layout {
    Part<float> x, grad_y, w, result;
    Part<int64_t> offset;  // of each tap; grad_x: [row][kh] and [column][kw]
  } worker;
};

enum class DepthwisePass { kForward, kGradX, kGradW };

inline DepthwiseShape depthwise_shape(const Conv2dArgs& args, DepthwisePass pass) {
  DepthwiseShape f{};
  f.p = args.problem;
  const Conv2dProblem& p = f.p;
  const bool of_inputs = pass == DepthwisePass::kGradX;  // the bands; else of outputs
  f.multiplier = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  f.panels = ceil_div(p.C_in, kDepthwiseLanes);
  // whole vectors are read: in place only if the channels are whole vectors
  f.x = make_input(args.type, args.x, p.H, p.W, p.C_in, !of_inputs && reads_padding(p), kW);
  f.grad_y = make_input(args.type, args.grad_y, p.OH, p.OW, p.C_out, f.multiplier > 1, kW);
  if (pass == DepthwisePass::kForward) f.grad_y.in_place = true;  // none: nothing to copy
  if (!f.x.in_place) f.x.pitch = kDepthwiseLanes;
  if (!f.grad_y.in_place) f.grad_y.pitch = kDepthwiseLanes * f.multiplier;
  const int64_t H = of_inputs ? p.H : p.OH, W = of_inputs ? p.W : p.OW;
  const int64_t row_pixels = of_inputs ? p.W : product(p.stride_h, window_columns(p, p.OW));
  f.bands = make_bands(p.N, H, W, product(row_pixels, kDepthwiseLanes), kDepthwiseBudget, 16);
  const int64_t reach_rows = (f.bands.rows - 1 + (p.KH - 1) * p.dilation_h) / p.stride_h + 2;
  const int64_t reach_columns = (f.bands.columns - 1 + (p.KW - 1) * p.dilation_w) / p.stride_w + 2;
  const int64_t rows = window_rows(p, f.bands.rows), columns = window_columns(p, f.bands.columns);
  f.sparse = of_inputs ? outputs_are_sparse(p, f.bands, reach_rows, reach_columns, 0)
                       : windows_are_sparse(p, f.bands, rows, columns);
  f.splits = smaller(kMostSplits, f.bands.count);

  const int64_t images = f.bands.images, pixels = f.bands.pixels();
  const int64_t x_pixels = of_inputs ? pixels : product(images, rows, columns);
  const int64_t y_pixels = of_inputs ? product(images, reach_rows, reach_columns) : pixels;
  const int64_t lanes = product(kDepthwiseLanes, f.multiplier);
  f.sums = product(lanes, f.taps);
  if (pass == DepthwisePass::kGradW) f.shared.add(&f.shared.sums, product(f.splits, f.panels, f.sums));
  f.worker.add(&f.worker.x, copy_floats(f.x, x_pixels));
  f.worker.add(&f.worker.grad_y, copy_floats(f.grad_y, y_pixels));
  f.worker.add(&f.worker.w, sum(f.sums, lanes));
  f.worker.add(&f.worker.result, sum(product(pixels, lanes), kW));
  f.worker.add(&f.worker.offset, of_inputs ? sum(product(f.bands.rows, p.KH), product(f.bands.columns, p.KW)) : f.taps);
  return f;
}

// w[j][t][lane], and behind them bias[j][lane]
template <typename T>
static void load_filters_of(const Conv2dArgs& args, const DepthwiseShape& f, int64_t c0, int64_t lanes, float* w) {
  const int64_t* stride = args.w.stride;
  const int64_t m = f.multiplier;
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t j = 0; j < m; ++j) {
    for (int64_t t = 0; t < f.taps; ++t)
      for (int64_t i = 0; i < kDepthwiseLanes; ++i)
        w[(j * f.taps + t) * kDepthwiseLanes + i] =
            i >= lanes
                ? 0
                : to_float(static_cast<const T*>(
                      args.w.data)[((c0 + i) * m + j) * stride[0] + t / f.p.KW * stride[2] + t % f.p.KW * stride[3]]);
    for (int64_t i = 0; i < kDepthwiseLanes; ++i)
      w[(m * f.taps + j) * kDepthwiseLanes + i] = bias && i < lanes ? to_float(bias[(c0 + i) * m + j]) : 0;
  }
}

inline void load_filters(const Conv2dArgs& args, const DepthwiseShape& f, int64_t c0, int64_t lanes, float* w) {
  dispatch(args.type, [&](auto zero) { load_filters_of<decltype(zero)>(args, f, c0, lanes, w); });
}

// A vector of lanes  <->  elements lane*m + j
ALWAYS_INLINE vf load_filter(const float* p, int64_t m) { return load_strided(p, m, kW); }
ALWAYS_INLINE void store_filter(float* p, int64_t m, vf v) {
  if (m == 1) return store(p, v);
  for (int i = 0; i < kW; ++i) p[i * m] = v[i];
}

inline View<float> depthwise_view(const Conv2dArgs& args, const Input& in, const Region& r, int64_t c0,
                                  int64_t channels, float* copy) {
  copy_region(args.type, in, r, c0, 0, channels, copy);
  return view_of(in, r, c0, copy);
}

// A task: a band of pixels, and the `lanes` channels from c0 on.
struct DepthwiseTask {
  Region band;
  int64_t c0, lanes;
};
inline DepthwiseTask depthwise_task(const DepthwiseShape& f, int64_t task) {
  const int64_t c0 = task % f.panels * kDepthwiseLanes;
  return {band_at(f.bands, task / f.panels), c0, smaller(kDepthwiseLanes, f.p.C_in - c0)};
}

// The functions below copy what they use of `f` and `b` to locals: a vector store may alias them.

// `offset`: of each tap, from the start of a window.
template <int NV>
__attribute__((noinline)) void depthwise_forward_rows(const DepthwiseShape& f, View<float> x, const int64_t* offset,
                                                      Region b, const float* w, float* y) {
  const int64_t m = f.multiplier, taps = f.taps, stride_h = f.p.stride_h, step = f.p.stride_w * x.pixel;
  const float* const bias = w + m * taps * kDepthwiseLanes;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t h = 0; h < b.rows; ++h) {
      const float* window = x.at(n, h * stride_h, 0);
      for (int64_t ow = 0; ow < b.columns; ++ow, window += step, y += kDepthwiseLanes * m)
        for (int64_t j = 0; j < m; ++j) {
          vf c[NV];
          UNROLL_FOR (v, NV) c[v] = vf{};
          const float* tap = w + j * taps * kDepthwiseLanes;
          for (int64_t t = 0; t < taps; ++t, tap += kDepthwiseLanes) {
            const float* in = window + offset[t];
            UNROLL_FOR (v, NV) c[v] = accumulate(c[v], absolute(load(in + v * kW) - load(tap + v * kW)));
          }
          UNROLL_FOR (v, NV) store_filter(y + v * kW * m + j, m, load(bias + j * kDepthwiseLanes + v * kW) - c[v]);
        }
    }
}

// `row_at`, `column_at`: [row][kh] and [column][kw], where in y the tap's output is; below 0 where there is none.
template <int NV>
__attribute__((noinline)) void depthwise_grad_x_rows(const DepthwiseShape& f, View<float> x, View<float> y,
                                                     const int64_t* row_at, const int64_t* column_at, Region b,
                                                     const float* w, float* out) {
  const int64_t m = f.multiplier, taps = f.taps, KH = f.p.KH, KW = f.p.KW;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t h = 0; h < b.rows; ++h)
      for (int64_t iw = 0; iw < b.columns; ++iw, out += kDepthwiseLanes) {
        vf at[NV], c[NV];
        UNROLL_FOR (v, NV) at[v] = load(x.at(n, h, iw) + v * kW), c[v] = vf{};
        for (int64_t kh = 0; kh < KH; ++kh) {
          const int64_t row = row_at[h * KH + kh];
          if (row < 0) continue;
          for (int64_t kw = 0; kw < KW; ++kw) {
            const int64_t column = column_at[iw * KW + kw];
            if (column < 0) continue;
            const float* g = y.data + n * y.image + row + column;
            for (int64_t j = 0; j < m; ++j) {
              const float* tap = w + (j * taps + kh * KW + kw) * kDepthwiseLanes;
              UNROLL_FOR (v, NV) {
                const vf d = load(tap + v * kW) - at[v], bounded = clamp_unit(d);
                c[v] = fused(load_filter(g + v * kW * m + j, m), d == d ? bounded : d, c[v]);
              }
            }
          }
        }
        UNROLL_FOR (v, NV) store(out + v * kW, c[v]);
      }
}

template <int NV>
__attribute__((noinline)) void depthwise_grad_w_rows(const DepthwiseShape& f, View<float> x, View<float> y,
                                                     const int64_t* offset, Region b, const float* w, float* sums) {
  const int64_t m = f.multiplier, taps = f.taps, stride_h = f.p.stride_h, step = f.p.stride_w * x.pixel;
  for (int64_t j = 0; j < m; ++j)
    for (int64_t t = 0; t < taps; ++t, sums += kDepthwiseLanes, w += kDepthwiseLanes) {
      vf c[NV], weight[NV];
      UNROLL_FOR (v, NV) c[v] = load(sums + v * kW), weight[v] = load(w + v * kW);
      for (int64_t n = 0; n < b.images; ++n)
        for (int64_t h = 0; h < b.rows; ++h) {
          const float* in = x.at(n, h * stride_h, 0) + offset[t];
          const float* g = y.at(n, h, 0);
          for (int64_t ow = 0; ow < b.columns; ++ow, in += step, g += y.pixel)
            UNROLL_FOR (v, NV) c[v] = fused(load_filter(g + v * kW * m + j, m), load(in + v * kW) - weight[v], c[v]);
        }
      UNROLL_FOR (v, NV) store(sums + v * kW, c[v]);
    }
}

// Calls rows<NV> for the vectors of a panel of channels; each is 1 to kDepthwiseVectors.
#define DEPTHWISE_ROWS(rows, lanes, ...)                  \
  switch (ceil_div(lanes, kW)) {                          \
    case 1: rows<1>(__VA_ARGS__); break;                  \
    case 2: rows<2>(__VA_ARGS__); break;                  \
    case 3: rows<3>(__VA_ARGS__); break;                  \
    default: rows<kDepthwiseVectors>(__VA_ARGS__); break; \
  }

// Where each tap reads x, from the start of a window.
inline const int64_t* tap_offsets(const DepthwiseShape& f, const View<float>& x, char* worker) {
  int64_t* const offset = f.worker.offset.in(worker);
  for (int64_t t = 0; t < f.taps; ++t)
    offset[t] = t / f.p.KW * f.p.dilation_h * x.row + t % f.p.KW * f.p.dilation_w * x.pixel;
  return offset;
}

// at[i * taps + k]: where the output is that reads position first + i by tap k, in steps from output `origin`; -1: none.
inline void list_outputs(int64_t first, int64_t count, int64_t taps, int64_t dilation, int64_t stride, int64_t outputs,
                         int64_t origin, int64_t step, int64_t* at) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t k = 0; k < taps; ++k) {
      const int64_t a = first + i - k * dilation, o = a / stride;
      at[i * taps + k] = a < 0 || a % stride || o >= outputs ? -1 : (o - origin) * step;
    }
}

inline void depthwise_forward_task(const Conv2dArgs& args, const DepthwiseShape& f, int64_t task, char*, char* worker) {
  const DepthwiseTask t = depthwise_task(f, task);
  float *const w = f.worker.w.in(worker), *const result = f.worker.result.in(worker);
  const View<float> x = depthwise_view(args, f.x, window_of(f.p, t.band), t.c0, t.lanes, f.worker.x.in(worker));
  load_filters(args, f, t.c0, t.lanes, w);
  DEPTHWISE_ROWS(depthwise_forward_rows, t.lanes, f, x, tap_offsets(f, x, worker), t.band, w, result)
  store_rows(args.type, result, kDepthwiseLanes * f.multiplier, args.out, t.band, t.c0 * f.multiplier,
             t.lanes * f.multiplier);
}

inline void depthwise_grad_x_task(const Conv2dArgs& args, const DepthwiseShape& f, int64_t task, char*, char* worker) {
  const Conv2dProblem& p = f.p;
  const DepthwiseTask t = depthwise_task(f, task);
  const Region& b = t.band;
  float *const w = f.worker.w.in(worker), *const result = f.worker.result.in(worker);
  // the outputs that read these pixels, without those outside the image
  const int64_t first_h = b.h0 + p.pad_top - (p.KH - 1) * p.dilation_h;
  const int64_t first_w = b.w0 + p.pad_left - (p.KW - 1) * p.dilation_w;
  const int64_t oh0 = smaller(p.OH, first_h > 0 ? first_h / p.stride_h : 0);
  const int64_t ow0 = smaller(p.OW, first_w > 0 ? first_w / p.stride_w : 0);
  const int64_t oh1 = larger(oh0, smaller(p.OH, (b.h0 + b.rows - 1 + p.pad_top) / p.stride_h + 1));
  const int64_t ow1 = larger(ow0, smaller(p.OW, (b.w0 + b.columns - 1 + p.pad_left) / p.stride_w + 1));
  const Region outputs{b.n0, b.images, oh0, oh1 - oh0, ow0, ow1 - ow0};
  const View<float> x = depthwise_view(args, f.x, b, t.c0, t.lanes, f.worker.x.in(worker));
  const View<float> y =
      depthwise_view(args, f.grad_y, outputs, t.c0 * f.multiplier, t.lanes * f.multiplier, f.worker.grad_y.in(worker));
  load_filters(args, f, t.c0, t.lanes, w);
  int64_t* const row_at = f.worker.offset.in(worker);
  int64_t* const column_at = row_at + b.rows * p.KH;
  list_outputs(b.h0 + p.pad_top, b.rows, p.KH, p.dilation_h, p.stride_h, p.OH, oh0, y.row, row_at);
  list_outputs(b.w0 + p.pad_left, b.columns, p.KW, p.dilation_w, p.stride_w, p.OW, ow0, y.pixel, column_at);
  DEPTHWISE_ROWS(depthwise_grad_x_rows, t.lanes, f, x, y, row_at, column_at, b, w, result)
  store_rows(args.type, result, kDepthwiseLanes, args.out, b, t.c0, t.lanes);
}

inline void depthwise_grad_w_split(const Conv2dArgs& args, const DepthwiseShape& f, int64_t task, char* shared,
                                   char* worker) {
  const int64_t panel = task % f.panels, split = task / f.panels;
  float *const sums = f.shared.sums.in(shared) + task * f.sums, *const w = f.worker.w.in(worker);
  zero(sums, f.sums);
  for (int64_t i = split_begin(f.bands, f.splits, split); i < split_begin(f.bands, f.splits, split + 1); ++i) {
    const DepthwiseTask t = depthwise_task(f, i * f.panels + panel);
    const View<float> x = depthwise_view(args, f.x, window_of(f.p, t.band), t.c0, t.lanes, f.worker.x.in(worker));
    const View<float> y =
        depthwise_view(args, f.grad_y, t.band, t.c0 * f.multiplier, t.lanes * f.multiplier, f.worker.grad_y.in(worker));
    load_filters(args, f, t.c0, t.lanes, w);
    DEPTHWISE_ROWS(depthwise_grad_w_rows, t.lanes, f, x, y, tap_offsets(f, x, worker), t.band, w, sums)
  }
}
#undef DEPTHWISE_ROWS

template <typename T>
inline void depthwise_grad_w_sum(const Conv2dArgs& args, const DepthwiseShape& f, int64_t panel, const float* sums) {
  const int64_t c0 = panel * kDepthwiseLanes, lanes = smaller(kDepthwiseLanes, f.p.C_in - c0);
  const int64_t* stride = args.out.stride;
  for (int64_t j = 0; j < f.multiplier; ++j)
    for (int64_t t = 0; t < f.taps; ++t)
      for (int64_t i = 0; i < lanes; ++i) {
        float total = 0;
        for (int64_t k = 0; k < f.splits; ++k)
          total += sums[(k * f.panels + panel) * f.sums + (j * f.taps + t) * kDepthwiseLanes + i];
        from_float(total, static_cast<T*>(args.out.data) + ((c0 + i) * f.multiplier + j) * stride[0] +
                              t / f.p.KW * stride[2] + t % f.p.KW * stride[3]);
      }
}
inline void depthwise_grad_w_reduce(const Conv2dArgs& args, const DepthwiseShape& f, int64_t task, char* shared,
                                    char*) {
  dispatch(args.type,
           [&](auto zero) { depthwise_grad_w_sum<decltype(zero)>(args, f, task, f.shared.sums.in(shared)); });
}

inline Plan<Conv2dArgs> depthwise_forward_plan(const Conv2dArgs& args) {
  const DepthwiseShape f = depthwise_shape(args, DepthwisePass::kForward);
  if (f.sparse) return kDefinitionKernels.forward(args);
  return make_plan<Conv2dArgs, DepthwiseShape, depthwise_forward_task>(f, product(f.bands.count, f.panels));
}
inline Plan<Conv2dArgs> depthwise_grad_x_plan(const Conv2dArgs& args) {
  const DepthwiseShape f = depthwise_shape(args, DepthwisePass::kGradX);
  if (f.sparse) return kDefinitionKernels.grad_x(args);
  return make_plan<Conv2dArgs, DepthwiseShape, depthwise_grad_x_task>(f, product(f.bands.count, f.panels));
}
inline Plan<Conv2dArgs> depthwise_grad_w_plan(const Conv2dArgs& args) {
  const DepthwiseShape f = depthwise_shape(args, DepthwisePass::kGradW);
  if (f.sparse) return kDefinitionKernels.grad_w(args);
  return make_plan<Conv2dArgs, DepthwiseShape, depthwise_grad_w_split, depthwise_grad_w_reduce>(
      f, product(f.splits, f.panels), f.panels);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
