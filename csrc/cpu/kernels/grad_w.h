// Gradient of the weights, float32 sums:   dW[co,k] = sum_p dY[co,p] * (X[k,p] - W[co,k])
//                                                   = sum_p dY[co,p] * X[k,p]  -  W[co,k] * sum_p dY[co,p]
// This is AdderNet's full-precision training gradient (arXiv 1912.13200, section 3.2), on purpose not the derivative,
// which is sgn(X - W).  In the second form a term is one fused multiply-add.
//
//   x    one band of rows in scratch, [row][column][ci], zero padded; or the tensor itself
//   dY   the band's outputs, [pixel][co], likewise
//   g    partial sums [chunk][group][co][k in the order of x], every kernel row rounded up to whole vectors
//
//   stage 0: task = (chunk of bands, group, part of the filters); one band after the other is added to the chunk's g.
//            tile of MR filters x NV vectors of k, summed over the band's pixels: a pixel is NV loads of x,
//            MR broadcasts of dY, MR*NV fma.   32 registers: 8 x 3;  16 registers: 4 x 2.
//   stage 1: task = (group, filter): the chunks in order, the rank-one term, the order of the weights.
//
// The number of chunks depends on the problem alone, so the order of every sum does.  A result that is not finite is
// computed again by definition.h: with infinities the two forms differ.

constexpr int kGradWRows = kRegisters == 32 ? 8 : 4;
constexpr int kGradWVectors = kRegisters == 32 ? 3 : 2;
constexpr int64_t kPartialBytes = 24 << 20;  // all chunks together
constexpr int64_t kMostChunks = 16;
constexpr int64_t kPackFrom = 6;  // tiles of filters from which it pays to copy the vectors of x together

template <int NV>
static __attribute__((noinline)) void grad_w_tile(const float* grad_y, int64_t pitch, const float* const* x,
                                                  int64_t offset, int64_t pixels, float* g, int64_t stride,
                                                  bool first) {
  constexpr int MR = kGradWRows;
  vf c[MR][NV];
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) c[i][j] = vf{};
  for (int64_t q = 0; q < pixels; ++q, grad_y += pitch) {
    const float* p = x[q] + offset;
    vf b[NV];
    UNROLL_FOR (j, NV) b[j] = load(p + j * kW);
    UNROLL_FOR (i, MR)
      UNROLL_FOR (j, NV) c[i][j] = fused_of(grad_y + i, b[j], c[i][j]);
  }
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) {
      float* at = g + i * stride + j * kW;
      store(at, first ? c[i][j] : load(at) + c[i][j]);
    }
}

struct GradWShape {
  Conv2dProblem p;  // of the strided view when the kernel is 1x1
  int64_t C, M, taps;
  Source x, grad_y;
  Bands bands;
  int64_t rows, columns;  // of an image that a band reads
  int64_t pixels, segments;
  int64_t padded_M, padded_K;  // filters in whole tiles, terms in whole vectors
  int64_t chunks, splits;
};

static GradWShape grad_w_shape(const Conv2dArgs& args) {
  GradWShape f{};
  f.p = args.problem;
  Conv2dProblem& p = f.p;
  const Operand x = dense_view(args.x, &p);
  f.C = p.C_in / p.groups, f.M = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  f.x = window_source(args.type, x, p, f.C, kW);
  f.grad_y = make_source(args.type, args.grad_y, p.OH, p.OW, f.M, false, kGradWRows);
  const int64_t row = sum(product(p.stride_h, window_columns(p, p.OW), f.C), product(p.OW, f.M));
  f.bands = make_bands(p.N, p.OH, p.OW, row, 64 * 1024, 256);
  f.rows = window_rows(p, f.bands.rows), f.columns = window_columns(p, f.bands.columns);
  f.pixels = product(f.bands.images, f.bands.rows, f.bands.columns);
  // kernel rows whose taps touch are summed as one segment
  const bool joined = f.x.pitch == f.C && p.dilation_w == 1;
  f.segments = joined ? p.KH : f.taps;
  f.padded_M = round_up(f.M, kGradWRows);
  f.padded_K = product(f.segments, round_up(product(f.taps / f.segments, f.C), kW));
  const int64_t bytes = product(p.groups, f.padded_M, f.padded_K, 4);
  f.chunks = larger(1, smaller(smaller(kMostChunks, f.bands.count), kPartialBytes / bytes));
  f.splits = smaller(f.padded_M / kGradWRows, blocks(8, product(f.chunks, p.groups)));
  return f;
}

struct GradWShared {
  float* g;       // [chunk][group][padded_M][padded_K]
  float* sum_dy;  // [chunk][group][padded_M]
};
static GradWShared grad_w_shared(const GradWShape& f, Carver* carve) {
  const int64_t filters = product(f.chunks, f.p.groups, f.padded_M);
  return {carve->take<float>(product(filters, f.padded_K)), carve->take<float>(filters)};
}

struct GradWScratch {
  float *x, *grad_y, *row, *panel;
  const float **pixel, **packed;
};
static GradWScratch grad_w_scratch(const GradWShape& f, Carver* carve) {
  // tiles read up to a vector past the last pixel of x and up to a tile past that of dY
  return {carve->take<float>(copy_floats(f.x, f.bands.images, f.rows, f.columns) + kGradWVectors * kW),
          carve->take<float>(copy_floats(f.grad_y, 1, 1, f.pixels) + kGradWRows),
          carve->take<float>(larger(f.padded_K, product(f.C, f.taps)) + kW * kW),
          carve->take<float>(product(f.pixels, kGradWVectors * kW)),
          carve->take<const float*>(f.pixels),
          carve->take<const float*>(f.pixels)};
}

static void add_grad_y(const float* grad_y, int64_t pitch, int64_t pixels, int64_t filters, float* sums) {
  for (int64_t co = 0; co < filters; co += kW) {
    const int64_t n = smaller(kW, filters - co);
    vf total = load_n(sums + co, n);
    for (int64_t q = 0; q < pixels; ++q)
      total += n == kW ? load(grad_y + q * pitch + co) : load_n(grad_y + q * pitch + co, n);
    store_n(sums + co, total, n);
  }
}

static void grad_w_chunk(const Conv2dArgs& args, const GradWShape& f, int64_t task, const GradWShared& shared,
                         const GradWScratch& s) {
  const Conv2dProblem& p = f.p;
  const int64_t split = task % f.splits, group = task / f.splits % p.groups, chunk = task / f.splits / p.groups;
  const int64_t tiles = f.padded_M / kGradWRows;
  const int64_t co0 = tiles * split / f.splits * kGradWRows, co1 = tiles * (split + 1) / f.splits * kGradWRows;
  const int64_t filter = (chunk * p.groups + group) * f.padded_M;
  float* const g = shared.g + filter * f.padded_K;
  float* const sum_dy = shared.sum_dy + filter;
  zero(sum_dy + co0, co1 - co0);
  const int64_t begin = f.bands.count * chunk / f.chunks, end = f.bands.count * (chunk + 1) / f.chunks;
  for (int64_t i = begin; i < end; ++i) {
    const Band b = band_at(f.bands, i);
    Source x = f.x, grad_y = f.grad_y;
    const Opening window = window_opening(p, b, group * f.C);
    const int64_t rows = b.h1 - b.h0, columns = b.w1 - b.w0;
    const Opening outputs{b.n0, b.n1, group * f.M, b.h0, rows, b.w0, columns};
    load_source(args.type, x, window, 0, f.C, s.x);
    load_source(args.type, grad_y, outputs, 0, f.M, s.grad_y);
    const float* x0 = open_source(&x, window, s.x);
    const float* dy = open_source(&grad_y, outputs, s.grad_y);
    // dY pixels must follow each other evenly: in place only whole images without gaps do, else row by row
    const bool even = grad_y.row == columns * grad_y.pitch && grad_y.image == rows * grad_y.row;
    const int64_t run = even ? (b.n1 - b.n0) * rows * columns : columns;
    int64_t pixels = 0;
    for (int64_t n = 0; n < b.n1 - b.n0; ++n)
      for (int64_t h = 0; h < rows; ++h)
        for (int64_t ow = 0; ow < columns; ++ow)
          s.pixel[pixels++] = x0 + n * x.image + h * p.stride_h * x.row + ow * p.stride_w * x.pitch;
    for (int64_t q = 0; q < pixels; q += run) {
      const int64_t row = q / columns;
      const float* dy_run = dy + row / rows * grad_y.image + row % rows * grad_y.row;
      add_grad_y(dy_run + co0, grad_y.pitch, run, smaller(co1, f.M) - co0, sum_dy + co0);
      const bool first = i == begin && q == 0;
      const int64_t length = f.taps / f.segments * f.C, taps_of = f.taps / f.segments;
      for (int64_t seg = 0; seg < f.segments; ++seg) {
        const int64_t tap = seg * taps_of;
        const int64_t offset = tap / p.KW * p.dilation_h * x.row + tap % p.KW * p.dilation_w * x.pitch;
        for (int64_t k = 0; k < length; k += kGradWVectors * kW) {
          const int64_t nv = smaller(kGradWVectors, blocks(length - k, kW));
          const auto tile = nv == 1 ? grad_w_tile<1> : nv == 2 ? grad_w_tile<2> : grad_w_tile<kGradWVectors>;
          float* at = g + seg * round_up(length, kW) + k;
          const float* const* pixel = s.pixel + q;
          int64_t in_pixel = offset + k;
          if (co1 - co0 >= kPackFrom * kGradWRows) {
            for (int64_t i = 0; i < run; ++i)
              for (int64_t j = 0; j < nv; ++j) store(s.panel + (i * nv + j) * kW, load(pixel[i] + in_pixel + j * kW));
            for (int64_t i = 0; i < run; ++i) s.packed[i] = s.panel + i * nv * kW;
            pixel = s.packed, in_pixel = 0;
          }
          for (int64_t co = co0; co < co1; co += kGradWRows)
            tile(dy_run + co, grad_y.pitch, pixel, in_pixel, run, at + co * f.padded_K, f.padded_K, first);
        }
      }
    }
  }
}

// row[term in the order of x] -> row in the order (ci, tap), through `out`
static void order_by_channel(const GradWShape& f, const float* row, float* out) {
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

template <typename T>
static void grad_w_reduce(const Conv2dArgs& args, const GradWShape& f, int64_t task, const GradWShared& shared,
                          const GradWScratch& s) {
  const int64_t group = task / f.M, co = task % f.M;
  const int64_t filter = group * f.padded_M + co, chunk = f.p.groups * f.padded_M;
  float* const row = shared.g + filter * f.padded_K;  // the first chunk's, summed in place
  float* const ordered = f.taps > 1 ? s.row : row;
  float sum_dy = shared.sum_dy[filter];
  for (int64_t c = 1; c < f.chunks; ++c) {
    const float* more = shared.g + (c * chunk + filter) * f.padded_K;
    for (int64_t k = 0; k < f.padded_K; k += kW) store(row + k, load(row + k) + load(more + k));
    sum_dy += shared.sum_dy[c * chunk + filter];
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

static void grad_w_run(const Conv2dArgs& args, int stage, int64_t task, char* shared_block, char* worker_block) {
  const GradWShape f = grad_w_shape(args);
  Carver carve{shared_block, 0}, carve_scratch{worker_block, 0};
  const GradWShared shared = grad_w_shared(f, &carve);
  const GradWScratch s = grad_w_scratch(f, &carve_scratch);
  if (stage == 0) return grad_w_chunk(args, f, task, shared, s);
  if (args.type == ElementType::kFloat32) grad_w_reduce<float>(args, f, task, shared, s);
  if (args.type == ElementType::kBFloat16) grad_w_reduce<BFloat16>(args, f, task, shared, s);
  if (args.type == ElementType::kFloat16) grad_w_reduce<Float16>(args, f, task, shared, s);
}

static Plan<Conv2dArgs> grad_w_plan(const Conv2dArgs& args) {
  const GradWShape f = grad_w_shape(args);
  if (windows_are_sparse(f.p, f.bands, f.rows, f.columns)) return kDefinitionKernels.grad_w(args);
  Carver shared{nullptr, 0}, scratch{nullptr, 0};
  grad_w_shared(f, &shared);
  grad_w_scratch(f, &scratch);
  return {shared.used, scratch.used, 2, {product(f.chunks, f.p.groups, f.splits), f.p.C_out, 0}, grad_w_run};
}
