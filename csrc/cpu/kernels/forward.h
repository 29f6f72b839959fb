// Forward, float32 sums:   Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]|      k = (kh, kw, ci),  p = (oh, ow)
//
// Computed as  Y = 2*sum_k min(X, W) - (sum_k X + sum_k W):  two instructions per term (min, add) where the direct form
// has three (sub, and, add).  The sums over X and W take one pass over the input and the weights.  Where this form
// cancels (|sum X + sum W| or sum |W| > kCancellation * |Y|: large common offsets), overflows, or meets an infinity or
// NaN, the tile is computed again by the direct form, which replaces the lanes in question.
//
//   x    the window of one band, copied to [image][row][column][ci] and zero padded; or the tensor itself (float32,
//        channels_last, no padding)
//   w    packed panels [term][NV*kW lanes of co]
//   acc  one panel of the band's output, [pixel][NV*kW]
//
//   stage 0: task = pack one panel of w, or copy part of a window that several tasks share
//   stage 1: task = (band of output pixels, group, part of the panels)
//            panel -> slab of terms (its weights stay in L1) -> tile of MR pixels x NV vectors of filters:
//
//              one term of w   [ vector 0 | ... | vector NV-1 ]    NV loads, shared by the MR pixels
//                                lanes: filters co ->
//   x[pixel 0]      broadcast  [ accumulators                ]    1 broadcast per pixel and term; with AVX-512 it is
//   x[pixel 1]      broadcast  [                             ]    part of the min
//   ...                        [                             ]    NV (min, add) per pixel and term
//   x[pixel MR-1]   broadcast  [                             ]
//
//   32 registers: MR x NV = 6 x 4, 8 x 3, 10 x 2, 10 x 1;  16 registers: 6 x 2, 8 x 1.
//
// Tails: a band's last tile repeats its last pixel; lanes beyond C_out have zero weights and are never stored.
#pragma once
#include "input.h"
#include "pack.h"
#include "panels.h"
#include "plan.h"

namespace adderops {
namespace cpu {
namespace {

constexpr float kCancellation = 32.f;
constexpr int64_t kForwardDepth = kRegisters == 32 ? 192 : 256;  // terms per slab

constexpr int forward_rows(int nv) { return kRegisters == 32 ? (nv == 4 ? 6 : nv == 3 ? 8 : 10) : (nv == 2 ? 6 : 8); }
constexpr int kForwardMostRows = 10;
constexpr int kForwardPanel = kRegisters == 32 ? 4 : 2;

template <int MR, int NV, bool Direct>
__attribute__((noinline)) void forward_tile(const float* const* x, const Segment* segments, int64_t count,
                                            const float* w, float* acc, bool first) {
  vf c[MR][NV];
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) c[i][j] = first ? vf{} : load(acc + (i * NV + j) * kW);
  for (int64_t s = 0; s < count; ++s) {
    const float* a[MR];
    UNROLL_FOR (i, MR) a[i] = x[i] + segments[s].offset + segments[s].length;
    for (int64_t k = -segments[s].length; k < 0; ++k, w += NV * kW) {
      vf b[NV];
      UNROLL_FOR (j, NV) b[j] = load(w + j * kW);
      UNROLL_FOR (i, MR) {
        UNROLL_FOR (j, NV)
          c[i][j] = accumulate(c[i][j], Direct ? absolute(splat(a[i][k]) - b[j]) : minimum_of(a[i] + k, b[j]));
      }
    }
  }
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) store(acc + (i * NV + j) * kW, c[i][j]);
}

struct ForwardShape {
  Conv2dProblem p;  // of the strided view when the kernel is 1x1
  int64_t C, M, K, taps;
  Input x;
  Bands bands;
  Panels panels;
  int64_t rows, columns;  // of the window that a band reads
  int64_t copy;           // floats of a band's copy of x
  int64_t copy_tasks;     // per unit, when its tasks share a copy; 0: every task makes its own
  bool direct_out;        // y is written by the epilogue, not by way of acc
  struct Shared : Layout {
    Part<float> w, sum_w, size_w, bias;
    Part<float> x;  // [unit], when units are divided
  } shared;
  struct Worker : Layout {
    Part<float> x, channel_sums, row_sums, sum_x, acc;
    Part<const float*> pixel;
    Part<int64_t> tap;
    Part<Segment> segments;
  } worker;
};

inline ForwardShape forward_shape(const Conv2dArgs& args) {
  ForwardShape f{};
  f.p = args.problem;
  Conv2dProblem& p = f.p;
  const Operand x = dense_view(args.x, &p);
  f.C = p.C_in / p.groups, f.M = p.C_out / p.groups, f.taps = product(p.KH, p.KW), f.K = product(f.C, f.taps);
  f.x = make_input(args.type, x, p.H, p.W, f.C, reads_padding(p), 1);
  f.bands = make_bands(p.N, p.OH, p.OW, product(p.stride_h, window_columns(p, p.OW), f.C), 32 * 1024, 192);
  const int64_t units = product(f.bands.count, p.groups);
  f.panels = make_panels(f.M, kForwardPanel, units);
  f.rows = window_rows(p, f.bands.rows), f.columns = window_columns(p, f.bands.columns);
  f.copy = copy_floats(f.x, product(f.bands.images, f.rows, f.columns));
  f.copy_tasks = f.panels.parts > 1 && !f.x.in_place ? ceil_div(f.C, kCopyChannels) : 0;
  f.direct_out = args.type == ElementType::kFloat32 && args.out.stride[1] == 1;

  const int64_t lanes = product(p.groups, f.panels.vectors, kW), pixels = f.bands.pixels() + kForwardMostRows;
  f.shared.add(&f.shared.w, product(lanes, f.K));
  f.shared.add(&f.shared.sum_w, lanes);
  f.shared.add(&f.shared.size_w, lanes);
  f.shared.add(&f.shared.bias, lanes);
  f.shared.add(&f.shared.x, f.copy_tasks ? product(units, f.copy) : 0);
  f.worker.add(&f.worker.x, f.copy_tasks ? 0 : f.copy);
  f.worker.add(&f.worker.channel_sums, product(f.rows, f.columns) + kW);
  f.worker.add(&f.worker.row_sums, f.columns + kW);
  f.worker.add(&f.worker.sum_x, pixels);
  f.worker.add(&f.worker.acc, product(pixels, kForwardPanel * kW) + kW);
  f.worker.add(&f.worker.pixel, pixels);
  f.worker.add(&f.worker.tap, f.taps);
  f.worker.add(&f.worker.segments, segment_bound(f.taps, f.C, kForwardDepth));
  return f;
}

// sums[i] = sum of the channels of pixel i
inline void sum_channels(const float* x, int64_t pitch, int64_t channels, int64_t pixels, float* sums) {
  for (int64_t i = 0; i < pixels; i += kW) {
    const int64_t n = smaller(kW, pixels - i);
    vf v[kW];
    for (int64_t j = 0; j < kW; ++j) {
      const float* p = x + (i + smaller(j, n - 1)) * pitch;
      vf s{};
      int64_t c = 0;
      for (; c + kW <= channels; c += kW) s += load(p + c);
      if (c < channels) s += load_n(p + c, channels - c);
      v[j] = s;
    }
    transpose(v);
    vf total{};
    UNROLL_FOR (j, kW) total += v[j];
    store(sums + i, total);
  }
}

// Lists the band's pixels (base of each window) and the sum of x over each window; returns how many.
inline int64_t list_pixels(const ForwardShape& f, const View<float>& x, const Region& window, const Region& b,
                           char* worker) {
  const Conv2dProblem& p = f.p;
  float* const channel_sums = f.worker.channel_sums.in(worker);
  float* const row_sums = f.worker.row_sums.in(worker);
  float* const sum_x = f.worker.sum_x.in(worker);
  const float** const pixel = f.worker.pixel.in(worker);
  int64_t count = 0;
  for (int64_t n = 0; n < b.images; ++n) {
    for (int64_t r = 0; r < window.rows; ++r)
      sum_channels(x.at(n, r, 0), x.pixel, f.C, window.columns, channel_sums + r * window.columns);
    for (int64_t h = 0; h < b.rows; ++h) {
      const float* sums = channel_sums + h * p.stride_h * window.columns;
      for (int64_t j = 0; j < window.columns; j += kW) {
        vf total{};
        for (int64_t kh = 0; kh < p.KH; ++kh) total += load(sums + kh * p.dilation_h * window.columns + j);
        store(row_sums + j, total);
      }
      for (int64_t ow = 0; ow < b.columns; ++ow, ++count) {
        float total = 0;
        for (int64_t kw = 0; kw < p.KW; ++kw) total += row_sums[ow * p.stride_w + kw * p.dilation_w];
        sum_x[count] = total;
        pixel[count] = x.at(n, h * p.stride_h, ow * p.stride_w);
      }
    }
  }
  for (int i = 0; i < kForwardMostRows; ++i) pixel[count + i] = pixel[count - 1], sum_x[count + i] = 0;
  return count;
}

// Whether y = 2*sum min - both is finite and not the remainder of a cancellation.  A comparison with NaN is false.
// Offsets of opposite sign cancel within `both`, but not within sum |W|; sum |X| is at most |y| + sum |W|.
ALWAYS_INLINE vi trustworthy(vf both, vf size_w, vf y) {
  const vf most = kCancellation * absolute(y);
  return (absolute(both) <= most) & (size_w <= most) & (absolute(y) <= __FLT_MAX__);
}

// Epilogue of one pixel: acc -> y, in place; true when a lane needs the direct form.
template <int NV>
ALWAYS_INLINE bool finish_pixel(float* acc, float sum_x, const float* sum_w, const float* size_w, const float* bias) {
  vi doubtful{};
  UNROLL_FOR (j, NV) {
    const vf m = load(acc + j * kW), both = splat(sum_x) + load(sum_w + j * kW), y = m + m - both;
    doubtful |= ~trustworthy(both, load(size_w + j * kW), y);
    store(acc + j * kW, y + load(bias + j * kW));
  }
  return any(doubtful);
}

template <int NV>
__attribute__((noinline)) void repair_tile(const float* const* x, const Segment* segments, int64_t count,
                                           const float* w, float* acc, const float* sum_x, const float* sum_w,
                                           const float* size_w, const float* bias) {
  constexpr int MR = forward_rows(NV);
  alignas(64) float direct[MR * NV * kW];
  forward_tile<MR, NV, true>(x, segments, count, w, direct, true);
  for (int i = 0; i < MR * NV; ++i) {
    const int j = i % NV;
    const vf y = load(acc + i * kW), both = splat(sum_x[i / NV]) + load(sum_w + j * kW);
    const vf b = load(bias + j * kW), size = load(size_w + j * kW);
    store(acc + i * kW, trustworthy(both, size, y - b) ? y : b - load(direct + i * kW));
  }
}

// One panel for all pixels of a band; `acc` keeps the sums between slabs.
template <int NV>
inline void forward_panel(const float* const* pixel, const float* sum_x, int64_t pixels, const Segment* segments,
                          int64_t count, const float* w, const float* sum_w, const float* size_w, const float* bias,
                          float* acc, int64_t lanes, float* out, int64_t out_pitch) {
  constexpr int MR = forward_rows(NV), NR = NV * kW;
  const float* slab = w;
  for (int64_t begin = 0, end; begin < count; begin = end) {
    int64_t terms = 0;
    for (end = begin; end < count && segments[end].slab == segments[begin].slab; ++end) terms += segments[end].length;
    for (int64_t i = 0; i < pixels; i += MR) {
      float* tile = acc + i * NR;
      forward_tile<MR, NV, false>(pixel + i, segments + begin, end - begin, slab, tile, begin == 0);
      if (end < count) continue;
      const int64_t n = smaller(MR, pixels - i);
      bool doubtful = false;
      for (int64_t q = 0; q < n; ++q) doubtful |= finish_pixel<NV>(tile + q * NR, sum_x[i + q], sum_w, size_w, bias);
      if (doubtful) repair_tile<NV>(pixel + i, segments, count, w, tile, sum_x + i, sum_w, size_w, bias);
      if (!out) continue;
      for (int64_t q = 0; q < n; ++q)
        for (int64_t j = 0; j < lanes; j += kW)
          store_up_to(out + (i + q) * out_pitch + j, load(tile + q * NR + j), smaller(kW, lanes - j));
    }
    slab += terms * NR;
  }
}

inline void forward_task(const Conv2dArgs& args, const ForwardShape& f, int64_t task, char* shared, char* worker) {
  const Conv2dProblem& p = f.p;
  const PanelTask t = panel_task(f.bands, p.groups, f.panels, task);
  const Region &b = t.band, window = window_of(p, b);
  float* const copy = f.copy_tasks ? f.shared.x.in(shared) + t.unit * f.copy : f.worker.x.in(worker);
  if (!f.copy_tasks) copy_region(args.type, f.x, window, t.group * f.C, 0, f.C, copy);
  const View<float> x = view_of(f.x, window, t.group * f.C, copy);
  const int64_t pixels = list_pixels(f, x, window, b, worker);

  int64_t* const tap = f.worker.tap.in(worker);
  for (int64_t k = 0; k < f.taps; ++k) tap[k] = k / p.KW * p.dilation_h * x.row + k % p.KW * p.dilation_w * x.pixel;
  Segment* const segments = f.worker.segments.in(worker);
  const int64_t count = make_segments(tap, f.taps, f.C, kForwardDepth, segments);

  const int64_t* stride = args.out.stride;
  const bool one_row = b.images == 1 && b.rows == 1;
  const bool rows_touch =
      one_row || (stride[2] == b.columns * stride[3] && (b.images == 1 || stride[0] == b.rows * stride[2]));
  const bool direct_out = f.direct_out && rows_touch;
  float* const acc = f.worker.acc.in(worker);
  for (int64_t panel = t.begin; panel < t.end; ++panel) {
    const int64_t v0 = panel_begin(f.panels, panel), nv = panel_begin(f.panels, panel + 1) - v0;
    const int64_t lane = (t.group * f.panels.vectors + v0) * kW, co = t.group * f.M + v0 * kW;
    const int64_t lanes = smaller(nv * kW, f.M - v0 * kW);
    float* out = static_cast<float*>(args.out.data) + b.n0 * stride[0] + b.h0 * stride[2] + b.w0 * stride[3] + co;
    const auto run = nv == 1   ? forward_panel<1>
                     : nv == 2 ? forward_panel<2>
                     : nv == 3 ? forward_panel<(kForwardPanel > 3 ? 3 : 2)>
                               : forward_panel<kForwardPanel>;
    run(f.worker.pixel.in(worker), f.worker.sum_x.in(worker), pixels, segments, count,
        f.shared.w.in(shared) + lane * f.K, f.shared.sum_w.in(shared) + lane, f.shared.size_w.in(shared) + lane,
        f.shared.bias.in(shared) + lane, acc, lanes, direct_out ? out : nullptr, stride[3]);
    if (!direct_out) store_rows(args.type, acc, nv * kW, args.out, b, co, lanes);
  }
}

template <typename T>
inline void forward_pack(const Conv2dArgs& args, const ForwardShape& f, int64_t task, char* shared) {
  const int64_t group = task / f.panels.count, panel = task % f.panels.count;
  const int64_t v0 = panel_begin(f.panels, panel), v1 = panel_begin(f.panels, panel + 1);
  for (int64_t v = v0; v < v1; ++v) {
    const int64_t panel_lane = (group * f.panels.vectors + v0) * kW, offset = (v - v0) * kW, lane = panel_lane + offset;
    const int64_t co = group * f.M + v * kW, lanes = smaller(kW, f.M - v * kW);
    const LaneSums sums =
        pack_vector<T>(args, co, lanes, f.shared.w.in(shared) + panel_lane * f.K + offset, (v1 - v0) * kW);
    store(f.shared.sum_w.in(shared) + lane, sums.value);
    store(f.shared.size_w.in(shared) + lane, sums.size);
    const T* bias = static_cast<const T*>(args.bias);
    store(f.shared.bias.in(shared) + lane, bias ? load_n(bias + co, lanes) : vf{});
  }
}

inline void forward_prepare(const Conv2dArgs& args, const ForwardShape& f, int64_t task, char* shared, char*) {
  const int64_t panels = f.p.groups * f.panels.count;
  if (task < panels)
    return dispatch(args.type, [&](auto zero) { forward_pack<decltype(zero)>(args, f, task, shared); });
  const int64_t unit = (task - panels) / f.copy_tasks, begin = (task - panels) % f.copy_tasks * kCopyChannels;
  const Region window = window_of(f.p, band_at(f.bands, unit / f.p.groups));
  copy_region(args.type, f.x, window, unit % f.p.groups * f.C, begin, smaller(f.C, begin + kCopyChannels),
              f.shared.x.in(shared) + unit * f.copy);
}

inline Plan<Conv2dArgs> forward_plan(const Conv2dArgs& args) {
  const ForwardShape f = forward_shape(args);
  if (windows_are_sparse(f.p, f.bands, f.rows, f.columns)) return kDefinitionKernels.forward(args);
  const int64_t units = product(f.p.groups, f.bands.count);
  return make_plan<Conv2dArgs, ForwardShape, forward_prepare, forward_task>(
      f, sum(product(f.p.groups, f.panels.count), product(units, f.copy_tasks)), product(units, f.panels.parts));
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
