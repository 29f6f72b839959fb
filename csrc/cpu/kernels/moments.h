// Moments of the kernels of two layers (moments_args.h), and the gradient of what depends on them, float32.
//
//   panel   a band of pixels in scratch, [pixel][student's C, teacher's C, zeros up to whole vectors]: z, made in place
//           of the outputs loaded there, so that the outputs are read once and z never leaves the cache
//   second  partial sums [chunk][j][k], k up to whole vectors; only tiles on and below the diagonal
//
//   moments   stage 0: task = chunk of bands.  second += z z^T by the tile of grad_w.h: kGradWRows rows of j by
//             kGradWVectors vectors of k, a pixel after the other.
//             stage 1: one task: the chunks in order, divided by the number of pixels; the upper half from the lower.
//   gradient  stage 0: the weights in rows of whole vectors.  stage 1: task = band, out by tiles of kGradRows pixels x
//             kGradVectors vectors of channels, a loop over j: a load of the weights, broadcasts of z, an fma each.
//
// How pixels are cut into bands and chunks depends on the problem alone, so the order of every sum does.

constexpr int64_t kMomentsFloats = 96 * 1024;  // of a panel
constexpr int64_t kMomentsChunks = 16;
constexpr int kGradRows = kRegisters == 32 ? 12 : 6;
constexpr int kGradVectors = 2;
constexpr float kMostExponent = 10.f;

// exp(x) for x clamped to -87 .. 10, within 2 units in the last place.  x = n ln 2 + r, |r| <= ln 2 / 2.
ALWAYS_INLINE vf exponential(vf x) {
  const vf low = splat(-87.f), high = splat(kMostExponent);
  x = -minimum(-minimum(x, high), -low);
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which stands in the low bits
  const vf shifted = fused(x, splat(1.44269504f), magic);
  const vf n = shifted - magic;
  vf r = fused(n, splat(-0.693359375f), x);
  r = fused(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fused(p, r, splat(1.3981999507e-3f));
  p = fused(p, r, splat(8.3334519073e-3f));
  p = fused(p, r, splat(4.1665795894e-2f));
  p = fused(p, r, splat(1.6666665459e-1f));
  p = fused(p, r, splat(5.0000001201e-1f));
  p = fused(p * r, r, r + 1.f);
  return (vf)((vi)p + ((vi)shifted << 23));
}

struct MomentsShape {
  int64_t C, D, pitch;  // channels of one network, of both, floats of a panel's pixel
  Bands bands;
  int64_t pixels, chunks;
};

static MomentsShape moments_shape(const MomentsArgs& a) {
  MomentsShape f{};
  f.C = a.C, f.D = product(2, a.C);
  // rows of second are tiles of kGradWRows, its columns vectors
  f.pitch = round_up(round_up(f.D, kW), kGradWRows);
  f.bands = make_bands(a.N, a.H, a.W, product(a.W, f.pitch), kMomentsFloats, 64);
  f.pixels = product(f.bands.images, f.bands.rows, f.bands.columns);
  f.chunks = larger(1, smaller(kMomentsChunks, f.bands.count));
  return f;
}

struct MomentsScratch {
  float *panel, *out;
  const float** pixel;
};
static MomentsScratch moments_scratch(const MomentsShape& f, bool gradient, Carver* carve) {
  // loads of a pixel's last vector, and of a tile's missing pixels, run over the end
  const int64_t floats = product(f.pixels + kGradRows, f.pitch) + kGradWVectors * kW;
  return {carve->take<float>(floats), carve->take<float>(gradient ? floats : 0), carve->take<const float*>(f.pixels)};
}

struct MomentsShared {
  float *second, *mean;  // [chunk][pitch][pitch], [chunk][pitch]
};
static MomentsShared moments_shared(const MomentsShape& f, Carver* carve) {
  return {carve->take<float>(product(f.chunks, f.pitch, f.pitch)), carve->take<float>(product(f.chunks, f.pitch))};
}

// Loads a band and makes z of it; returns the number of its pixels.
static int64_t moments_panel(const MomentsArgs& a, const MomentsShape& f, const Band& b, float* panel) {
  const int64_t rows = b.h1 - b.h0, columns = b.w1 - b.w0, pixels = (b.n1 - b.n0) * rows * columns;
  for (int64_t i = 0; i < pixels; ++i)
    for (int64_t j = f.D; j < f.pitch; ++j) panel[i * f.pitch + j] = 0.f;
  for (int half = 0; half < 2; ++half)
    for (int64_t n = b.n0; n < b.n1; ++n)
      load_rows(ElementType::kFloat32, half ? a.teacher : a.student, a.H, a.W, {n, 0, f.C, b.h0, rows, b.w0, columns},
                panel + (n - b.n0) * rows * columns * f.pitch + half * f.C, f.pitch);
  for (int64_t i = 0; i < pixels; ++i)
    for (int half = 0; half < 2; ++half) {
      const vf scale = splat(a.scale[half]), centre = splat(a.centre[half]);
      float* at = panel + i * f.pitch + half * f.C;
      for (int64_t c = 0; c < f.C; c += kW) {
        const int64_t n = smaller(kW, f.C - c);
        const vf v = (n == kW ? load(at + c) : load_n(at + c, n)) * scale;
        const vf z = (a.exponential ? exponential(v) : v) - centre;
        n == kW ? store(at + c, z) : store_n(at + c, z, n);
      }
    }
  return pixels;
}

static void moments_run(const MomentsArgs& a, int stage, int64_t task, char* shared_block, char* worker_block) {
  const MomentsShape f = moments_shape(a);
  Carver carve{shared_block, 0}, carve_scratch{worker_block, 0};
  const MomentsShared shared = moments_shared(f, &carve);
  if (stage == 0) {
    const MomentsScratch s = moments_scratch(f, false, &carve_scratch);
    float* const second = shared.second + task * f.pitch * f.pitch;
    float* const mean = shared.mean + task * f.pitch;
    zero(mean, f.pitch);
    const int64_t begin = f.bands.count * task / f.chunks, end = f.bands.count * (task + 1) / f.chunks;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pixels = moments_panel(a, f, band_at(f.bands, i), s.panel);
      for (int64_t q = 0; q < pixels; ++q) s.pixel[q] = s.panel + q * f.pitch;
      add_grad_y(s.panel, f.pitch, pixels, f.D, mean);
      for (int64_t j = 0; j < f.D; j += kGradWRows)
        for (int64_t k = 0; k < smaller(f.D, j + kGradWRows); k += kGradWVectors * kW) {
          const int64_t nv = smaller(kGradWVectors, blocks(f.pitch - k, kW));
          const auto tile = nv == 1 ? grad_w_tile<1> : nv == 2 ? grad_w_tile<2> : grad_w_tile<kGradWVectors>;
          tile(s.panel + j, f.pitch, s.pixel, k, pixels, second + j * f.pitch + k, f.pitch, i == begin);
        }
    }
    return;
  }
  const float inverse = 1.f / (float)(a.N * a.H * a.W);
  for (int64_t j = 0; j < f.D; ++j) {
    float total = 0.f;
    for (int64_t chunk = 0; chunk < f.chunks; ++chunk) total += shared.mean[chunk * f.pitch + j];
    a.mean[j] = total * inverse;
    for (int64_t k = 0; k <= j; ++k) {
      float sum = 0.f;
      for (int64_t chunk = 0; chunk < f.chunks; ++chunk) sum += shared.second[(chunk * f.pitch + j) * f.pitch + k];
      a.second[j * f.D + k] = a.second[k * f.D + j] = sum * inverse;
    }
  }
}

static Plan<MomentsArgs> moments_plan(const MomentsArgs& a) {
  const MomentsShape f = moments_shape(a);
  Carver shared{nullptr, 0}, scratch{nullptr, 0};
  moments_shared(f, &shared);
  moments_scratch(f, false, &scratch);
  return {shared.used, scratch.used, 2, {f.chunks, 1, 0}, moments_run};
}

// out[q][c] = packed[D][c] + sum over j < D of z[q][j] * packed[j][c], for kGradRows pixels and NV vectors of c
template <int NV>
static __attribute__((noinline)) void moments_gradient_tile(const float* z, int64_t pitch, const float* packed,
                                                            int64_t row, int64_t D, float* out) {
  vf c[kGradRows][NV];
  UNROLL_FOR (v, NV) {
    const vf start = load(packed + D * row + v * kW);
    UNROLL_FOR (i, kGradRows) c[i][v] = start;
  }
  for (int64_t j = 0; j < D; ++j) {
    vf b[NV];
    UNROLL_FOR (v, NV) b[v] = load(packed + j * row + v * kW);
    UNROLL_FOR (i, kGradRows)
      UNROLL_FOR (v, NV) c[i][v] = fused_of(z + i * pitch + j, b[v], c[i][v]);
  }
  UNROLL_FOR (i, kGradRows)
    UNROLL_FOR (v, NV) store(out + i * pitch + v * kW, c[i][v]);
}

// Shared: the weights in rows of whole vectors, [D + 1][row].
static int64_t moments_packed_row(const MomentsShape& f) { return round_up(f.C, kW); }
static float* moments_packed(const MomentsShape& f, Carver* carve) {
  return carve->take<float>(product(f.D + 1, moments_packed_row(f)) + kGradVectors * kW);
}

static void moments_gradient_run(const MomentsArgs& a, int stage, int64_t task, char* shared_block,
                                 char* worker_block) {
  const MomentsShape f = moments_shape(a);
  Carver carve{shared_block, 0}, carve_scratch{worker_block, 0};
  const int64_t row = moments_packed_row(f);
  float* const packed = moments_packed(f, &carve);
  if (stage == 0) {
    zero(packed, (f.D + 1) * row + kGradVectors * kW);
    for (int64_t c = 0; c < f.C; ++c) {
      for (int64_t j = 0; j <= f.D; ++j) packed[j * row + c] = a.weights[j * f.C + c];
    }
    return;
  }
  const MomentsScratch s = moments_scratch(f, true, &carve_scratch);
  const Band b = band_at(f.bands, task);
  const int64_t pixels = moments_panel(a, f, b, s.panel);
  for (int64_t q = 0; q < pixels; q += kGradRows)
    for (int64_t c = 0; c < row; c += kGradVectors * kW) {
      const auto tile = row - c > kW ? moments_gradient_tile<kGradVectors> : moments_gradient_tile<1>;
      tile(s.panel + q * f.pitch, f.pitch, packed + c, row, f.D, s.out + q * f.pitch + c);
    }
  if (a.exponential) {  // exp' = exp = z + centre
    const vf centre = splat(a.centre[0]);
    for (int64_t q = 0; q < pixels; ++q)
      for (int64_t c = 0; c < f.C; c += kW) {
        float* at = s.out + q * f.pitch + c;
        store(at, load(at) * (load(s.panel + q * f.pitch + c) + centre));
      }
  }
  const int64_t rows = b.h1 - b.h0, columns = b.w1 - b.w0;
  for (int64_t n = b.n0; n < b.n1; ++n)
    store_rows(ElementType::kFloat32, s.out + (n - b.n0) * rows * columns * f.pitch, f.pitch, a.out,
               {n, 0, f.C, b.h0, rows, b.w0, columns});
}

static Plan<MomentsArgs> moments_gradient_plan(const MomentsArgs& a) {
  const MomentsShape f = moments_shape(a);
  Carver shared{nullptr, 0}, scratch{nullptr, 0};
  moments_packed(f, &shared);
  moments_scratch(f, true, &scratch);
  return {shared.used, scratch.used, 2, {1, f.bands.count, 0}, moments_gradient_run};
}

// sum |x| of each image into mean[n], of images that are each one piece of memory.  A task is an image; sums of 64
// numbers a lane, then of those: they round like sums of few.
static void abs_sum_run(const MomentsArgs& a, int, int64_t task, char*, char*) {
  const float* x = static_cast<const float*>(a.student.data) + task * a.student.stride[0];
  const int64_t count = a.C * a.H * a.W;
  vf total{};
  for (int64_t begin = 0; begin < count; begin += 64 * kW) {
    const int64_t end = smaller(count, begin + 64 * kW);
    vf sums[4] = {};
    int64_t i = begin;
    for (; i + 4 * kW <= end; i += 4 * kW)
      UNROLL_FOR (u, 4) sums[u] += absolute(load(x + i + u * kW));
    for (; i < end; i += kW) sums[0] += absolute(load_n(x + i, smaller(kW, end - i)));
    total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
  float sum = 0.f;
  for (int i = 0; i < kW; ++i) sum += total[i];
  a.mean[task] = sum;
}

static Plan<MomentsArgs> abs_sum_plan(const MomentsArgs& a) { return {0, 0, 1, {a.N, 0, 0}, abs_sum_run}; }
