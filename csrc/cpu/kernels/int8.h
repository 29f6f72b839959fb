// Int8 forward, exact int32 sums:   Y[n,co,p] = -sum_k |X[n,k,p] - W[co,k]|      k = (kh, kw, ci),  p = (oh, ow)
// and what int8_args.h makes of them, on bytes.
//
// x86-64 has one instruction for it: psadbw sums 8 |a - b| to every 64 bits, so a term costs 1/64 (AVX-512), 1/32
// (AVX2) or 1/16 (SSE2) of it and as much of an addition; AArch64 takes three instructions for 16 terms.
//
//   x    one band of rows in scratch, [row][column][ci], padded; or the tensor itself where nothing is padded
//   w    packed panels [run of terms][vector of kFilters filters][filter][kRun bytes]; whole runs first
//
//   stage 0: pack a panel of w, with its scale and offset
//   stage 1: task = (band of output rows, group, part of the panels)
//   panel -> tile of MR pixels, all K terms, finished in registers:
//
//            filters ->             each step broadcasts kRun bytes of a pixel, reads NV vectors of w that the MR
//   pixel 0  [ NV vectors ]         pixels share, and does MR*NV (psadbw, paddd).
//   pixel MR [ NV vectors ]         32 registers: 6 x 4, 11 x 2;  16 registers: 6 x 2.
//
// Terms run over the bytes of a kernel row where they lie in one piece, else of a tap; the last run of each is filled
// up with zeros on both sides.  A band's last tile repeats its last pixel.

constexpr int64_t kInt8Band = 48 * 1024;  // bytes of source a band
constexpr int kInt8MostRows = 11;
constexpr int kInt8Panel = kRegisters == 32 ? 4 / kParts : 2 / kParts;  // vectors of kW filters

static constexpr int int8_rows(int nv) { return kRegisters == 32 ? (nv == 4 ? 6 : nv == 3 ? 8 : 11) : 6; }

// Bytes beyond `n` of a run become 0.
static ALWAYS_INLINE void copy_run(const uint8_t* from, int64_t n, uint8_t* to) {
  __builtin_memset(to, 0, kRun);
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// The runs of a filter: `whole` ones, and behind them `parts` that have `left` bytes of a segment's end; `offset` says
// where each begins, in bytes from a pixel's window on.
struct Int8Runs {
  const int64_t* offset;
  int64_t whole, parts, left;
};

template <int MR, int NV>
static __attribute__((noinline)) void int8_tile(const uint8_t* const* x, const Int8Runs& runs, const uint8_t* w,
                                                vi* sums) {
  vi c[MR][NV];
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV) c[i][j] = vi{};
  const uint8_t* a[MR];
  UNROLL_FOR (i, MR) a[i] = x[i];
  const int64_t* offset = runs.offset;
  for (const int64_t* end = offset + runs.whole; offset < end; ++offset, w += NV * SIMD_BYTES) {
    vb b[NV];
    UNROLL_FOR (j, NV) b[j] = load_lanes<vb>(w + j * SIMD_BYTES, kW);
    UNROLL_FOR (i, MR) {
      const vb run = splat_run(a[i] + *offset);
      UNROLL_FOR (j, NV) c[i][j] = add_distances(c[i][j], run, b[j]);
    }
  }
  for (const int64_t* end = offset + runs.parts; offset < end; ++offset, w += NV * SIMD_BYTES) {
    UNROLL_FOR (i, MR) {
      uint8_t part[kRun];
      copy_run(a[i] + *offset, runs.left, part);
      const vb run = splat_run(part);
      UNROLL_FOR (j, NV) c[i][j] = add_distances(c[i][j], run, load_lanes<vb>(w + j * SIMD_BYTES, kW));
    }
  }
  UNROLL_FOR (i, MR)
    UNROLL_FOR (j, NV / kParts) sums[i * (NV / kParts) + j] = join_parts(c[i] + j * kParts);
}

// Images of H x W pixels in memory: bytes from pixel to pixel, row to row, image to image.
struct Int8Images {
  int64_t H, W, pixel, row, image;
};

struct Int8Shape {
  Conv2dProblem p;  // of the strided view when the kernel is 1x1
  int64_t C, M, taps;
  Int8Images x;
  bool in_place;
  int64_t pitch;                   // bytes from pixel to pixel as the kernel reads them
  int64_t segments, length, runs;  // a filter: so many segments of so many bytes, and the runs of all of them
  Bands bands;
  Panels panels;
  int64_t splits;         // tasks of a band
  int64_t rows, columns;  // of an image that a band reads
  int64_t pixels;         // of a band
};

static Int8Shape int8_shape(const Int8Args& args) {
  Int8Shape f{};
  f.p = args.problem;
  Conv2dProblem& p = f.p;
  const Operand x = dense_view({nullptr, {p.H * p.W * p.C_in, 1, p.W * p.C_in, p.C_in}}, &p);
  f.C = p.C_in / p.groups, f.M = p.C_out / p.groups, f.taps = product(p.KH, p.KW);
  const bool padded = p.pad_top || p.pad_left || window_rows(p, p.OH) > p.H || window_columns(p, p.OW) > p.W;
  f.in_place = !padded;
  f.x = {p.H, p.W, x.stride[3], x.stride[2], x.stride[0]};
  // in a copy, the pixels of a tile lie on different cache sets
  f.pitch = f.in_place ? f.x.pixel : f.C % 2048 ? f.C : f.C + 64;
  const bool joined = p.dilation_w == 1 && f.pitch == f.C;
  f.segments = joined ? p.KH : f.taps, f.length = f.taps / f.segments * f.C;
  f.runs = f.segments * blocks(f.length, kRun);
  f.bands = make_bands(p.N, p.OH, p.OW, product(p.stride_h, window_columns(p, p.OW), f.C), kInt8Band, 192);
  f.panels = make_panels(f.M, kInt8Panel);
  f.splits = band_splits(f.panels.count, product(f.bands.count, p.groups));
  f.rows = window_rows(p, f.bands.rows), f.columns = window_columns(p, f.bands.columns);
  f.pixels = product(f.bands.images, f.bands.rows, f.bands.columns);
  return f;
}

struct Int8Shared {
  uint8_t* w;
  float *scale, *offset;
};
static Int8Shared int8_shared(const Int8Shape& f, Carver* carve) {
  const int64_t lanes = product(f.p.groups, f.panels.vectors, kW);
  return {carve->take<uint8_t>(product(lanes, f.runs, kRun)), carve->take<float>(lanes), carve->take<float>(lanes)};
}

struct Int8Scratch {
  uint8_t* x;
  const uint8_t** pixel;
  int64_t* offset;
};
static Int8Scratch int8_scratch(const Int8Shape& f, Carver* carve) {
  return {carve->take<uint8_t>(f.in_place ? 0 : product(f.bands.images, f.rows, f.columns, f.pitch)),
          carve->take<const uint8_t*>(f.pixels + kInt8MostRows), carve->take<int64_t>(f.runs)};
}

static void int8_pack(const Int8Args& args, const Int8Shape& f, int64_t task, const Int8Shared& shared) {
  const int64_t group = task / f.panels.count, panel = task % f.panels.count;
  const int64_t v0 = panel_begin(f.panels, panel), v1 = panel_begin(f.panels, panel + 1);
  const int64_t lane = (group * f.panels.vectors + v0) * kW, lanes = (v1 - v0) * kW;
  const int64_t co = group * f.M + v0 * kW, filters = smaller(lanes, f.M - v0 * kW), K = f.taps * f.C;
  uint8_t* const to = shared.w + lane * f.runs * kRun;
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
    shared.scale[lane + i] = i < filters ? args.scale[co + i] : 0;
    shared.offset[lane + i] = i < filters ? args.offset[co + i] : 0;
  }
}

// The opening's `channels` from c0 on to [row][column][pitch], `padding` outside the image.
static void int8_load(const Int8Args& args, const Int8Images& x, const Opening& o, int64_t channels, int64_t pitch,
                      uint8_t* to) {
  const int64_t left = smaller(o.columns, larger(0, -o.w0)), right = larger(left, smaller(o.columns, x.W - o.w0));
  for (int64_t n = o.n0; n < o.n1; ++n)
    for (int64_t h = o.h0; h < o.h0 + o.rows; ++h, to += o.columns * pitch) {
      const bool outside = h < 0 || h >= x.H;
      const int64_t begin = outside ? o.columns : left, end = outside ? o.columns : right;
      __builtin_memset(to, args.padding, (size_t)(begin * pitch));
      __builtin_memset(to + end * pitch, args.padding, (size_t)((o.columns - end) * pitch));
      if (begin == end) continue;
      const uint8_t* from = args.x + n * x.image + h * x.row + (o.w0 + begin) * x.pixel + o.c0;
      if (pitch == x.pixel)
        __builtin_memcpy(to + begin * pitch, from, (size_t)((end - begin) * pitch));
      else
        for (int64_t j = begin; j < end; ++j, from += x.pixel) __builtin_memcpy(to + j * pitch, from, (size_t)channels);
    }
}

enum class Residual { kNone, kBytes, kFloats };

// Sums of kW filters of one pixel, of which `lanes` exist, to z of element `at` of y; held by value, in registers,
// where no byte stored to y can change it.
template <Residual residual>
struct Int8Epilogue {
  const void* x;
  vf x_scale, least;
  ALWAYS_INLINE vf operator()(vi sum, vf scale, vf offset, int64_t at, int64_t lanes) const {
    vf z = offset - scale * to_floats(sum);
    if (residual == Residual::kFloats) z = z + x_scale * load_lanes<vf>(static_cast<const float*>(x) + at, lanes);
    if (residual == Residual::kBytes)
      z = z + x_scale * to_floats(load_lanes<vb_quarter>(static_cast<const uint8_t*>(x) + at, lanes));
    return larger(least, z);
  }
};

// Sums [pixel][vector] of a tile, of which `lanes` filters exist, to y from element `at` on.
template <Int8Output output, Residual residual>
static void int8_finish(const Int8Args& args, const vi* sums, int64_t pixels, int64_t vectors, const float* scale,
                        const float* offset, int64_t at, int64_t lanes) {
  const Int8Epilogue<residual> e{args.residual, splat(args.residual_scale), splat(args.least)};
  void* const y = args.y;
  const vf most = splat(args.most);
  const int64_t pitch = args.problem.C_out;
  for (int64_t j = 0; j < vectors; ++j, ++sums, at += kW, lanes -= kW) {
    vf a{}, b{};
    if (output != Int8Output::kSums)
      a = load_lanes<vf>(scale + j * kW, lanes), b = load_lanes<vf>(offset + j * kW, lanes);
    int64_t i = 0;
    if (output == Int8Output::kUInt8 && lanes >= kW)
      for (; i + 4 <= pixels; i += 4) {
        vi bytes[4];
        UNROLL_FOR (q, 4) bytes[q] = rounded(smaller(e(sums[(i + q) * vectors], a, b, at + (i + q) * pitch, kW), most));
        store_low_bytes(static_cast<uint8_t*>(y) + at + i * pitch, pitch, bytes);
      }
    for (; i < pixels; ++i) {
      const int64_t to = at + i * pitch;
      if (output == Int8Output::kSums) {
        store_lanes(static_cast<int32_t*>(y) + to, -sums[i * vectors], lanes);
        continue;
      }
      const vf z = e(sums[i * vectors], a, b, to, lanes);
      if (output == Int8Output::kFloat32)
        store_lanes(static_cast<float*>(y) + to, z, lanes);
      else
        store_lanes(static_cast<uint8_t*>(y) + to, low_bytes(rounded(smaller(z, most))), lanes);
    }
  }
}

using Int8Finish = void (*)(const Int8Args&, const vi*, int64_t, int64_t, const float*, const float*, int64_t, int64_t);
static Int8Finish int8_finish_of(const Int8Args& args) {
  constexpr auto kSums = Int8Output::kSums, kFloat32 = Int8Output::kFloat32, kUInt8 = Int8Output::kUInt8;
  constexpr auto kNone = Residual::kNone, kBytes = Residual::kBytes, kFloats = Residual::kFloats;
  const Residual residual = !args.residual ? kNone : args.float_residual ? kFloats : kBytes;
  if (args.output == kSums) return int8_finish<kSums, kNone>;
  if (args.output == kFloat32)
    return residual == kNone    ? int8_finish<kFloat32, kNone>
           : residual == kBytes ? int8_finish<kFloat32, kBytes>
                                : int8_finish<kFloat32, kFloats>;
  return residual == kNone    ? int8_finish<kUInt8, kNone>
         : residual == kBytes ? int8_finish<kUInt8, kBytes>
                              : int8_finish<kUInt8, kFloats>;
}

// The panel's filters for all pixels of a band; `at`: where in y the first pixel's first filter is.
template <int NV>
static void int8_panel(const Int8Args& args, const Int8Scratch& s, const Int8Runs& runs, int64_t pixels,
                       const uint8_t* w, const float* scale, const float* offset, int64_t lanes, int64_t at) {
  constexpr int MR = int8_rows(NV), vectors = NV / kParts;
  const Int8Finish finish = int8_finish_of(args);
  vi sums[MR * vectors];
  for (int64_t i = 0; i < pixels; i += MR) {
    int8_tile<MR, NV>(s.pixel + i, runs, w, sums);
    finish(args, sums, smaller(MR, pixels - i), vectors, scale, offset, at + i * args.problem.C_out, lanes);
  }
}

static void int8_band(const Int8Args& args, const Int8Shape& f, int64_t task, const Int8Shared& shared,
                      const Int8Scratch& s) {
  const Conv2dProblem& p = f.p;
  const int64_t split = task % f.splits, group = task / f.splits % p.groups;
  const Band b = band_at(f.bands, task / f.splits / p.groups);
  const Opening o = window_opening(p, b, group * f.C);
  const uint8_t* base = s.x;
  int64_t row = o.columns * f.pitch, image = o.rows * row;
  if (f.in_place)
    base = args.x + o.n0 * f.x.image + o.h0 * f.x.row + o.w0 * f.pitch + o.c0, row = f.x.row, image = f.x.image;
  else
    int8_load(args, f.x, o, f.C, f.pitch, s.x);

  int64_t pixels = 0;
  for (int64_t n = 0; n < b.n1 - b.n0; ++n)
    for (int64_t h = 0; h < b.h1 - b.h0; ++h)
      for (int64_t ow = 0; ow < b.w1 - b.w0; ++ow)
        s.pixel[pixels++] = base + n * image + h * p.stride_h * row + ow * p.stride_w * f.pitch;
  for (int i = 0; i < kInt8MostRows; ++i) s.pixel[pixels + i] = s.pixel[pixels - 1];
  const int64_t whole = f.length / kRun;  // of a segment
  const Int8Runs runs{s.offset, f.segments * whole, f.runs - f.segments * whole, f.length - whole * kRun};
  for (int64_t i = 0; i < f.segments; ++i) {
    const int64_t t = i * (f.taps / f.segments);
    const int64_t first = t / p.KW * p.dilation_h * row + t % p.KW * p.dilation_w * f.pitch;
    for (int64_t k = 0; k < whole; ++k) s.offset[i * whole + k] = first + k * kRun;
    if (runs.left) s.offset[runs.whole + i] = first + whole * kRun;
  }

  const int64_t begin = f.panels.count * split / f.splits, end = f.panels.count * (split + 1) / f.splits;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t v0 = panel_begin(f.panels, panel), nv = panel_begin(f.panels, panel + 1) - v0;
    const int64_t lane = (group * f.panels.vectors + v0) * kW, co = group * f.M + v0 * kW;
    const int64_t at = ((b.n0 * p.OH + b.h0) * p.OW + b.w0) * p.C_out + co;
    const auto run = nv == 1   ? int8_panel<kParts>
                     : nv == 2 ? int8_panel<(kInt8Panel > 1 ? 2 : 1) * kParts>
                     : nv == 3 ? int8_panel<(kInt8Panel > 2 ? 3 : 1) * kParts>
                               : int8_panel<kInt8Panel * kParts>;
    run(args, s, runs, pixels, shared.w + lane * f.runs * kRun, shared.scale + lane, shared.offset + lane,
        f.M - v0 * kW, at);
  }
}

static void int8_dense_run(const Int8Args& args, int stage, int64_t task, char* shared_block, char* worker_block) {
  const Int8Shape f = int8_shape(args);
  Carver carve{shared_block, 0}, carve_scratch{worker_block, 0};
  const Int8Shared shared = int8_shared(f, &carve);
  if (stage == 0) return int8_pack(args, f, task, shared);
  int8_band(args, f, task, shared, int8_scratch(f, &carve_scratch));
}

static Plan<Int8Args> int8_dense_plan(const Int8Args& args) {
  const Int8Shape f = int8_shape(args);
  if (windows_are_sparse(f.p, f.bands, f.rows, f.columns)) return kDefinitionKernels.int8(args);
  Carver shared{nullptr, 0}, scratch{nullptr, 0};
  int8_shared(f, &shared);
  int8_scratch(f, &scratch);
  return {shared.used,
          scratch.used,
          2,
          {product(f.p.groups, f.panels.count), product(f.p.groups, f.bands.count, f.splits), 0},
          int8_dense_run};
}
