// Gradient of the input, float32 sums:   dX[n,ci,h,w] = sum over (kh,kw,co) of dY[n,co,oh,ow] * clamp(W - X, -1, 1)
// with oh*stride_h = h + pad_top - kh*dilation_h and ow likewise.  This is AdderNet's training gradient (arXiv
// 1912.13200, section 3.2), on purpose not the derivative, which is sgn(W - X).
//
// Gather form: every input pixel sums its own terms, so nothing is added atomically and the order is fixed.  Pixels
// whose (h + pad_top, w + pad_left) have the same remainders by the strides form a phase; all pixels of a phase use the
// same taps and step through dY by one.
//
//   dY   the outputs that a band's pixels reach, copied to [image][row][column][co], zero where no output is; or the
//        tensor itself
//   x    one vector tile per pixel, constant over the sum: in registers (32), or read from memory by the sub (16)
//   w    packed panels [phase][tap][co][NV*kW lanes of ci]
//   acc  one panel of one phase, [pixel][NV*kW]
//
//   stage 0: task = pack one panel of w, or copy part of the dY that several tasks share
//   stage 1: task = (band of input pixels, group, part of the panels)
//            panel -> phase -> slab of terms -> tile of MR pixels x NV vectors of input channels:
//
//              one term of w   [ vector 0 | ... | vector NV-1 ]    NV loads, shared by the MR pixels
//                                lanes: channels ci ->
//   dY[pixel 0]     broadcast  [ accumulators        x held  ]    1 broadcast per pixel and term; with AVX-512 it is
//   dY[pixel 1]     broadcast  [                             ]    part of the fma
//   ...                        [                             ]    NV (sub, clamp, fma) per pixel and term; clamp is 1
//   dY[pixel MR-1]  broadcast  [                             ]    instruction with AVX-512, 2 otherwise
//
//   32 registers: MR x NV = 6 x 2, 10 x 1;  16 registers: 4 x 2, 8 x 1.
//
// Tails: a phase's last tile repeats its last pixel; lanes beyond C_in have zero weights and are never stored.
// clamp_unit() turns a NaN into +-1.  A NaN of x is put back at the end, since every sum with it is NaN; weights that
// are not all finite send the whole group through the definition.
#pragma once
#include "../../definition/conv2d.h"
#include "input.h"
#include "pack.h"
#include "panels.h"
#include "plan.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kGradXPanel = 2;
constexpr int64_t kGradXDepth = 192;
constexpr int grad_x_rows(int nv) { return kRegisters == 32 ? (nv == 2 ? 6 : 10) : (nv == 2 ? 4 : 8); }
constexpr int kGradXMostRows = 10;

template <int MR, int NV>
__attribute__((noinline)) void grad_x_tile(const float* const* grad_y, const float* const* x, const Segment* segments,
                                           int64_t count, const float* w, float* acc, bool first) {
  vf c[MR][NV], at[MR][NV];
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) {
      at[i][j] = load(x[i] + j * kW);
      c[i][j] = first ? vf{} : load(acc + (i * NV + j) * kW);
    }
  for (int64_t s = 0; s < count; ++s) {
    const float* a[MR];
    UNROLL_FOR (i, MR) a[i] = grad_y[i] + segments[s].offset + segments[s].length;
    for (int64_t k = -segments[s].length; k < 0; ++k, w += NV * kW) {
      vf b[NV];
      UNROLL_FOR (j, NV) b[j] = load(w + j * kW);
      UNROLL_FOR (i, MR) {
        UNROLL_FOR (j, NV) {
          // every other subtraction uses the multiplier: with the clamp on the adder, both are then equally busy
          const vf d = (i + j) % 2 ? difference<true>(b[j], at[i][j]) : difference<false>(b[j], at[i][j]);
          c[i][j] = fused_of(a[i] + k, clamp_unit(d), c[i][j]);
        }
      }
    }
  }
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) store(acc + (i * NV + j) * kW, c[i][j]);
}

struct GradXShape {
  Conv2dProblem p;
  int64_t C, M, taps;
  Input grad_y, x;
  Bands bands;
  Panels panels;
  int64_t reach_rows, reach_columns;  // of dY, that the pixels of a band reach at most
  int64_t copy;                       // floats of a band's copy of dY
  int64_t copy_tasks;                 // as in forward.h
  bool direct_out;                    // dX is written by the epilogue, not by way of `result`
  struct Shared : Layout {
    Part<float> w;
    Part<int32_t> nonfinite;  // one flag per panel
    Part<float> grad_y;       // [unit], when units are divided
  } shared;
  struct Worker : Layout {
    Part<float> grad_y, x, acc, result;
    Part<const float*> grad_y_at, x_at;  // of each pixel of the phase
    Part<float*> target;                 // where its gradient goes
    Part<int64_t> index;                 // of the pixel in the band
    Part<int64_t> tap, position;
    Part<Segment> segments;
  } worker;
};

inline GradXShape grad_x_shape(const Conv2dArgs& args) {
  GradXShape f{};
  f.p = args.problem;
  const Conv2dProblem& p = f.p;
  f.C = p.C_in / p.groups, f.M = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  const int64_t span_h = (p.KH - 1) * p.dilation_h, span_w = (p.KW - 1) * p.dilation_w;
  const int64_t reach = (p.W - 1 + span_w) / p.stride_w + 2;
  const bool padded = p.pad_left < span_w || (p.W - 1 + p.pad_left) / p.stride_w >= p.OW || p.pad_top < span_h ||
                      (p.H - 1 + p.pad_top) / p.stride_h >= p.OH;
  f.grad_y = make_input(args.type, args.grad_y, p.OH, p.OW, f.M, padded, 1);
  f.x = make_input(args.type, args.x, p.H, p.W, f.C, false, kW);
  const int64_t row = sum(product(p.W, f.C), ceil_div(product(reach, f.M), p.stride_h));
  f.bands = make_bands(p.N, p.H, p.W, row, 48 * 1024, 192);
  const int64_t units = product(f.bands.count, p.groups);
  f.panels = make_panels(f.C, kGradXPanel, units);
  f.copy_tasks = f.panels.parts > 1 && !f.grad_y.in_place ? ceil_div(f.M, kCopyChannels) : 0;
  // the copy of x holds whole vectors of the lanes of one task
  if (!f.x.in_place) f.x.pitch = copy_pitch(ceil_div(f.panels.count, f.panels.parts) * kGradXPanel * kW);
  f.reach_rows = (f.bands.rows - 1 + span_h) / p.stride_h + 2;
  f.reach_columns = (f.bands.columns - 1 + span_w) / p.stride_w + 2;
  f.copy = copy_floats(f.grad_y, product(f.bands.images, f.reach_rows, f.reach_columns));
  f.direct_out = args.type == ElementType::kFloat32 && args.out.stride[1] == 1;

  const int64_t lanes = product(p.groups, f.panels.vectors, kW), pixels = f.bands.pixels() + kGradXMostRows;
  f.shared.add(&f.shared.w, product(lanes, f.M, f.taps));
  f.shared.add(&f.shared.nonfinite, product(p.groups, f.panels.count));
  f.shared.add(&f.shared.grad_y, f.copy_tasks ? product(units, f.copy) : 0);
  f.worker.add(&f.worker.grad_y, f.copy_tasks ? 0 : f.copy);
  f.worker.add(&f.worker.x, copy_floats(f.x, f.bands.pixels()));
  f.worker.add(&f.worker.acc, product(pixels, kGradXPanel * kW));
  f.worker.add(&f.worker.result, f.direct_out ? 0 : product(pixels, kGradXPanel * kW) + kW);
  f.worker.add(&f.worker.grad_y_at, pixels);
  f.worker.add(&f.worker.x_at, pixels);
  f.worker.add(&f.worker.target, pixels);
  f.worker.add(&f.worker.index, pixels);
  f.worker.add(&f.worker.tap, f.taps);
  f.worker.add(&f.worker.position, f.taps);
  f.worker.add(&f.worker.segments, segment_bound(f.taps, f.M, kGradXDepth));
  return f;
}

// The taps that reach pixels of a phase, (kh, kw) descending: ascending in dY.
inline int64_t phase_taps(const Conv2dProblem& p, int64_t phase_h, int64_t phase_w, int64_t* tap) {
  int64_t count = 0;
  for (int64_t kh = p.KH; kh-- > 0;)
    for (int64_t kw = p.KW; kw-- > 0;)
      if (kh * p.dilation_h % p.stride_h == phase_h && kw * p.dilation_w % p.stride_w == phase_w)
        tap[count++] = kh * p.KW + kw;
  return count;
}

template <typename T>
inline void grad_x_pack(const Conv2dArgs& args, const GradXShape& f, int64_t task, char* shared, char* worker) {
  const Conv2dProblem& p = f.p;
  const int64_t* stride = args.w.stride;
  const int64_t group = task / f.panels.count, panel = task % f.panels.count;
  const int64_t v0 = panel_begin(f.panels, panel), nv = panel_begin(f.panels, panel + 1) - v0, step = nv * kW;
  float* const panel_w = f.shared.w.in(shared) + (group * f.panels.vectors + v0) * kW * f.M * f.taps;
  vi bad{};
  // position[t]: where tap t stands in the order of the phases
  int64_t *tap = f.worker.tap.in(worker), *position = f.worker.position.in(worker), placed = 0;
  for (int64_t rh = 0; rh < smaller(p.stride_h, (p.KH - 1) * p.dilation_h + 1); ++rh)
    for (int64_t rw = 0; rw < smaller(p.stride_w, (p.KW - 1) * p.dilation_w + 1); ++rw)
      for (int64_t i = 0, n = phase_taps(p, rh, rw, tap); i < n; ++i) position[tap[i]] = placed++;
  for (int64_t j = 0; j < nv; ++j) {
    const int64_t ci = (v0 + j) * kW, lanes = smaller(kW, f.C - ci);
    const bool taps_dense = (p.KW == 1 || stride[3] == 1) && (p.KH == 1 || stride[2] == p.KW * stride[3]);
    for (int64_t co = 0; co < f.M; ++co) {
      const T* w = static_cast<const T*>(args.w.data) + (group * f.M + co) * stride[0] + ci * stride[1];
      for (int64_t t0 = 0; t0 < f.taps; t0 += kW) {
        const int64_t nt = smaller(kW, f.taps - t0);
        vf v[kW];
        if (stride[1] != 1 && taps_dense && f.taps > 1) {  // taps contiguous: transpose (ci, tap)
          for (int i = 0; i < kW; ++i) v[i] = i < lanes ? load_n(w + i * stride[1] + t0, nt) : vf{};
          transpose(v);
        } else {
          for (int64_t t = t0; t < t0 + nt; ++t)
            v[t - t0] = load_strided(w + t / p.KW * stride[2] + t % p.KW * stride[3], stride[1], lanes);
        }
        for (int64_t t = 0; t < nt; ++t) {
          bad |= ~(absolute(v[t]) <= __FLT_MAX__);
          store(panel_w + (position[t0 + t] * f.M + co) * step + j * kW, v[t]);
        }
      }
    }
  }
  f.shared.nonfinite.in(shared)[task] = any(bad);
}

// Whether any output reads pixel (h, w).
inline bool reached(const Conv2dProblem& p, int64_t h, int64_t w) {
  for (int64_t kh = 0; kh < p.KH; ++kh)
    for (int64_t kw = 0; kw < p.KW; ++kw) {
      const int64_t a = h + p.pad_top - kh * p.dilation_h, b = w + p.pad_left - kw * p.dilation_w;
      if (a >= 0 && b >= 0 && a % p.stride_h == 0 && b % p.stride_w == 0 && a / p.stride_h < p.OH &&
          b / p.stride_w < p.OW)
        return true;
    }
  return false;
}

// One panel for all pixels of one phase of a band; `w` begins with the phase's first term.
template <int NV>
inline void grad_x_panel(const GradXShape& f, const Region& b, const Segment* segments, int64_t count, int64_t pixels,
                         const float* w, int64_t lanes, char* worker) {
  constexpr int MR = grad_x_rows(NV), NR = NV * kW;
  const float* const* const grad_y_at = f.worker.grad_y_at.in(worker);
  const float* const* const x_at = f.worker.x_at.in(worker);
  float* const* const target = f.worker.target.in(worker);
  if (!count) {
    for (int64_t i = 0; i < pixels; ++i) zero(target[i], lanes);
    return;
  }
  for (int64_t begin = 0, end; begin < count; begin = end) {
    int64_t terms = 0;
    for (end = begin; end < count && segments[end].slab == segments[begin].slab; ++end) terms += segments[end].length;
    for (int64_t i = 0; i < pixels; i += MR) {
      float* acc = f.worker.acc.in(worker) + i * NR;
      grad_x_tile<MR, NV>(grad_y_at + i, x_at + i, segments + begin, end - begin, w, acc, begin == 0);
      if (end < count) continue;
      for (int64_t q = 0; q < smaller(MR, pixels - i); ++q)
        for (int64_t j = 0; j < lanes; j += kW) {
          vf v = load(acc + q * NR + j);
          const vf x = load(x_at[i + q] + j);
          const vi nan = x != x;
          if (any(nan)) {
            const int64_t index = f.worker.index.in(worker)[i + q];
            if (reached(f.p, b.h0 + index / b.columns % b.rows, b.w0 + index % b.columns)) v = nan ? x : v;
          }
          store_up_to(target[i + q] + j, v, smaller(kW, lanes - j));
        }
    }
    w += terms * NR;
  }
}

template <typename T>
inline void grad_x_by_definition(const Conv2dArgs& args, const Region& b, int64_t c0, int64_t c1) {
  const int64_t* stride = args.out.stride;
  for (int64_t n = b.n0; n < b.n0 + b.images; ++n)
    for (int64_t ci = c0; ci < c1; ++ci)
      for (int64_t h = b.h0; h < b.h0 + b.rows; ++h)
        for (int64_t w = b.w0; w < b.w0 + b.columns; ++w)
          from_float(definition::grad_x<T>(args, n, ci, h, w),
                     static_cast<T*>(args.out.data) + n * stride[0] + ci * stride[1] + h * stride[2] + w * stride[3]);
}

// The outputs that a band's pixels reach, some of them outside the image.
inline Region outputs_of(const Conv2dProblem& p, const Region& b) {
  const int64_t oh0 = floor_div(b.h0 + p.pad_top - (p.KH - 1) * p.dilation_h, p.stride_h);
  const int64_t ow0 = floor_div(b.w0 + p.pad_left - (p.KW - 1) * p.dilation_w, p.stride_w);
  return {b.n0, b.images,
          oh0,  (b.h0 + b.rows - 1 + p.pad_top) / p.stride_h + 1 - oh0,
          ow0,  (b.w0 + b.columns - 1 + p.pad_left) / p.stride_w + 1 - ow0};
}

// The remainder of a / b, not negative.
inline int64_t remainder(int64_t a, int64_t b) { return (a % b + b) % b; }

// A phase of one band: how many taps, segments of dY, and pixels.
struct GradXPhase {
  int64_t taps, segments, pixels;
};
// Prepares the tiles of one phase and panel.  `x`, and `out` if f.direct_out, begin with the panel's first channel;
// otherwise the results go to `result`, `pitch` floats per pixel.
inline GradXPhase grad_x_phase(const Conv2dArgs& args, const GradXShape& f, const Region& b, const Region& outputs,
                               int64_t rh, int64_t rw, const View<float>& grad_y, const View<float>& x, float* out,
                               int64_t pitch, char* worker) {
  const Conv2dProblem& p = f.p;
  int64_t* const tap = f.worker.tap.in(worker);
  const int64_t taps = phase_taps(p, rh, rw, tap);
  // th, tw: how far back in dY a tap reads, counted from the pixel's quotient by the stride
  const int64_t th_most = taps ? (tap[0] / p.KW * p.dilation_h - rh) / p.stride_h : 0;
  const int64_t tw_most = taps ? (tap[0] % p.KW * p.dilation_w - rw) / p.stride_w : 0;
  for (int64_t i = 0; i < taps; ++i) {
    const int64_t th = (tap[i] / p.KW * p.dilation_h - rh) / p.stride_h;
    const int64_t tw = (tap[i] % p.KW * p.dilation_w - rw) / p.stride_w;
    tap[i] = (th_most - th) * grad_y.row + (tw_most - tw) * grad_y.pixel;
  }
  const int64_t segments = make_segments(tap, taps, f.M, kGradXDepth, f.worker.segments.in(worker));

  const float** const grad_y_at = f.worker.grad_y_at.in(worker);
  const float** const x_at = f.worker.x_at.in(worker);
  float** const target = f.worker.target.in(worker);
  int64_t* const index = f.worker.index.in(worker);
  float* const result = f.worker.result.in(worker);
  const int64_t* stride = args.out.stride;
  // first row and column of the phase: (h + pad_top) % stride_h == rh
  const int64_t h_first = b.h0 + remainder(rh - b.h0 - p.pad_top, p.stride_h);
  const int64_t w_first = b.w0 + remainder(rw - b.w0 - p.pad_left, p.stride_w);
  int64_t pixels = 0;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t h = h_first; h < b.h0 + b.rows; h += p.stride_h) {
      const int64_t oh = (h + p.pad_top) / p.stride_h - th_most - outputs.h0;
      for (int64_t w = w_first; w < b.w0 + b.columns; w += p.stride_w, ++pixels) {
        const int64_t ow = (w + p.pad_left) / p.stride_w - tw_most - outputs.w0;
        grad_y_at[pixels] = grad_y.at(n, oh, ow);
        x_at[pixels] = x.at(n, h - b.h0, w - b.w0);
        index[pixels] = (n * b.rows + h - b.h0) * b.columns + w - b.w0;
        target[pixels] = f.direct_out ? out + (b.n0 + n) * stride[0] + h * stride[2] + w * stride[3]
                                      : result + index[pixels] * pitch;
      }
    }
  if (pixels)
    for (int i = 0; i < kGradXMostRows; ++i)
      grad_y_at[pixels + i] = grad_y_at[pixels - 1], x_at[pixels + i] = x_at[pixels - 1];
  return {taps, segments, pixels};
}

inline void grad_x_task(const Conv2dArgs& args, const GradXShape& f, int64_t task, char* shared, char* worker) {
  const Conv2dProblem& p = f.p;
  const PanelTask t = panel_task(f.bands, p.groups, f.panels, task);
  const Region &b = t.band, outputs = outputs_of(p, b);
  const int64_t lane0 = panel_begin(f.panels, t.begin) * kW, c0 = t.group * f.C + lane0;
  const int64_t channels = smaller(f.C, panel_begin(f.panels, t.end) * kW) - lane0;
  for (int64_t i = 0; i < f.panels.count; ++i)
    if (f.shared.nonfinite.in(shared)[t.group * f.panels.count + i])
      return dispatch(args.type, [&](auto zero) { grad_x_by_definition<decltype(zero)>(args, b, c0, c0 + channels); });
  float* const copy = f.copy_tasks ? f.shared.grad_y.in(shared) + t.unit * f.copy : f.worker.grad_y.in(worker);
  if (!f.copy_tasks) copy_region(args.type, f.grad_y, outputs, t.group * f.M, 0, f.M, copy);
  copy_region(args.type, f.x, b, c0, 0, channels, f.worker.x.in(worker));
  const View<float> grad_y = view_of(f.grad_y, outputs, t.group * f.M, copy);

  for (int64_t panel = t.begin; panel < t.end; ++panel) {
    const int64_t v0 = panel_begin(f.panels, panel), nv = panel_begin(f.panels, panel + 1) - v0, NR = nv * kW;
    const int64_t lanes = smaller(NR, f.C - v0 * kW), ci = t.group * f.C + v0 * kW;
    const float* w = f.shared.w.in(shared) + (t.group * f.panels.vectors + v0) * kW * f.M * f.taps;
    View<float> x = view_of(f.x, b, c0, f.worker.x.in(worker));
    x.data += v0 * kW - lane0;
    for (int64_t rh = 0; rh < p.stride_h; ++rh)
      for (int64_t rw = 0; rw < p.stride_w; ++rw) {
        const GradXPhase phase =
            grad_x_phase(args, f, b, outputs, rh, rw, grad_y, x, static_cast<float*>(args.out.data) + ci, NR, worker);
        const auto run = nv == 1 ? grad_x_panel<1> : grad_x_panel<2>;
        run(f, b, f.worker.segments.in(worker), phase.segments, phase.pixels, w, lanes, worker);
        w += phase.taps * f.M * NR;
      }
    if (!f.direct_out) store_rows(args.type, f.worker.result.in(worker), NR, args.out, b, ci, lanes);
  }
}

inline void grad_x_prepare(const Conv2dArgs& args, const GradXShape& f, int64_t task, char* shared, char* worker) {
  const int64_t panels = f.p.groups * f.panels.count;
  if (task < panels)
    return dispatch(args.type, [&](auto zero) { grad_x_pack<decltype(zero)>(args, f, task, shared, worker); });
  const int64_t unit = (task - panels) / f.copy_tasks, begin = (task - panels) % f.copy_tasks * kCopyChannels;
  const Region outputs = outputs_of(f.p, band_at(f.bands, unit / f.p.groups));
  copy_region(args.type, f.grad_y, outputs, unit % f.p.groups * f.M, begin, smaller(f.M, begin + kCopyChannels),
              f.shared.grad_y.in(shared) + unit * f.copy);
}

inline Plan<Conv2dArgs> grad_x_plan(const Conv2dArgs& args) {
  const GradXShape f = grad_x_shape(args);
  if (outputs_are_sparse(f.p, f.bands, f.reach_rows, f.reach_columns, product(f.p.stride_h, f.p.stride_w)))
    return kDefinitionKernels.grad_x(args);
  const int64_t units = product(f.p.groups, f.bands.count);
  return make_plan<Conv2dArgs, GradXShape, grad_x_prepare, grad_x_task>(
      f, sum(product(f.p.groups, f.panels.count), product(units, f.copy_tasks)), product(units, f.panels.parts));
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
