// Int8 forward, exact int32 sums:   Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]|      k = (kh, kw, ci),  p = (oh, ow)
// followed by the epilogue of args/int8.h.
//
// x86-64 has one instruction for it: psadbw sums 8 |a - b| to every 64 bits, so a term costs 1/64 (AVX-512), 1/32
// (AVX2) or 1/16 (SSE2) of it and as much of an addition; AArch64 takes three instructions for 16 terms.
//
//   x    the window of one band, copied to [image][row][column][ci] and padded; or the tensor itself without padding
//   w    packed panels [run of kRun terms][filter][kRun bytes]; whole runs first
//
//   stage 0: task = pack one panel of w, with its scale and offset
//   stage 1: task = (band of output pixels, group, part of the panels)
//            panel -> tile of MR pixels x NV vectors of kFilters filters, all K terms, then the epilogue in registers:
//
//              one run of w   [ vector 0 | ... | vector NV-1 ]    NV loads, shared by the MR pixels
//                               filters, kRun bytes each ->
//   x[pixel 0]     broadcast  [ accumulators                ]    1 broadcast of kRun bytes per pixel and run
//   ...                       [                             ]    NV (psadbw, paddd) per pixel and run
//   x[pixel MR-1]  broadcast  [                             ]
//
//   32 registers: MR x NV = 6 x 4, 11 x 2;  16 registers: 6 x 2.
//
// Tails: runs follow the bytes of a segment, a kernel row where it lies in one piece, else a tap; the last run of each
// is filled up with zeros on both sides.  A band's last tile repeats its last pixel; lanes beyond C_out have zero
// weights and are never stored.
#pragma once
#include "int8_epilogue.h"
#include "int8_input.h"
#include "panels.h"
#include "plan.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kInt8MostRows = 11;
constexpr int kInt8Panel = kRegisters == 32 ? 4 / kParts : 2 / kParts;  // vectors of kW filters

constexpr int int8_rows(int nv) { return kRegisters == 32 ? (nv == 4 ? 6 : nv == 3 ? 8 : 11) : 6; }

// The first n bytes of a run; the others become 0.
ALWAYS_INLINE void copy_run(const uint8_t* from, int64_t n, uint8_t* to) {
  __builtin_memset(to, 0, kRun);
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// The runs of a filter: `whole` ones, then `parts` that hold the last `left` bytes of a segment.  `offset`: where each
// begins, in bytes from the start of a pixel's window.
struct Int8Runs {
  const int64_t* offset;
  int64_t whole, parts, left;
};

template <int MR, int NV>
__attribute__((noinline)) void int8_tile(const uint8_t* const* x, const Int8Runs& runs, const uint8_t* w, vi* sums) {
  vi c[MR][NV];
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) c[i][j] = vi{};
  const uint8_t* a[MR];
  UNROLL_FOR (i, MR) a[i] = x[i];
  const int64_t* offset = runs.offset;
  for (const int64_t* end = offset + runs.whole; offset < end; ++offset, w += NV * kVectorBytes) {
    vb b[NV];
    UNROLL_FOR (j, NV) b[j] = load_lanes<vb>(w + j * kVectorBytes, kW);
    UNROLL_FOR (i, MR) {
      const vb run = splat_run(a[i] + *offset);
      UNROLL_FOR (j, NV) c[i][j] = add_distances(c[i][j], run, b[j]);
    }
  }
  for (const int64_t* end = offset + runs.parts; offset < end; ++offset, w += NV * kVectorBytes) {
    UNROLL_FOR (i, MR) {
      uint8_t part[kRun];
      copy_run(a[i] + *offset, runs.left, part);
      const vb run = splat_run(part);
      UNROLL_FOR (j, NV) c[i][j] = add_distances(c[i][j], run, load_lanes<vb>(w + j * kVectorBytes, kW));
    }
  }
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV / kParts) sums[i * (NV / kParts) + j] = join_parts(c[i] + j * kParts);
}

struct Int8Shape {
  Conv2dProblem p;  // of the strided view when the kernel is 1x1
  int64_t C, M, taps;
  Int8Input x;
  int64_t segments, length, runs;  // of a filter: segments, bytes per segment, runs of all segments
  Bands bands;
  Panels panels;
  int64_t rows, columns;  // of the window that a band reads
  struct Shared : Layout {
    Part<uint8_t> w;
    Part<float> scale, offset;
  } shared;
  struct Worker : Layout {
    Part<uint8_t> x;
    Part<const uint8_t*> pixel;
    Part<int64_t> offset;
  } worker;
};

inline Int8Shape int8_shape(const Int8Args& args) {
  Int8Shape f{};
  f.p = args.problem;
  Conv2dProblem& p = f.p;
  const Operand x = dense_view({nullptr, {p.H * p.W * p.C_in, 1, p.W * p.C_in, p.C_in}}, &p);
  f.C = p.C_in / p.groups, f.M = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  f.x = {{args.x, x.stride[3], x.stride[2], x.stride[0]}, p.H, p.W, x.stride[3], !reads_padding(p)};
  // in a copy, the pixels of a tile lie on different cache sets
  if (!f.x.in_place) f.x.pitch = f.C % 2048 ? f.C : f.C + 64;
  const bool joined = p.dilation_w == 1 && f.x.pitch == f.C;
  f.segments = joined ? p.KH : f.taps, f.length = f.taps / f.segments * f.C;
  f.runs = f.segments * ceil_div(f.length, kRun);
  f.bands = make_bands(p.N, p.OH, p.OW, product(p.stride_h, window_columns(p, p.OW), f.C), kInt8Budget, 192);
  f.panels = make_panels(f.M, kInt8Panel, product(f.bands.count, p.groups));
  f.rows = window_rows(p, f.bands.rows), f.columns = window_columns(p, f.bands.columns);

  const int64_t lanes = product(p.groups, f.panels.vectors, kW);
  f.shared.add(&f.shared.w, product(lanes, f.runs, kRun));
  f.shared.add(&f.shared.scale, lanes);
  f.shared.add(&f.shared.offset, lanes);
  f.worker.add(&f.worker.x, f.x.in_place ? 0 : product(f.bands.images, f.rows, f.columns, f.x.pitch));
  f.worker.add(&f.worker.pixel, f.bands.pixels() + kInt8MostRows);
  f.worker.add(&f.worker.offset, f.runs);
  return f;
}

inline void int8_pack(const Int8Args& args, const Int8Shape& f, int64_t task, char* shared, char*) {
  const int64_t group = task / f.panels.count, panel = task % f.panels.count;
  const int64_t v0 = panel_begin(f.panels, panel), v1 = panel_begin(f.panels, panel + 1);
  const int64_t lane = (group * f.panels.vectors + v0) * kW, lanes = (v1 - v0) * kW;
  const int64_t co = group * f.M + v0 * kW, filters = smaller(lanes, f.M - v0 * kW), K = f.taps * f.C;
  uint8_t* const to = f.shared.w.in(shared) + lane * f.runs * kRun;
  const int64_t whole = f.length / kRun, left = f.length - whole * kRun;  // of a segment
  for (int64_t i = 0; i < lanes; ++i) {
    uint8_t* run = to + i * kRun;
    if (i >= filters) {
      for (int64_t k = 0; k < f.runs; ++k, run += lanes * kRun) __builtin_memset(run, 0, kRun);
      continue;
    }
    const uint8_t* const filter = args.w + (co + i) * K;
    for (int64_t s = 0; s < f.segments; ++s)
      for (int64_t k = 0; k < whole; ++k, run += lanes * kRun)
        __builtin_memcpy(run, filter + s * f.length + k * kRun, kRun);
    for (int64_t s = 0; left && s < f.segments; ++s, run += lanes * kRun)
      copy_run(filter + s * f.length + whole * kRun, left, run);
  }
  if (args.output == Int8Output::kSums) return;
  for (int64_t i = 0; i < lanes; ++i) {
    f.shared.scale.in(shared)[lane + i] = i < filters ? args.scale[co + i] : 0;
    f.shared.offset.in(shared)[lane + i] = i < filters ? args.offset[co + i] : 0;
  }
}

// One panel for all pixels of a band; `at`: the element of y for the first filter of the first pixel.
template <int NV>
inline void int8_panel(const Int8Args& args, const uint8_t* const* pixel, int64_t pixels, const Int8Runs& runs,
                       const uint8_t* w, const float* scale, const float* offset, int64_t lanes, int64_t at) {
  constexpr int MR = int8_rows(NV), vectors = NV / kParts;
  const Int8Epilogue epilogue = int8_epilogue_of(args);
  vi sums[MR * vectors];
  for (int64_t i = 0; i < pixels; i += MR) {
    int8_tile<MR, NV>(pixel + i, runs, w, sums);
    epilogue(args, sums, smaller(MR, pixels - i), vectors, scale, offset, at + i * args.problem.C_out, lanes);
  }
}

inline void int8_task(const Int8Args& args, const Int8Shape& f, int64_t task, char* shared, char* worker) {
  const Conv2dProblem& p = f.p;
  const PanelTask t = panel_task(f.bands, p.groups, f.panels, task);
  const Region& b = t.band;
  const View<uint8_t> x = int8_view(args, f.x, window_of(p, b), t.group * f.C, f.C, f.worker.x.in(worker));

  const uint8_t** const pixel = f.worker.pixel.in(worker);
  int64_t pixels = 0;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t h = 0; h < b.rows; ++h)
      for (int64_t ow = 0; ow < b.columns; ++ow) pixel[pixels++] = x.at(n, h * p.stride_h, ow * p.stride_w);
  for (int i = 0; i < kInt8MostRows; ++i) pixel[pixels + i] = pixel[pixels - 1];
  const int64_t whole = f.length / kRun;  // of a segment
  int64_t* const offset = f.worker.offset.in(worker);
  const Int8Runs runs{offset, f.segments * whole, f.runs - f.segments * whole, f.length - whole * kRun};
  for (int64_t i = 0; i < f.segments; ++i) {
    const int64_t tap = i * (f.taps / f.segments);
    const int64_t first = tap / p.KW * p.dilation_h * x.row + tap % p.KW * p.dilation_w * x.pixel;
    for (int64_t k = 0; k < whole; ++k) offset[i * whole + k] = first + k * kRun;
    if (runs.left) offset[runs.whole + i] = first + whole * kRun;
  }

  for (int64_t panel = t.begin; panel < t.end; ++panel) {
    const int64_t v0 = panel_begin(f.panels, panel), nv = panel_begin(f.panels, panel + 1) - v0;
    const int64_t lane = (t.group * f.panels.vectors + v0) * kW, co = t.group * f.M + v0 * kW;
    const int64_t at = ((b.n0 * p.OH + b.h0) * p.OW + b.w0) * p.C_out + co;
    const auto run = nv == 1   ? int8_panel<kParts>
                     : nv == 2 ? int8_panel<(kInt8Panel > 1 ? 2 : 1) * kParts>
                     : nv == 3 ? int8_panel<(kInt8Panel > 2 ? 3 : 1) * kParts>
                               : int8_panel<kInt8Panel * kParts>;
    run(args, pixel, pixels, runs, f.shared.w.in(shared) + lane * f.runs * kRun, f.shared.scale.in(shared) + lane,
        f.shared.offset.in(shared) + lane, f.M - v0 * kW, at);
  }
}

inline Plan<Int8Args> int8_dense_plan(const Int8Args& args) {
  const Int8Shape f = int8_shape(args);
  if (windows_are_sparse(f.p, f.bands, f.rows, f.columns)) return kDefinitionKernels.int8(args);
  return make_plan<Int8Args, Int8Shape, int8_pack, int8_task>(f, product(f.p.groups, f.panels.count),
                                                              product(f.p.groups, f.bands.count, f.panels.parts));
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
