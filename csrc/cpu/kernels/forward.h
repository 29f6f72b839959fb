// Forward, float32 sums:   Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]|      k = (kh, kw, ci),  p = (oh, ow)
//
// Computed as  Y = 2*sum_k min(X, W) - (sum_k X + sum_k W):  two instructions a term (min, add) where the direct form
// has three (sub, and, add).  The sums over X and W are one pass over the input and the weights.  Where the form
// cancels (|sum X + sum W| or sum |W| > kCancellation * |Y|: large common offsets), overflows or meets an infinity or
// NaN, the tile is computed again by the direct form and the lanes in question replaced.
//
//   x    one band of rows in scratch, [row][column][ci], zero padded; or the tensor itself (channels_last, no padding)
//   w    packed panels [block of k][k][NV*kW lanes of co]
//   acc  one panel of the band's output, [pixel][NV*kW]
//
//   stage 0: pack a panel of w, or load part of a band that several tasks share
//   stage 1: task = (band of output rows, group, part of the panels)
//   panel -> block of k (its slab of weights stays in L1) -> tile of MR pixels:
//
//            lanes of co ->                 a tile holds MR x NV accumulators; each term is one broadcast of x,
//   pixel 0  [ NV vectors ]                 NV loads of w shared by the MR pixels, MR*NV (min, add).
//   ...      [ ...        ]                 32 registers: 6 x 4, 8 x 3, 12 x 2, 12 x 1;  16 registers: 6 x 2, 8 x 1.
//   pixel MR [ NV vectors ]
//
// A band's last tile repeats its last pixel; lanes beyond C_out are zero weights and never stored.

constexpr float kCancellation = 32.f;
constexpr int64_t kForwardDepth = kRegisters == 32 ? 192 : 256;  // terms of a slab

static constexpr int forward_rows(int nv) {
  return kRegisters == 32 ? (nv == 4 ? 6 : nv == 3 ? 8 : 10) : (nv == 2 ? 6 : 8);
}
constexpr int kForwardMaxRows = 10;
constexpr int kForwardPanel = kRegisters == 32 ? 4 : 2;

template <int MR, int NV, bool Direct>
static __attribute__((noinline)) void forward_tile(const float* const* x, const Segment* segments, int64_t count,
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
  Source source;
  Bands bands;
  Panels panels;
  int64_t splits;         // tasks of a band
  int64_t loads;          // tasks that load a band's shared copy; 0: every task loads its own
  int64_t rows, columns;  // of an image that a band reads
  int64_t pixels, segment_bound;
  bool direct_out;  // y is written by the finish, not through scratch
};

static ForwardShape forward_shape(const Conv2dArgs& args) {
  ForwardShape f{};
  f.p = args.problem;
  Conv2dProblem& p = f.p;
  const Operand x = dense_view(args.x, &p);
  f.C = p.C_in / p.groups, f.M = p.C_out / p.groups, f.taps = product(p.KH, p.KW), f.K = product(f.C, f.taps);
  f.source = window_source(args.type, x, p, f.C, 1);
  f.bands = make_bands(p.N, p.OH, p.OW, product(p.stride_h, window_columns(p, p.OW), f.C), 32 * 1024, 192);
  f.panels = make_panels(f.M, kForwardPanel);
  f.splits = band_splits(f.panels.count, product(f.bands.count, p.groups));
  f.loads = f.splits > 1 && !f.source.in_place ? blocks(f.C, kLoadChannels) : 0;
  f.rows = window_rows(p, f.bands.rows), f.columns = window_columns(p, f.bands.columns);
  f.pixels = product(f.bands.images, f.bands.rows, f.bands.columns);
  f.segment_bound = segment_bound(f.taps, f.C, kForwardDepth);
  f.direct_out = args.type == ElementType::kFloat32 && args.out.stride[1] == 1;
  return f;
}

// floats of one band's copy of x
static int64_t forward_copy(const ForwardShape& f) { return copy_floats(f.source, f.bands.images, f.rows, f.columns); }

struct ForwardShared {
  float *w, *sum_w, *size_w, *bias;
  float* x;  // [band][group], when bands are divided
};
static ForwardShared forward_shared(const ForwardShape& f, Carver* carve) {
  const int64_t lanes = product(f.p.groups, f.panels.vectors, kW);
  return {carve->take<float>(product(lanes, f.K)), carve->take<float>(lanes), carve->take<float>(lanes),
          carve->take<float>(lanes),
          carve->take<float>(f.loads ? product(f.bands.count, f.p.groups, forward_copy(f)) : 0)};
}

struct ForwardScratch {
  float *x, *channel_sums, *row_sums, *sum_x, *acc;
  const float** pixel;
  int64_t* tap;
  Segment* segments;
};
static ForwardScratch forward_scratch(const ForwardShape& f, Carver* carve) {
  const int64_t positions = product(f.rows, f.columns);
  return {carve->take<float>(f.loads ? 0 : forward_copy(f)),
          carve->take<float>(positions + kW),
          carve->take<float>(f.columns + kW),
          carve->take<float>(f.pixels + kForwardMaxRows),
          carve->take<float>(product(f.pixels + kForwardMaxRows, kForwardPanel * kW) + kW),
          carve->take<const float*>(f.pixels + kForwardMaxRows),
          carve->take<int64_t>(f.taps),
          carve->take<Segment>(f.segment_bound)};
}

// sums[i] = sum of the channels of pixel i
static void channel_sums(const float* x, int64_t pitch, int64_t channels, int64_t pixels, float* sums) {
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

// Lists the band's pixels and the sum of x over each one's window.
static int64_t list_pixels(const Conv2dProblem& p, int64_t channels, const Source& x, const Opening& o,
                           const float* base, const Band& b, const ForwardScratch& s) {
  int64_t count = 0;
  for (int64_t n = 0; n < b.n1 - b.n0; ++n) {
    const float* image = base + n * x.image;
    for (int64_t r = 0; r < o.rows; ++r)
      channel_sums(image + r * x.row, x.pitch, channels, o.columns, s.channel_sums + r * o.columns);
    for (int64_t h = 0; h < b.h1 - b.h0; ++h) {
      const float* sums = s.channel_sums + h * p.stride_h * o.columns;
      for (int64_t j = 0; j < o.columns; j += kW) {
        vf total{};
        for (int64_t kh = 0; kh < p.KH; ++kh) total += load(sums + kh * p.dilation_h * o.columns + j);
        store(s.row_sums + j, total);
      }
      for (int64_t ow = 0; ow < b.w1 - b.w0; ++ow, ++count) {
        float total = 0;
        for (int64_t kw = 0; kw < p.KW; ++kw) total += s.row_sums[ow * p.stride_w + kw * p.dilation_w];
        s.sum_x[count] = total;
        s.pixel[count] = image + h * p.stride_h * x.row + ow * p.stride_w * x.pitch;
      }
    }
  }
  for (int i = 0; i < kForwardMaxRows; ++i) s.pixel[count + i] = s.pixel[count - 1], s.sum_x[count + i] = 0;
  return count;
}

// Is y = 2*sum min - both finite, and not what a cancellation left?  A comparison with NaN is false.  Offsets of either
// sign cancel within `both` already; not within sum |W|, nor within sum |X|, which is at most |y| + sum |W|.
static ALWAYS_INLINE vi trustworthy(vf both, vf size_w, vf y) {
  const vf most = kCancellation * absolute(y);
  return (absolute(both) <= most) & (size_w <= most) & (absolute(y) <= __FLT_MAX__);
}

// acc -> y, in place; true when a lane needs the direct form.
template <int NV>
static ALWAYS_INLINE bool finish_pixel(float* acc, float sum_x, const float* sum_w, const float* size_w,
                                       const float* bias) {
  vi doubtful{};
  UNROLL_FOR (j, NV) {
    const vf m = load(acc + j * kW), both = splat(sum_x) + load(sum_w + j * kW), y = m + m - both;
    doubtful |= ~trustworthy(both, load(size_w + j * kW), y);
    store(acc + j * kW, y + load(bias + j * kW));
  }
  return any(doubtful);
}

template <int NV>
static __attribute__((noinline)) void repair_tile(const float* const* x, const Segment* segments, int64_t count,
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

template <int NV>
static void forward_panel(const ForwardShape& f, const ForwardScratch& s, const Segment* segments, int64_t count,
                          int64_t pixels, const float* w, const float* sum_w, const float* size_w, const float* bias,
                          int64_t lanes, float* out, int64_t out_pitch) {
  constexpr int MR = forward_rows(NV), NR = NV * kW;
  const float* slab = w;
  for (int64_t begin = 0, end; begin < count; begin = end) {
    int64_t terms = 0;
    for (end = begin; end < count && segments[end].block == segments[begin].block; ++end) terms += segments[end].length;
    for (int64_t i = 0; i < pixels; i += MR) {
      float* acc = s.acc + i * NR;
      forward_tile<MR, NV, false>(s.pixel + i, segments + begin, end - begin, slab, acc, begin == 0);
      if (end < count) continue;
      const int64_t n = smaller(MR, pixels - i);
      bool doubtful = false;
      for (int64_t q = 0; q < n; ++q) doubtful |= finish_pixel<NV>(acc + q * NR, s.sum_x[i + q], sum_w, size_w, bias);
      if (doubtful) repair_tile<NV>(s.pixel + i, segments, count, w, acc, s.sum_x + i, sum_w, size_w, bias);
      if (!out) continue;
      for (int64_t q = 0; q < n; ++q)
        for (int64_t j = 0; j < lanes; j += kW)
          store_up_to(out + (i + q) * out_pitch + j, load(acc + q * NR + j), smaller(kW, lanes - j));
    }
    slab += terms * NR;
  }
}

static void forward_band(const Conv2dArgs& args, const ForwardShape& f, int64_t task, const ForwardShared& shared,
                         const ForwardScratch& s) {
  const Conv2dProblem& p = f.p;
  const int64_t split = task % f.splits, group = task / f.splits % p.groups;
  const Band b = band_at(f.bands, task / f.splits / p.groups);
  Source source = f.source;
  const Opening opening = window_opening(p, b, group * f.C);
  float* const copy = f.loads ? shared.x + task / f.splits * forward_copy(f) : s.x;
  if (!f.loads) load_source(args.type, source, opening, 0, f.C, copy);
  const float* base = open_source(&source, opening, copy);
  const int64_t pixels = list_pixels(p, f.C, source, opening, base, b, s);

  for (int64_t t = 0; t < f.taps; ++t)
    s.tap[t] = t / p.KW * p.dilation_h * source.row + t % p.KW * p.dilation_w * source.pitch;
  const int64_t count = make_segments(s.tap, f.taps, f.C, kForwardDepth, s.segments);

  const int64_t begin = f.panels.count * split / f.splits, end = f.panels.count * (split + 1) / f.splits;
  const int64_t rows = b.h1 - b.h0, columns = b.w1 - b.w0;
  const bool one_row = b.n1 - b.n0 == 1 && rows == 1;
  const bool rows_touch = one_row || (args.out.stride[2] == columns * args.out.stride[3] &&
                                      (b.n1 - b.n0 == 1 || args.out.stride[0] == rows * args.out.stride[2]));
  const bool direct_out = f.direct_out && rows_touch;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t v0 = panel_begin(f.panels, panel), nv = panel_begin(f.panels, panel + 1) - v0;
    const int64_t lane = (group * f.panels.vectors + v0) * kW, co = group * f.M + v0 * kW;
    const int64_t lanes = smaller(nv * kW, f.M - v0 * kW);
    float* out = static_cast<float*>(args.out.data) + b.n0 * args.out.stride[0] + b.h0 * args.out.stride[2] +
                 b.w0 * args.out.stride[3] + co;
    const auto run = nv == 1   ? forward_panel<1>
                     : nv == 2 ? forward_panel<2>
                     : nv == 3 ? forward_panel<(kForwardPanel > 3 ? 3 : 2)>
                               : forward_panel<kForwardPanel>;
    run(f, s, s.segments, count, pixels, shared.w + lane * f.K, shared.sum_w + lane, shared.size_w + lane,
        shared.bias + lane, lanes, direct_out ? out : nullptr, args.out.stride[3]);
    if (direct_out) continue;
    for (int64_t n = b.n0; n < b.n1; ++n)
      store_rows(args.type, s.acc + (n - b.n0) * rows * columns * nv * kW, nv * kW, args.out,
                 {n, co, lanes, b.h0, rows, b.w0, columns});
  }
}

template <typename T>
static void forward_pack(const Conv2dArgs& args, const ForwardShape& f, int64_t task, const ForwardShared& shared) {
  const int64_t group = task / f.panels.count, panel = task % f.panels.count;
  const int64_t v0 = panel_begin(f.panels, panel), v1 = panel_begin(f.panels, panel + 1);
  const int64_t lane = (group * f.panels.vectors + v0) * kW;
  for (int64_t v = v0; v < v1; ++v) {
    const int64_t offset = (v - v0) * kW, co = group * f.M + v * kW, lanes = smaller(kW, f.M - v * kW);
    const LaneSums sums = pack_vector<T>(args, co, lanes, shared.w + lane * f.K + offset, (v1 - v0) * kW);
    store(shared.sum_w + lane + offset, sums.value);
    store(shared.size_w + lane + offset, sums.size);
    const T* bias = static_cast<const T*>(args.bias);
    store(shared.bias + lane + offset, bias ? load_n(bias + co, lanes) : vf{});
  }
}

static void forward_run(const Conv2dArgs& args, int stage, int64_t task, char* shared_block, char* worker_block) {
  const ForwardShape f = forward_shape(args);
  Carver carve{shared_block, 0}, carve_scratch{worker_block, 0};
  const ForwardShared shared = forward_shared(f, &carve);
  if (stage == 1) return forward_band(args, f, task, shared, forward_scratch(f, &carve_scratch));
  if (task >= f.p.groups * f.panels.count) {
    const int64_t load = task - f.p.groups * f.panels.count, unit = load / f.loads, part = load % f.loads;
    return load_source(
        args.type, f.source, window_opening(f.p, band_at(f.bands, unit / f.p.groups), unit % f.p.groups * f.C),
        part * kLoadChannels, smaller(f.C, (part + 1) * kLoadChannels), shared.x + unit * forward_copy(f));
  }
  if (args.type == ElementType::kFloat32) forward_pack<float>(args, f, task, shared);
  if (args.type == ElementType::kBFloat16) forward_pack<BFloat16>(args, f, task, shared);
  if (args.type == ElementType::kFloat16) forward_pack<Float16>(args, f, task, shared);
}

static Plan<Conv2dArgs> forward_plan(const Conv2dArgs& args) {
  const ForwardShape f = forward_shape(args);
  if (windows_are_sparse(f.p, f.bands, f.rows, f.columns)) return kDefinitionKernels.forward(args);
  Carver shared{nullptr, 0}, scratch{nullptr, 0};
  forward_shared(f, &shared);
  forward_scratch(f, &scratch);
  const int64_t units = product(f.p.groups, f.bands.count);
  return {shared.used,
          scratch.used,
          2,
          {sum(product(f.p.groups, f.panels.count), product(units, f.loads)), product(units, f.splits), 0},
          forward_run};
}
