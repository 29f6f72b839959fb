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

constexpr int kDepthwiseVectors = 4;
constexpr int kDepthwiseLanes = kDepthwiseVectors * kW;
constexpr int64_t kDepthwiseBand = 16 * 1024;  // floats of source a band

static bool is_depthwise(const Conv2dProblem& p) { return p.groups > 1 && p.C_in == p.groups; }

struct DepthwiseShape {
  Conv2dProblem p;
  int64_t multiplier, taps;
  bool sparse;  // tiling.h
  Source x, y;  // y: grad_y
  Bands bands;
  int64_t blocks, chunks;
  int64_t x_pixels, y_pixels, pixels;  // of a band: of the sources, of the output
};

static DepthwiseShape depthwise_shape(const Conv2dArgs& args, bool by_input_rows) {
  DepthwiseShape f{};
  f.p = args.problem;
  const Conv2dProblem& p = f.p;
  f.multiplier = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  f.blocks = blocks(p.C_in, kDepthwiseLanes);
  // whole vectors are read: in place only where the channels end with one
  f.x = by_input_rows ? make_source(args.type, args.x, p.H, p.W, p.C_in, false, kW)
                      : window_source(args.type, args.x, p, p.C_in, kW);
  f.y = make_source(args.type, args.grad_y, p.OH, p.OW, p.C_out, f.multiplier > 1, kW);
  if (!args.grad_y.data) f.y.in_place = true;  // forward: nothing to copy
  if (!f.x.in_place) f.x.pitch = kDepthwiseLanes;
  if (!f.y.in_place) f.y.pitch = kDepthwiseLanes * f.multiplier;
  const int64_t rows = by_input_rows ? p.H : p.OH, columns = by_input_rows ? p.W : p.OW;
  const int64_t per_row = product(by_input_rows ? p.W : product(p.stride_h, window_columns(p, p.OW)), kDepthwiseLanes);
  f.bands = make_bands(p.N, rows, columns, per_row, kDepthwiseBand, 16);
  const int64_t span_h = (p.KH - 1) * p.dilation_h, span_w = (p.KW - 1) * p.dilation_w;
  const int64_t reach_rows = (f.bands.rows - 1 + span_h) / p.stride_h + 2;
  const int64_t reach_columns = (f.bands.columns - 1 + span_w) / p.stride_w + 2;
  const int64_t read_rows = window_rows(p, f.bands.rows), read_columns = window_columns(p, f.bands.columns);
  f.sparse = by_input_rows ? outputs_are_sparse(p, f.bands, reach_rows, reach_columns, 0)
                           : windows_are_sparse(p, f.bands, read_rows, read_columns);
  f.pixels = product(f.bands.images, f.bands.rows, f.bands.columns);
  f.x_pixels = by_input_rows ? f.pixels : product(f.bands.images, read_rows, read_columns);
  f.y_pixels = by_input_rows ? product(f.bands.images, reach_rows, reach_columns) : f.pixels;
  f.chunks = smaller(kMostChunks, f.bands.count);
  return f;
}

struct DepthwiseScratch {
  float *x, *y, *w, *result;
};
static DepthwiseScratch depthwise_scratch(const DepthwiseShape& f, Carver* carve) {
  const int64_t lanes = product(kDepthwiseLanes, f.multiplier);
  return {
      carve->take<float>(copy_floats(f.x, 1, 1, f.x_pixels)), carve->take<float>(copy_floats(f.y, 1, 1, f.y_pixels)),
      carve->take<float>(sum(product(lanes, f.taps), lanes)), carve->take<float>(sum(product(f.pixels, lanes), kW))};
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

static void load_filters(const Conv2dArgs& args, const DepthwiseShape& f, int64_t c0, int64_t lanes, float* w) {
  if (args.type == ElementType::kFloat32) load_filters_of<float>(args, f, c0, lanes, w);
  if (args.type == ElementType::kBFloat16) load_filters_of<BFloat16>(args, f, c0, lanes, w);
  if (args.type == ElementType::kFloat16) load_filters_of<Float16>(args, f, c0, lanes, w);
}

// lane*m + j  <->  one vector of lanes
static ALWAYS_INLINE vf load_filter(const float* p, int64_t m) { return load_strided(p, m, kW); }
static ALWAYS_INLINE void store_filter(float* p, int64_t m, vf v) {
  if (m == 1) return store(p, v);
  for (int i = 0; i < kW; ++i) p[i * m] = v[i];
}

static const float* depthwise_open(const Conv2dArgs& args, Source* s, const Opening& o, int64_t channels, float* copy) {
  load_source(args.type, *s, o, 0, channels, copy);
  return open_source(s, o, copy);
}

// The part of a band that a task works on.
struct DepthwiseTask {
  Band band;
  int64_t c0, lanes;
};
static DepthwiseTask depthwise_task(const DepthwiseShape& f, int64_t task) {
  const int64_t c0 = task % f.blocks * kDepthwiseLanes;
  return {band_at(f.bands, task / f.blocks), c0, smaller(kDepthwiseLanes, f.p.C_in - c0)};
}

template <int NV>
static void depthwise_forward_rows(const DepthwiseShape& f, const Source& x, const float* base, const Band& b,
                                   const float* w, float* y) {
  const Conv2dProblem& p = f.p;
  const int64_t m = f.multiplier;
  const float* const bias = w + m * f.taps * kDepthwiseLanes;
  for (int64_t n = 0; n < b.n1 - b.n0; ++n)
    for (int64_t h = 0; h < b.h1 - b.h0; ++h)
      for (int64_t ow = 0; ow < b.w1 - b.w0; ++ow, y += kDepthwiseLanes * m) {
        const float* at = base + n * x.image + h * p.stride_h * x.row + ow * p.stride_w * x.pitch;
        for (int64_t j = 0; j < m; ++j) {
          vf c[NV];
          UNROLL_FOR (v, NV) c[v] = vf{};
          const float* tap = w + j * f.taps * kDepthwiseLanes;
          for (int64_t kh = 0; kh < p.KH; ++kh)
            for (int64_t kw = 0; kw < p.KW; ++kw, tap += kDepthwiseLanes) {
              const float* in = at + kh * p.dilation_h * x.row + kw * p.dilation_w * x.pitch;
              UNROLL_FOR (v, NV) c[v] = accumulate(c[v], absolute(load(in + v * kW) - load(tap + v * kW)));
            }
          UNROLL_FOR (v, NV) store_filter(y + v * kW * m + j, m, load(bias + j * kDepthwiseLanes + v * kW) - c[v]);
        }
      }
}

template <int NV>
static void depthwise_grad_x_rows(const DepthwiseShape& f, const Source& x, const float* x0, const Source& y,
                                  const float* y0, const Opening& o, const Band& b, const float* w, float* out) {
  const Conv2dProblem& p = f.p;
  const int64_t m = f.multiplier;
  for (int64_t n = 0; n < b.n1 - b.n0; ++n)
    for (int64_t h = b.h0; h < b.h1; ++h)
      for (int64_t iw = b.w0; iw < b.w1; ++iw, out += kDepthwiseLanes) {
        vf at[NV], c[NV];
        UNROLL_FOR (v, NV) {
          at[v] = load(x0 + n * x.image + (h - b.h0) * x.row + (iw - b.w0) * x.pitch + v * kW);
          c[v] = vf{};
        }
        for (int64_t kh = 0; kh < p.KH; ++kh) {
          const int64_t a = h + p.pad_top - kh * p.dilation_h, oh = a / p.stride_h;
          if (a < 0 || a % p.stride_h || oh >= p.OH) continue;
          for (int64_t kw = 0; kw < p.KW; ++kw) {
            const int64_t e = iw + p.pad_left - kw * p.dilation_w, ow = e / p.stride_w;
            if (e < 0 || e % p.stride_w || ow >= p.OW) continue;
            const float* g = y0 + n * y.image + (oh - o.h0) * y.row + (ow - o.w0) * y.pitch;
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
static void depthwise_grad_w_rows(const DepthwiseShape& f, const Source& x, const float* x0, const Source& y,
                                  const float* y0, const Band& b, const float* w, float* sums) {
  const Conv2dProblem& p = f.p;
  const int64_t m = f.multiplier;
  for (int64_t j = 0; j < m; ++j)
    for (int64_t t = 0; t < f.taps; ++t, sums += kDepthwiseLanes, w += kDepthwiseLanes) {
      vf c[NV], weight[NV];
      UNROLL_FOR (v, NV) c[v] = load(sums + v * kW), weight[v] = load(w + v * kW);
      for (int64_t n = 0; n < b.n1 - b.n0; ++n)
        for (int64_t h = 0; h < b.h1 - b.h0; ++h) {
          const float* in =
              x0 + n * x.image + (h * p.stride_h + t / p.KW * p.dilation_h) * x.row + t % p.KW * p.dilation_w * x.pitch;
          const float* g = y0 + n * y.image + h * y.row;
          for (int64_t ow = 0; ow < b.w1 - b.w0; ++ow, in += p.stride_w * x.pitch, g += y.pitch)
            UNROLL_FOR (v, NV) c[v] = fused(load_filter(g + v * kW * m + j, m), load(in + v * kW) - weight[v], c[v]);
        }
      UNROLL_FOR (v, NV) store(sums + v * kW, c[v]);
    }
}

// Calls rows<NV> for the vectors of a block; each is 1 to kDepthwiseVectors.
#define DEPTHWISE_ROWS(rows, lanes, ...)                  \
  switch (blocks(lanes, kW)) {                            \
    case 1: rows<1>(__VA_ARGS__); break;                  \
    case 2: rows<2>(__VA_ARGS__); break;                  \
    case 3: rows<3>(__VA_ARGS__); break;                  \
    default: rows<kDepthwiseVectors>(__VA_ARGS__); break; \
  }

static void depthwise_forward_run(const Conv2dArgs& args, int, int64_t task, char*, char* worker) {
  const DepthwiseShape f = depthwise_shape(args, false);
  const Conv2dProblem& p = f.p;
  Carver carve{worker, 0};
  const DepthwiseScratch s = depthwise_scratch(f, &carve);
  const DepthwiseTask t = depthwise_task(f, task);
  Source x = f.x;
  const float* base = depthwise_open(args, &x, window_opening(p, t.band, t.c0), t.lanes, s.x);
  load_filters(args, f, t.c0, t.lanes, s.w);
  DEPTHWISE_ROWS(depthwise_forward_rows, t.lanes, f, x, base, t.band, s.w, s.result)
  const int64_t rows = t.band.h1 - t.band.h0, columns = t.band.w1 - t.band.w0, pitch = kDepthwiseLanes * f.multiplier;
  for (int64_t n = t.band.n0; n < t.band.n1; ++n)
    store_rows(args.type, s.result + (n - t.band.n0) * rows * columns * pitch, pitch, args.out,
               {n, t.c0 * f.multiplier, t.lanes * f.multiplier, t.band.h0, rows, t.band.w0, columns});
}

static void depthwise_grad_x_run(const Conv2dArgs& args, int, int64_t task, char*, char* worker) {
  const DepthwiseShape f = depthwise_shape(args, true);
  const Conv2dProblem& p = f.p;
  Carver carve{worker, 0};
  const DepthwiseScratch s = depthwise_scratch(f, &carve);
  const DepthwiseTask t = depthwise_task(f, task);
  const Band& b = t.band;
  // the outputs that these pixels reach and that exist
  const int64_t first_h = b.h0 + p.pad_top - (p.KH - 1) * p.dilation_h;
  const int64_t first_w = b.w0 + p.pad_left - (p.KW - 1) * p.dilation_w;
  const int64_t oh0 = smaller(p.OH, first_h > 0 ? first_h / p.stride_h : 0);
  const int64_t ow0 = smaller(p.OW, first_w > 0 ? first_w / p.stride_w : 0);
  const int64_t oh1 = larger(oh0, smaller(p.OH, (b.h1 - 1 + p.pad_top) / p.stride_h + 1));
  const int64_t ow1 = larger(ow0, smaller(p.OW, (b.w1 - 1 + p.pad_left) / p.stride_w + 1));
  const int64_t rows = b.h1 - b.h0, columns = b.w1 - b.w0;
  const Opening outputs{b.n0, b.n1, t.c0 * f.multiplier, oh0, oh1 - oh0, ow0, ow1 - ow0};
  Source x = f.x, y = f.y;
  const float* x0 = depthwise_open(args, &x, {b.n0, b.n1, t.c0, b.h0, rows, b.w0, columns}, t.lanes, s.x);
  const float* y0 = depthwise_open(args, &y, outputs, t.lanes * f.multiplier, s.y);
  load_filters(args, f, t.c0, t.lanes, s.w);
  DEPTHWISE_ROWS(depthwise_grad_x_rows, t.lanes, f, x, x0, y, y0, outputs, b, s.w, s.result)
  for (int64_t n = b.n0; n < b.n1; ++n)
    store_rows(args.type, s.result + (n - b.n0) * rows * columns * kDepthwiseLanes, kDepthwiseLanes, args.out,
               {n, t.c0, t.lanes, b.h0, rows, b.w0, columns});
}

static int64_t depthwise_sums(const DepthwiseShape& f) { return product(kDepthwiseLanes, f.multiplier, f.taps); }

template <typename T>
static void depthwise_grad_w_reduce(const Conv2dArgs& args, const DepthwiseShape& f, int64_t block, const float* sums) {
  const int64_t c0 = block * kDepthwiseLanes, lanes = smaller(kDepthwiseLanes, f.p.C_in - c0);
  const int64_t* stride = args.out.stride;
  for (int64_t j = 0; j < f.multiplier; ++j)
    for (int64_t t = 0; t < f.taps; ++t)
      for (int64_t i = 0; i < lanes; ++i) {
        float total = 0;
        for (int64_t chunk = 0; chunk < f.chunks; ++chunk)
          total += sums[(chunk * f.blocks + block) * depthwise_sums(f) + (j * f.taps + t) * kDepthwiseLanes + i];
        from_float(total, static_cast<T*>(args.out.data) + ((c0 + i) * f.multiplier + j) * stride[0] +
                              t / f.p.KW * stride[2] + t % f.p.KW * stride[3]);
      }
}

static void depthwise_grad_w_run(const Conv2dArgs& args, int stage, int64_t task, char* shared, char* worker) {
  const DepthwiseShape f = depthwise_shape(args, false);
  float* const sums = reinterpret_cast<float*>(shared);
  if (stage == 1) {
    if (args.type == ElementType::kFloat32) depthwise_grad_w_reduce<float>(args, f, task, sums);
    if (args.type == ElementType::kBFloat16) depthwise_grad_w_reduce<BFloat16>(args, f, task, sums);
    if (args.type == ElementType::kFloat16) depthwise_grad_w_reduce<Float16>(args, f, task, sums);
    return;
  }
  Carver carve{worker, 0};
  const DepthwiseScratch s = depthwise_scratch(f, &carve);
  const int64_t block = task % f.blocks, chunk = task / f.blocks;
  zero(sums + task * depthwise_sums(f), depthwise_sums(f));
  for (int64_t i = f.bands.count * chunk / f.chunks; i < f.bands.count * (chunk + 1) / f.chunks; ++i) {
    const DepthwiseTask t = depthwise_task(f, i * f.blocks + block);
    const Band& b = t.band;
    Source x = f.x, y = f.y;
    const float* x0 = depthwise_open(args, &x, window_opening(f.p, b, t.c0), t.lanes, s.x);
    const float* y0 = depthwise_open(args, &y, {b.n0, b.n1, t.c0 * f.multiplier, b.h0, b.h1 - b.h0, b.w0, b.w1 - b.w0},
                                     t.lanes * f.multiplier, s.y);
    load_filters(args, f, t.c0, t.lanes, s.w);
    DEPTHWISE_ROWS(depthwise_grad_w_rows, t.lanes, f, x, x0, y, y0, b, s.w, sums + task * depthwise_sums(f))
  }
}
#undef DEPTHWISE_ROWS

static Plan<Conv2dArgs> depthwise_plan(const DepthwiseShape& f, decltype(Plan<Conv2dArgs>::run) run) {
  Carver scratch{nullptr, 0};
  depthwise_scratch(f, &scratch);
  return {0, scratch.used, 1, {product(f.bands.count, f.blocks), 0, 0}, run};
}
static Plan<Conv2dArgs> depthwise_forward_plan(const Conv2dArgs& args) {
  const DepthwiseShape f = depthwise_shape(args, false);
  return f.sparse ? kDefinitionKernels.forward(args) : depthwise_plan(f, depthwise_forward_run);
}
static Plan<Conv2dArgs> depthwise_grad_x_plan(const Conv2dArgs& args) {
  const DepthwiseShape f = depthwise_shape(args, true);
  return f.sparse ? kDefinitionKernels.grad_x(args) : depthwise_plan(f, depthwise_grad_x_run);
}
static Plan<Conv2dArgs> depthwise_grad_w_plan(const Conv2dArgs& args) {
  const DepthwiseShape f = depthwise_shape(args, false);
  if (f.sparse) return kDefinitionKernels.grad_w(args);
  Plan<Conv2dArgs> plan = depthwise_plan(f, depthwise_grad_w_run);
  plan.shared_bytes = product(f.chunks, f.blocks, depthwise_sums(f), 4);
  plan.stages = 2, plan.tasks[0] = product(f.chunks, f.blocks), plan.tasks[1] = f.blocks;
  return plan;
}
