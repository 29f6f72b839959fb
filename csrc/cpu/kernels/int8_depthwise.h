// Int8 depthwise layers (C_in == groups; filter c*multiplier + j reads channel c alone): lanes are channels.
//
//   Y[n,co,p] = -sum_t |X[n,c,p+t] - W[co,t]|      t = (kh, kw)
//
//   stage 0: w as [j][t][channel]
//   stage 1: task = band of output rows; x as in int8.h, channels rounded up to whole vectors
// A term is a load of x, one of w, |a - b| on bytes and an addition to 16 bits; 257 terms fit there, and go to int32.

typedef uint8_t vb_half __attribute__((vector_size(SIMD_BYTES / 2)));
typedef uint16_t vh __attribute__((vector_size(SIMD_BYTES)));
typedef uint16_t vh_half __attribute__((vector_size(SIMD_BYTES / 2)));

constexpr int64_t kHalfLanes = SIMD_BYTES / 2;
constexpr int64_t kMostTerms16 = 257;  // * 255 < 2^16

struct Int8DepthwiseShape {
  Conv2dProblem p;
  int64_t multiplier, taps, channels;  // channels in whole vectors
  bool in_place;
  Bands bands;
  int64_t rows, columns;
};

static Int8DepthwiseShape int8_depthwise_shape(const Int8Args& args) {
  Int8DepthwiseShape f{};
  f.p = args.problem;
  const Conv2dProblem& p = f.p;
  f.multiplier = p.C_out / p.groups, f.taps = product(p.KH, p.KW), f.channels = round_up(p.C_in, kHalfLanes);
  const bool padded = p.pad_top || p.pad_left || window_rows(p, p.OH) > p.H || window_columns(p, p.OW) > p.W;
  f.in_place = !padded && f.channels == p.C_in;
  f.bands = make_bands(p.N, p.OH, p.OW, product(p.stride_h, window_columns(p, p.OW), f.channels), kInt8Band, 16);
  f.rows = window_rows(p, f.bands.rows), f.columns = window_columns(p, f.bands.columns);
  return f;
}

struct Int8DepthwiseScratch {
  uint8_t* x;
  int64_t* offset;
};
static Int8DepthwiseScratch int8_depthwise_scratch(const Int8DepthwiseShape& f, Carver* carve) {
  return {carve->take<uint8_t>(f.in_place ? 0 : product(f.bands.images, f.rows, f.columns, f.channels)),
          carve->take<int64_t>(f.taps)};
}

static void int8_depthwise_pack(const Int8Args& args, const Int8DepthwiseShape& f, int64_t j, uint8_t* w) {
  w += j * f.taps * f.channels;
  for (int64_t t = 0; t < f.taps; ++t)
    for (int64_t c = 0; c < f.channels; ++c)
      w[t * f.channels + c] = c < f.p.C_in ? args.w[(c * f.multiplier + j) * f.taps + t] : 0;
}

// The sums of one vector of channels at one pixel.
static ALWAYS_INLINE void int8_depthwise_sums(const uint8_t* x, const int64_t* offset, int64_t taps, const uint8_t* w,
                                              int64_t pitch, vi (&sums)[2]) {
  sums[0] = sums[1] = vi{};
  for (int64_t t = 0; t < taps;) {
    vh c{};
    for (const int64_t end = smaller(taps, t + kMostTerms16); t < end; ++t) {
      vb_half a, b;
      __builtin_memcpy(&a, x + offset[t], sizeof(a));
      __builtin_memcpy(&b, w + t * pitch, sizeof(b));
      c += __builtin_convertvector((a > b ? a : b) - (a < b ? a : b), vh);
    }
    vh_half halves[2];
    __builtin_memcpy(halves, &c, sizeof(c));
    UNROLL_FOR (i, 2) sums[i] += __builtin_convertvector(halves[i], vi);
  }
}

static void int8_depthwise_run(const Int8Args& args, int stage, int64_t task, char* shared, char* worker) {
  const Int8DepthwiseShape f = int8_depthwise_shape(args);
  const Conv2dProblem& p = f.p;
  uint8_t* const packed = reinterpret_cast<uint8_t*>(shared);
  if (stage == 0) return int8_depthwise_pack(args, f, task, packed);
  Carver carve{worker, 0};
  const Int8DepthwiseScratch s = int8_depthwise_scratch(f, &carve);
  const Band b = band_at(f.bands, task);
  const Opening o = window_opening(p, b, 0);
  const Int8Images x{p.H, p.W, p.C_in, p.W * p.C_in, p.H * p.W * p.C_in};
  int64_t row = o.columns * f.channels, image = o.rows * row;
  const uint8_t* base = s.x;
  if (f.in_place)
    base = args.x + o.n0 * x.image + o.h0 * x.row + o.w0 * x.pixel, row = x.row, image = x.image;
  else
    int8_load(args, x, o, p.C_in, f.channels, s.x);
  for (int64_t t = 0; t < f.taps; ++t)
    s.offset[t] = t / p.KW * p.dilation_h * row + t % p.KW * p.dilation_w * f.channels;

  const Int8Finish finish = int8_finish_of(args);
  const int64_t m = f.multiplier;
  int64_t at = ((b.n0 * p.OH + b.h0) * p.OW + b.w0) * p.C_out;
  for (int64_t n = 0; n < b.n1 - b.n0; ++n)
    for (int64_t h = 0; h < b.h1 - b.h0; ++h)
      for (int64_t ow = 0; ow < b.w1 - b.w0; ++ow, at += p.C_out) {
        const uint8_t* at_x = base + n * image + h * p.stride_h * row + ow * p.stride_w * f.channels;
        for (int64_t c = 0; c < p.C_in; c += kHalfLanes)
          for (int64_t j = 0; j < m; ++j) {
            vi sums[2];
            int8_depthwise_sums(at_x + c, s.offset, f.taps, packed + j * f.taps * f.channels + c, f.channels, sums);
            if (m == 1) {
              finish(args, sums, 1, blocks(smaller(kHalfLanes, p.C_in - c), kW), args.scale + c, args.offset + c,
                     at + c, p.C_in - c);
              continue;
            }
            for (int64_t k = 0; k < smaller(kHalfLanes, p.C_in - c); ++k)
              definition::int8_finish(args, sums[k / kW][k % kW], (c + k) * m + j, at + (c + k) * m + j);
          }
      }
}

static Plan<Int8Args> int8_depthwise_plan(const Int8Args& args) {
  const Int8DepthwiseShape f = int8_depthwise_shape(args);
  if (windows_are_sparse(f.p, f.bands, f.rows, f.columns)) return kDefinitionKernels.int8(args);
  Carver scratch{nullptr, 0};
  int8_depthwise_scratch(f, &scratch);
  return {
      product(f.multiplier, f.taps, f.channels), scratch.used, 2, {f.multiplier, f.bands.count, 0}, int8_depthwise_run};
}

static Plan<Int8Args> int8_plan(const Int8Args& args) {
  return is_depthwise(args.problem) ? int8_depthwise_plan(args) : int8_dense_plan(args);
}
