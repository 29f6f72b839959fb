// Depthwise layers (C_in == groups; filter c*multiplier + j reads channel c alone): lanes are channels, and every pass
// is its formula as it stands (forward.h, grad_x.h and grad_w.h have them), so infinities and NaNs need no care.
//
//   Y[n,co,p]     = -sum_t |X[n,c,p+t] - W[co,t]|                              t = (kh, kw)
//   dX[n,c,h,w]   = sum over t and the channel's filters of dY * clamp(W - X, -1, 1)
//   dW[co,t]      = sum_p dY[co,p] * (X[c,p+t] - W[co,t])
//
//   task = (band of rows, block of 4 vectors of channels):
//     x      the block's part of the band in scratch, [row][column][lane]; or the tensor itself
//     dY, y  [row][column][lane*multiplier + j]
//     w      [j][t][lane]
// A term is one load of x, one of w and the arithmetic; 4 vectors share every address and every border test.

#pragma once
#include "input.h"
#include "plan.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kDepthwiseVectors = 4;
constexpr int kDepthwiseLanes = kDepthwiseVectors * kW;
constexpr int64_t kDepthwiseBudget = 16 * 1024;  // floats of input per block

struct DepthwiseShape {
  Conv2dProblem p;
  int64_t multiplier, taps;
  Input x, grad_y;
  Blocking blocking;
  int64_t channel_blocks, partials;
  int64_t sums;  // floats of a partial sum of dW
  bool sparse;   // region.h
  struct Shared : Layout {
    Part<float> sums;  // grad_w: [partial][channel block][j][t][lane]
  } shared;
  struct Worker : Layout {
    Part<float> x, grad_y, w, result;
  } worker;
};

enum class DepthwisePass { kForward, kGradX, kGradW };

inline DepthwiseShape depthwise_shape(const Conv2dArgs& args, DepthwisePass pass) {
  DepthwiseShape f{};
  f.p = args.problem;
  const Conv2dProblem& p = f.p;
  const bool blocks_of_inputs = pass == DepthwisePass::kGradX;  // else of outputs
  f.multiplier = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  f.channel_blocks = ceil_div(p.C_in, kDepthwiseLanes);
  // whole vectors are read: in place only where the channels end with one
  f.x = make_input(args.type, args.x, p.H, p.W, p.C_in, !blocks_of_inputs && reads_padding(p), kW);
  f.grad_y = make_input(args.type, args.grad_y, p.OH, p.OW, p.C_out, f.multiplier > 1, kW);
  if (pass == DepthwisePass::kForward) f.grad_y.in_place = true;  // none: nothing to copy
  if (!f.x.in_place) f.x.pitch = kDepthwiseLanes;
  if (!f.grad_y.in_place) f.grad_y.pitch = kDepthwiseLanes * f.multiplier;
  const int64_t H = blocks_of_inputs ? p.H : p.OH, W = blocks_of_inputs ? p.W : p.OW;
  const int64_t row_pixels = blocks_of_inputs ? p.W : product(p.stride_h, window_columns(p, p.OW));
  f.blocking = make_blocking(p.N, H, W, product(row_pixels, kDepthwiseLanes), kDepthwiseBudget, 16);
  const int64_t reach_rows = (f.blocking.rows - 1 + (p.KH - 1) * p.dilation_h) / p.stride_h + 2;
  const int64_t reach_columns = (f.blocking.columns - 1 + (p.KW - 1) * p.dilation_w) / p.stride_w + 2;
  const int64_t rows = window_rows(p, f.blocking.rows), columns = window_columns(p, f.blocking.columns);
  f.sparse = blocks_of_inputs ? outputs_are_sparse(p, f.blocking, reach_rows, reach_columns, 0)
                              : windows_are_sparse(p, f.blocking, rows, columns);
  f.partials = smaller(kMostPartials, f.blocking.count);

  const int64_t images = f.blocking.images, pixels = f.blocking.pixels();
  const int64_t x_pixels = blocks_of_inputs ? pixels : product(images, rows, columns);
  const int64_t y_pixels = blocks_of_inputs ? product(images, reach_rows, reach_columns) : pixels;
  const int64_t lanes = product(kDepthwiseLanes, f.multiplier);
  f.sums = product(lanes, f.taps);
  if (pass == DepthwisePass::kGradW) f.shared.add(&f.shared.sums, product(f.partials, f.channel_blocks, f.sums));
  f.worker.add(&f.worker.x, copy_floats(f.x, x_pixels));
  f.worker.add(&f.worker.grad_y, copy_floats(f.grad_y, y_pixels));
  f.worker.add(&f.worker.w, sum(f.sums, lanes));
  f.worker.add(&f.worker.result, sum(product(pixels, lanes), kW));
  return f;
}

// w[j][t][lane] and, behind them, bias[j][lane]
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

// lane*m + j  <->  one vector of lanes
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

// A task: a block of pixels, and the `lanes` channels from c0 on.
struct DepthwiseTask {
  Region block;
  int64_t c0, lanes;
};
inline DepthwiseTask depthwise_task(const DepthwiseShape& f, int64_t task) {
  const int64_t c0 = task % f.channel_blocks * kDepthwiseLanes;
  return {block_at(f.blocking, task / f.channel_blocks), c0, smaller(kDepthwiseLanes, f.p.C_in - c0)};
}

template <int NV>
inline void depthwise_forward_rows(const DepthwiseShape& f, const View<float>& x, const Region& b, const float* w,
                                   float* y) {
  const Conv2dProblem& p = f.p;
  const int64_t m = f.multiplier;
  const float* const bias = w + m * f.taps * kDepthwiseLanes;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t h = 0; h < b.rows; ++h)
      for (int64_t ow = 0; ow < b.columns; ++ow, y += kDepthwiseLanes * m) {
        const float* at = x.at(n, h * p.stride_h, ow * p.stride_w);
        for (int64_t j = 0; j < m; ++j) {
          vf c[NV];
          UNROLL_FOR (v, NV) c[v] = vf{};
          const float* tap = w + j * f.taps * kDepthwiseLanes;
          for (int64_t kh = 0; kh < p.KH; ++kh)
            for (int64_t kw = 0; kw < p.KW; ++kw, tap += kDepthwiseLanes) {
              const float* in = at + kh * p.dilation_h * x.row + kw * p.dilation_w * x.pixel;
              UNROLL_FOR (v, NV) c[v] = accumulate(c[v], absolute(load(in + v * kW) - load(tap + v * kW)));
            }
          UNROLL_FOR (v, NV) store_filter(y + v * kW * m + j, m, load(bias + j * kDepthwiseLanes + v * kW) - c[v]);
        }
      }
}

template <int NV>
inline void depthwise_grad_x_rows(const DepthwiseShape& f, const View<float>& x, const View<float>& y,
                                  const Region& outputs, const Region& b, const float* w, float* out) {
  const Conv2dProblem& p = f.p;
  const int64_t m = f.multiplier;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t h = b.h0; h < b.h0 + b.rows; ++h)
      for (int64_t iw = b.w0; iw < b.w0 + b.columns; ++iw, out += kDepthwiseLanes) {
        vf at[NV], c[NV];
        UNROLL_FOR (v, NV) {
          at[v] = load(x.at(n, h - b.h0, iw - b.w0) + v * kW);
          c[v] = vf{};
        }
        for (int64_t kh = 0; kh < p.KH; ++kh) {
          const int64_t a = h + p.pad_top - kh * p.dilation_h, oh = a / p.stride_h;
          if (a < 0 || a % p.stride_h || oh >= p.OH) continue;
          for (int64_t kw = 0; kw < p.KW; ++kw) {
            const int64_t e = iw + p.pad_left - kw * p.dilation_w, ow = e / p.stride_w;
            if (e < 0 || e % p.stride_w || ow >= p.OW) continue;
            const float* g = y.at(n, oh - outputs.h0, ow - outputs.w0);
            for (int64_t j = 0; j < m; ++j) {
              const float* tap = w + (j * f.taps + kh * p.KW + kw) * kDepthwiseLanes;
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
inline void depthwise_grad_w_rows(const DepthwiseShape& f, const View<float>& x, const View<float>& y, const Region& b,
                                  const float* w, float* sums) {
  const Conv2dProblem& p = f.p;
  const int64_t m = f.multiplier;
  for (int64_t j = 0; j < m; ++j)
    for (int64_t t = 0; t < f.taps; ++t, sums += kDepthwiseLanes, w += kDepthwiseLanes) {
      vf c[NV], weight[NV];
      UNROLL_FOR (v, NV) c[v] = load(sums + v * kW), weight[v] = load(w + v * kW);
      for (int64_t n = 0; n < b.images; ++n)
        for (int64_t h = 0; h < b.rows; ++h) {
          const float* in = x.at(n, h * p.stride_h + t / p.KW * p.dilation_h, t % p.KW * p.dilation_w);
          const float* g = y.at(n, h, 0);
          for (int64_t ow = 0; ow < b.columns; ++ow, in += p.stride_w * x.pixel, g += y.pixel)
            UNROLL_FOR (v, NV) c[v] = fused(load_filter(g + v * kW * m + j, m), load(in + v * kW) - weight[v], c[v]);
        }
      UNROLL_FOR (v, NV) store(sums + v * kW, c[v]);
    }
}

// Calls rows<NV> for the vectors of a block of channels; each is 1 to kDepthwiseVectors.
#define DEPTHWISE_ROWS(rows, lanes, ...)                  \
  switch (ceil_div(lanes, kW)) {                          \
    case 1: rows<1>(__VA_ARGS__); break;                  \
    case 2: rows<2>(__VA_ARGS__); break;                  \
    case 3: rows<3>(__VA_ARGS__); break;                  \
    default: rows<kDepthwiseVectors>(__VA_ARGS__); break; \
  }

inline void depthwise_forward_task(const Conv2dArgs& args, const DepthwiseShape& f, int64_t task, char*, char* worker) {
  const DepthwiseTask t = depthwise_task(f, task);
  float *const w = f.worker.w.in(worker), *const result = f.worker.result.in(worker);
  const View<float> x = depthwise_view(args, f.x, window_of(f.p, t.block), t.c0, t.lanes, f.worker.x.in(worker));
  load_filters(args, f, t.c0, t.lanes, w);
  DEPTHWISE_ROWS(depthwise_forward_rows, t.lanes, f, x, t.block, w, result)
  store_rows(args.type, result, kDepthwiseLanes * f.multiplier, args.out, t.block, t.c0 * f.multiplier,
             t.lanes * f.multiplier);
}

inline void depthwise_grad_x_task(const Conv2dArgs& args, const DepthwiseShape& f, int64_t task, char*, char* worker) {
  const Conv2dProblem& p = f.p;
  const DepthwiseTask t = depthwise_task(f, task);
  const Region& b = t.block;
  float *const w = f.worker.w.in(worker), *const result = f.worker.result.in(worker);
  // the outputs that these pixels reach and that exist
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
  DEPTHWISE_ROWS(depthwise_grad_x_rows, t.lanes, f, x, y, outputs, b, w, result)
  store_rows(args.type, result, kDepthwiseLanes, args.out, b, t.c0, t.lanes);
}

inline void depthwise_grad_w_partial(const Conv2dArgs& args, const DepthwiseShape& f, int64_t task, char* shared,
                                     char* worker) {
  const int64_t channel_block = task % f.channel_blocks, partial = task / f.channel_blocks;
  float *const sums = f.shared.sums.in(shared) + task * f.sums, *const w = f.worker.w.in(worker);
  zero(sums, f.sums);
  for (int64_t i = partial_begin(f.blocking, f.partials, partial);
       i < partial_begin(f.blocking, f.partials, partial + 1); ++i) {
    const DepthwiseTask t = depthwise_task(f, i * f.channel_blocks + channel_block);
    const View<float> x = depthwise_view(args, f.x, window_of(f.p, t.block), t.c0, t.lanes, f.worker.x.in(worker));
    const View<float> y = depthwise_view(args, f.grad_y, t.block, t.c0 * f.multiplier, t.lanes * f.multiplier,
                                         f.worker.grad_y.in(worker));
    load_filters(args, f, t.c0, t.lanes, w);
    DEPTHWISE_ROWS(depthwise_grad_w_rows, t.lanes, f, x, y, t.block, w, sums)
  }
}
#undef DEPTHWISE_ROWS

template <typename T>
inline void depthwise_grad_w_sum(const Conv2dArgs& args, const DepthwiseShape& f, int64_t channel_block,
                                 const float* sums) {
  const int64_t c0 = channel_block * kDepthwiseLanes, lanes = smaller(kDepthwiseLanes, f.p.C_in - c0);
  const int64_t* stride = args.out.stride;
  for (int64_t j = 0; j < f.multiplier; ++j)
    for (int64_t t = 0; t < f.taps; ++t)
      for (int64_t i = 0; i < lanes; ++i) {
        float total = 0;
        for (int64_t k = 0; k < f.partials; ++k)
          total += sums[(k * f.channel_blocks + channel_block) * f.sums + (j * f.taps + t) * kDepthwiseLanes + i];
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
  return make_plan<Conv2dArgs, DepthwiseShape, depthwise_forward_task>(f, product(f.blocking.count, f.channel_blocks));
}
inline Plan<Conv2dArgs> depthwise_grad_x_plan(const Conv2dArgs& args) {
  const DepthwiseShape f = depthwise_shape(args, DepthwisePass::kGradX);
  if (f.sparse) return kDefinitionKernels.grad_x(args);
  return make_plan<Conv2dArgs, DepthwiseShape, depthwise_grad_x_task>(f, product(f.blocking.count, f.channel_blocks));
}
inline Plan<Conv2dArgs> depthwise_grad_w_plan(const Conv2dArgs& args) {
  const DepthwiseShape f = depthwise_shape(args, DepthwisePass::kGradW);
  if (f.sparse) return kDefinitionKernels.grad_w(args);
  return make_plan<Conv2dArgs, DepthwiseShape, depthwise_grad_w_partial, depthwise_grad_w_reduce>(
      f, product(f.partials, f.channel_blocks), f.channel_blocks);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
