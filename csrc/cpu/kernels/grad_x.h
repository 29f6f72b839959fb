// Gradient of the input, float32 sums:   dX[n,ci,h,w] = sum over (kh,kw,co) of dY[n,co,oh,ow] * clamp(W - X, -1, 1)
// with oh*stride_h = h + pad_top - kh*dilation_h and ow likewise.  This is AdderNet's training gradient (arXiv
// 1912.13200, section 3.3), on purpose not the derivative, which is sgn(W - X).
//
// Gather form: every input pixel sums its own terms, so nothing is added atomically and the order is fixed.  Pixels
// whose (h + pad_top, w + pad_left) have the same remainders by the strides form a phase; within a phase all pixels
// use the same taps and step through dY by one.
//
//   dY   the rows that the band's pixels reach, in scratch, zero where no output is; or the tensor itself
//   x    one vector tile per pixel, constant over the sum: in registers (32) or folded from memory (16)
//   w    packed panels [phase][tap][co][NV*kW lanes of ci]
//   acc  one panel of one phase, [pixel][NV*kW]
//
//   stage 0: pack a panel of w, or load part of a band that several tasks share
//   stage 1: task = (band of input rows, group, part of the panels);  panel -> phase -> block of terms -> tile of MR
//   pixels x NV vectors of ci: a term is one broadcast of dY, NV loads of w, MR*NV (sub, clamp, fma).  32 registers: 6
//   x 2, 10 x 1;  16: 4 x 2, 8 x 1.
//
// clamp_unit() turns a NaN into +-1.  A NaN of x is put back at the end (it makes NaN of every sum it is part of);
// weights that are not all finite send the whole call through definition.h.

constexpr int kGradXPanel = 2;
constexpr int64_t kGradXDepth = 192;
static constexpr int grad_x_rows(int nv) { return kRegisters == 32 ? (nv == 2 ? 6 : 10) : (nv == 2 ? 4 : 8); }
constexpr int kGradXMaxRows = 10;

template <int MR, int NV>
static __attribute__((noinline)) void grad_x_tile(const float* const* grad_y, const float* const* x,
                                                  const Segment* segments, int64_t count, const float* w, float* acc,
                                                  bool first) {
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
          // every other subtraction goes through the multiplier: with the clamp on the adder, both are then equally
          // busy
          const vf d = (i + j) % 2 ? difference<true>(b[j], at[i][j]) : difference<false>(b[j], at[i][j]);
          c[i][j] = fused_of(a[i] + k, clamp_unit(d), c[i][j]);
        }
      }
    }
  }
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) store(acc + (i * NV + j) * kW, c[i][j]);
}

static int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

struct GradXShape {
  Conv2dProblem p;
  int64_t C, M, taps;
  Source grad_y, x;
  Bands bands;
  Panels panels;
  int64_t splits, loads;              // as in forward.h
  int64_t reach_rows, reach_columns;  // of dY, that a band's pixels reach at most
  int64_t pixels, segment_bound;
  bool direct_out;
};

static GradXShape grad_x_shape(const Conv2dArgs& args) {
  GradXShape f{};
  f.p = args.problem;
  const Conv2dProblem& p = f.p;
  f.C = p.C_in / p.groups, f.M = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  const int64_t span_h = (p.KH - 1) * p.dilation_h, span_w = (p.KW - 1) * p.dilation_w;
  const int64_t reach = (p.W - 1 + span_w) / p.stride_w + 2;
  const bool padded = p.pad_left < span_w || (p.W - 1 + p.pad_left) / p.stride_w >= p.OW || p.pad_top < span_h ||
                      (p.H - 1 + p.pad_top) / p.stride_h >= p.OH;
  f.grad_y = make_source(args.type, args.grad_y, p.OH, p.OW, f.M, padded, 1);
  f.x = make_source(args.type, args.x, p.H, p.W, f.C, false, kW);
  const int64_t row = sum(product(p.W, f.C), blocks(product(reach, f.M), p.stride_h));
  f.bands = make_bands(p.N, p.H, p.W, row, 48 * 1024, 192);
  f.panels = make_panels(f.C, kGradXPanel);
  f.splits = band_splits(f.panels.count, product(f.bands.count, p.groups));
  f.loads = f.splits > 1 && !f.grad_y.in_place ? blocks(f.M, kLoadChannels) : 0;
  // the copy of x holds whole vectors of the lanes of one task
  if (!f.x.in_place) f.x.pitch = copy_pitch(blocks(f.panels.count, f.splits) * kGradXPanel * kW);
  f.reach_rows = (f.bands.rows - 1 + span_h) / p.stride_h + 2;
  f.reach_columns = (f.bands.columns - 1 + span_w) / p.stride_w + 2;
  f.pixels = product(f.bands.images, f.bands.rows, f.bands.columns);
  f.segment_bound = segment_bound(f.taps, f.M, kGradXDepth);
  f.direct_out = args.type == ElementType::kFloat32 && args.out.stride[1] == 1;
  return f;
}

// floats of one band's copy of dY
static int64_t grad_x_copy(const GradXShape& f) {
  return copy_floats(f.grad_y, f.bands.images, f.reach_rows, f.reach_columns);
}

struct GradXShared {
  float* w;
  int32_t* nonfinite;  // one flag a panel
  float* grad_y;       // [band][group], when bands are divided
};
static GradXShared grad_x_shared(const GradXShape& f, Carver* carve) {
  const int64_t lanes = product(f.p.groups, f.panels.vectors, kW);
  return {carve->take<float>(product(lanes, f.M, f.taps)), carve->take<int32_t>(product(f.p.groups, f.panels.count)),
          carve->take<float>(f.loads ? product(f.bands.count, f.p.groups, grad_x_copy(f)) : 0)};
}

struct GradXScratch {
  float *grad_y, *x, *acc, *result;
  const float **grad_y_at, **x_at;  // of each pixel of the phase
  float** target;                   // where its gradient goes
  int64_t* index;                   // of the pixel within the band
  int64_t* tap;
  Segment* segments;
};
static GradXScratch grad_x_scratch(const GradXShape& f, Carver* carve) {
  const int64_t pixels = f.pixels + kGradXMaxRows;
  return {carve->take<float>(f.loads ? 0 : grad_x_copy(f)),
          carve->take<float>(copy_floats(f.x, f.bands.images, f.bands.rows, f.bands.columns)),
          carve->take<float>(product(pixels, kGradXPanel * kW)),
          carve->take<float>(f.direct_out ? 0 : product(pixels, kGradXPanel * kW) + kW),
          carve->take<const float*>(pixels),
          carve->take<const float*>(pixels),
          carve->take<float*>(pixels),
          carve->take<int64_t>(pixels),
          carve->take<int64_t>(product(2, f.taps)),
          carve->take<Segment>(f.segment_bound)};
}

// The taps that reach pixels of a phase, (kh, kw) descending: ascending in dY.
static int64_t phase_taps(const Conv2dProblem& p, int64_t phase_h, int64_t phase_w, int64_t* tap) {
  int64_t count = 0;
  for (int64_t kh = p.KH; kh-- > 0;)
    for (int64_t kw = p.KW; kw-- > 0;)
      if (kh * p.dilation_h % p.stride_h == phase_h && kw * p.dilation_w % p.stride_w == phase_w)
        tap[count++] = kh * p.KW + kw;
  return count;
}

template <typename T>
static void grad_x_pack(const Conv2dArgs& args, const GradXShape& f, int64_t task, const GradXShared& shared,
                        int64_t* tap) {
  const Conv2dProblem& p = f.p;
  const int64_t* stride = args.w.stride;
  const int64_t group = task / f.panels.count, panel = task % f.panels.count;
  const int64_t v0 = panel_begin(f.panels, panel), nv = panel_begin(f.panels, panel + 1) - v0, step = nv * kW;
  float* const panel_w = shared.w + (group * f.panels.vectors + v0) * kW * f.M * f.taps;
  vi bad{};
  // position[t]: where tap t stands in the order of the phases
  int64_t* position = tap + f.taps;
  int64_t placed = 0;
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
  shared.nonfinite[task] = any(bad);
}

// Does any output reach pixel (h, w)?
static bool reached(const Conv2dProblem& p, int64_t h, int64_t w) {
  for (int64_t kh = 0; kh < p.KH; ++kh)
    for (int64_t kw = 0; kw < p.KW; ++kw) {
      const int64_t a = h + p.pad_top - kh * p.dilation_h, b = w + p.pad_left - kw * p.dilation_w;
      if (a >= 0 && b >= 0 && a % p.stride_h == 0 && b % p.stride_w == 0 && a / p.stride_h < p.OH &&
          b / p.stride_w < p.OW)
        return true;
    }
  return false;
}

template <int NV>
static void grad_x_panel(const GradXShape& f, const GradXScratch& s, int64_t segment_count, int64_t pixels,
                         const float* w, const Band& b, int64_t lanes) {
  constexpr int MR = grad_x_rows(NV), NR = NV * kW;
  const Conv2dProblem& p = f.p;
  if (!segment_count) {
    for (int64_t i = 0; i < pixels; ++i) zero(s.target[i], lanes);
    return;
  }
  for (int64_t begin = 0, end; begin < segment_count; begin = end) {
    int64_t terms = 0;
    for (end = begin; end < segment_count && s.segments[end].block == s.segments[begin].block; ++end)
      terms += s.segments[end].length;
    for (int64_t i = 0; i < pixels; i += MR) {
      float* acc = s.acc + i * NR;
      grad_x_tile<MR, NV>(s.grad_y_at + i, s.x_at + i, s.segments + begin, end - begin, w, acc, begin == 0);
      if (end < segment_count) continue;
      for (int64_t q = 0; q < smaller(MR, pixels - i); ++q)
        for (int64_t j = 0; j < lanes; j += kW) {
          vf v = load(acc + q * NR + j);
          const vf x = load(s.x_at[i + q] + j);
          const vi nan = x != x;
          if (any(nan)) {
            const int64_t columns = b.w1 - b.w0, row = s.index[i + q] / columns % (b.h1 - b.h0);
            if (reached(p, b.h0 + row, b.w0 + s.index[i + q] % columns)) v = nan ? x : v;
          }
          store_up_to(s.target[i + q] + j, v, smaller(kW, lanes - j));
        }
    }
    w += terms * NR;
  }
}

template <typename T>
static void grad_x_by_definition(const Conv2dArgs& args, const GradXShape& f, const Band& b, int64_t c0, int64_t c1) {
  const int64_t* stride = args.out.stride;
  for (int64_t n = b.n0; n < b.n1; ++n)
    for (int64_t ci = c0; ci < c1; ++ci)
      for (int64_t h = b.h0; h < b.h1; ++h)
        for (int64_t w = b.w0; w < b.w1; ++w)
          from_float(definition::grad_x<T>(args, n, ci, h, w),
                     static_cast<T*>(args.out.data) + n * stride[0] + ci * stride[1] + h * stride[2] + w * stride[3]);
}

// The outputs that a band's pixels reach, some of them outside the image.
static Opening grad_x_opening(const GradXShape& f, int64_t group, const Band& b) {
  const Conv2dProblem& p = f.p;
  const int64_t oh0 = floor_div(b.h0 + p.pad_top - (p.KH - 1) * p.dilation_h, p.stride_h);
  const int64_t ow0 = floor_div(b.w0 + p.pad_left - (p.KW - 1) * p.dilation_w, p.stride_w);
  return {b.n0,
          b.n1,
          group * f.M,
          oh0,
          (b.h1 - 1 + p.pad_top) / p.stride_h + 1 - oh0,
          ow0,
          (b.w1 - 1 + p.pad_left) / p.stride_w + 1 - ow0};
}

static void grad_x_band(const Conv2dArgs& args, GradXShape f, int64_t task, const GradXShared& shared,
                        const GradXScratch& s) {
  const Conv2dProblem& p = f.p;
  const int64_t split = task % f.splits, group = task / f.splits % p.groups;
  const Band b = band_at(f.bands, task / f.splits / p.groups);
  const int64_t begin = f.panels.count * split / f.splits, end = f.panels.count * (split + 1) / f.splits;
  for (int64_t i = 0; i < f.panels.count; ++i)
    if (shared.nonfinite[group * f.panels.count + i]) {
      const int64_t c0 = group * f.C + panel_begin(f.panels, begin) * kW;
      const int64_t c1 = smaller((group + 1) * f.C, group * f.C + panel_begin(f.panels, end) * kW);
      if (args.type == ElementType::kFloat32) grad_x_by_definition<float>(args, f, b, c0, c1);
      if (args.type == ElementType::kBFloat16) grad_x_by_definition<BFloat16>(args, f, b, c0, c1);
      if (args.type == ElementType::kFloat16) grad_x_by_definition<Float16>(args, f, b, c0, c1);
      return;
    }
  const int64_t rows = b.h1 - b.h0, lane0 = panel_begin(f.panels, begin) * kW;
  const Opening opening = grad_x_opening(f, group, b);
  const int64_t columns = b.w1 - b.w0;
  const Opening x_opening = {b.n0, b.n1, group * f.C + lane0, b.h0, rows, b.w0, columns};
  float* const copy = f.loads ? shared.grad_y + task / f.splits * grad_x_copy(f) : s.grad_y;
  if (!f.loads) load_source(args.type, f.grad_y, opening, 0, f.M, copy);
  load_source(args.type, f.x, x_opening, 0, smaller(f.C, panel_begin(f.panels, end) * kW) - lane0, s.x);
  const float* grad_y = open_source(&f.grad_y, opening, copy);
  const float* x = open_source(&f.x, x_opening, s.x);
  float* const out = static_cast<float*>(args.out.data);
  const int64_t* stride = args.out.stride;

  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t v0 = panel_begin(f.panels, panel), nv = panel_begin(f.panels, panel + 1) - v0, NR = nv * kW;
    const int64_t lanes = smaller(NR, f.C - v0 * kW), ci = group * f.C + v0 * kW;
    const float* w = shared.w + (group * f.panels.vectors + v0) * kW * f.M * f.taps;
    for (int64_t rh = 0; rh < p.stride_h; ++rh)
      for (int64_t rw = 0; rw < p.stride_w; ++rw) {
        const int64_t taps = phase_taps(p, rh, rw, s.tap);
        // th, tw: how far back in dY a tap looks, from the pixel's quotient by the stride
        const int64_t th_most = taps ? (s.tap[0] / p.KW * p.dilation_h - rh) / p.stride_h : 0;
        const int64_t tw_most = taps ? (s.tap[0] % p.KW * p.dilation_w - rw) / p.stride_w : 0;
        for (int64_t i = 0; i < taps; ++i) {
          const int64_t th = (s.tap[i] / p.KW * p.dilation_h - rh) / p.stride_h;
          const int64_t tw = (s.tap[i] % p.KW * p.dilation_w - rw) / p.stride_w;
          s.tap[i] = (th_most - th) * f.grad_y.row + (tw_most - tw) * f.grad_y.pitch;
        }
        const int64_t count = make_segments(s.tap, taps, f.M, kGradXDepth, s.segments);
        // first row and column of the phase: (h + pad_top) % stride_h == rh
        const int64_t h_first = b.h0 + ((rh - b.h0 - p.pad_top) % p.stride_h + p.stride_h) % p.stride_h;
        const int64_t w_first = b.w0 + ((rw - b.w0 - p.pad_left) % p.stride_w + p.stride_w) % p.stride_w;
        int64_t pixels = 0;
        for (int64_t n = 0; n < b.n1 - b.n0; ++n)
          for (int64_t h = h_first; h < b.h1; h += p.stride_h) {
            const int64_t oh = (h + p.pad_top) / p.stride_h - th_most - opening.h0;
            for (int64_t iw = w_first; iw < b.w1; iw += p.stride_w, ++pixels) {
              const int64_t ow = (iw + p.pad_left) / p.stride_w - tw_most - opening.w0;
              s.grad_y_at[pixels] = grad_y + n * f.grad_y.image + oh * f.grad_y.row + ow * f.grad_y.pitch;
              s.x_at[pixels] = x + n * f.x.image + (h - b.h0) * f.x.row + (iw - b.w0) * f.x.pitch + v0 * kW - lane0;
              s.index[pixels] = (n * rows + h - b.h0) * columns + iw - b.w0;
              s.target[pixels] = f.direct_out ? out + (b.n0 + n) * stride[0] + h * stride[2] + iw * stride[3] + ci
                                              : s.result + s.index[pixels] * NR;
            }
          }
        if (pixels)
          for (int i = 0; i < kGradXMaxRows; ++i) {
            s.grad_y_at[pixels + i] = s.grad_y_at[pixels - 1];
            s.x_at[pixels + i] = s.x_at[pixels - 1];
          }
        const auto run = nv == 1 ? grad_x_panel<1> : grad_x_panel<2>;
        run(f, s, count, pixels, w, b, lanes);
        w += taps * f.M * NR;
      }
    if (f.direct_out) continue;
    for (int64_t n = b.n0; n < b.n1; ++n)
      store_rows(args.type, s.result + (n - b.n0) * rows * columns * NR, NR, args.out,
                 {n, ci, lanes, b.h0, rows, b.w0, columns});
  }
}

static void grad_x_run(const Conv2dArgs& args, int stage, int64_t task, char* shared_block, char* worker_block) {
  const GradXShape f = grad_x_shape(args);
  Carver carve{shared_block, 0}, carve_scratch{worker_block, 0};
  const GradXShared shared = grad_x_shared(f, &carve);
  const GradXScratch s = grad_x_scratch(f, &carve_scratch);
  if (stage == 1) return grad_x_band(args, f, task, shared, s);
  if (task >= f.p.groups * f.panels.count) {
    const int64_t load = task - f.p.groups * f.panels.count, unit = load / f.loads, part = load % f.loads;
    return load_source(args.type, f.grad_y, grad_x_opening(f, unit % f.p.groups, band_at(f.bands, unit / f.p.groups)),
                       part * kLoadChannels, smaller(f.M, (part + 1) * kLoadChannels),
                       shared.grad_y + unit * grad_x_copy(f));
  }
  if (args.type == ElementType::kFloat32) grad_x_pack<float>(args, f, task, shared, s.tap);
  if (args.type == ElementType::kBFloat16) grad_x_pack<BFloat16>(args, f, task, shared, s.tap);
  if (args.type == ElementType::kFloat16) grad_x_pack<Float16>(args, f, task, shared, s.tap);
}

static Plan<Conv2dArgs> grad_x_plan(const Conv2dArgs& args) {
  const GradXShape f = grad_x_shape(args);
  if (outputs_are_sparse(f.p, f.bands, f.reach_rows, f.reach_columns, product(f.p.stride_h, f.p.stride_w)))
    return kDefinitionKernels.grad_x(args);
  Carver shared{nullptr, 0}, scratch{nullptr, 0};
  grad_x_shared(f, &shared);
  grad_x_scratch(f, &scratch);
  const int64_t units = product(f.p.groups, f.bands.count);
  return {shared.used,
          scratch.used,
          2,
          {sum(product(f.p.groups, f.panels.count), product(units, f.loads)), product(units, f.splits), 0},
          grad_x_run};
}
