// Rows of pixels between the tensors of the call (any strides, any element type) and float32 scratch in which the
// channels of a pixel are contiguous: scratch[row][column][channel], `pitch` floats from pixel to pixel.

struct Rows {
  int64_t n, c0, channels;  // image, first channel, how many
  int64_t h0, rows;         // first row, how many
  int64_t w0, columns;      // first column, how many; rows and columns may lie outside the image: zeros
};

// lane i = p[i * stride], for n <= kW lanes
template <typename T>
ALWAYS_INLINE vf load_strided(const T* p, int64_t stride, int64_t n) {
  if (stride == 1) return n == kW ? load(p) : load_n(p, n);
  if (stride == 2) {
    const int64_t last = 2 * n - 1;  // elements up to the last one wanted, none beyond
    return even_lanes(load_n(p, smaller(kW, last)), last > kW ? load_n(p + kW, last - kW) : vf{});
  }
  float v[kW] = {};
  for (int64_t i = 0; i < n; ++i) v[i] = to_float(p[i * stride]);
  return load(v);
}

ALWAYS_INLINE void store_up_to(float* p, vf v, int64_t n) { n >= kW ? store(p, v) : store_n(p, v, n); }

static void zero(float* p, int64_t n) { __builtin_memset(p, 0, (size_t)n * 4); }
static void zero_pixels(float* p, int64_t pixels, int64_t channels, int64_t pitch) {
  if (channels == pitch) return zero(p, pixels * pitch);
  for (int64_t i = 0; i < pixels; ++i) zero(p + i * pitch, channels);
}

// `rows` x `columns` pixels from src on; a row of dst is dst_row floats long.
template <typename T>
static void load_block(const T* src, const int64_t* stride, int64_t channels, int64_t rows, int64_t columns, float* dst,
                       int64_t pitch, int64_t dst_row) {
  const int64_t sc = stride[1], sh = stride[2], sw = stride[3];
  if (sc == 1) {
    for (int64_t h = 0; h < rows; ++h)
      for (int64_t j = 0; j < columns; ++j) {
        const T* from = src + h * sh + j * sw;
        float* to = dst + h * dst_row + j * pitch;
        int64_t c = 0;
        for (; c + kW <= channels; c += kW) store(to + c, load(from + c));
        if (c < channels) store_n(to + c, load_n(from + c, channels - c), channels - c);
      }
    return;
  }
  // Channel planes: transpose kW channels x kW pixels at a time.  A plane without gaps is one long row.
  const bool one_run = sh == columns * sw;
  const int64_t runs = one_run ? 1 : rows, run = one_run ? rows * columns : columns;
  for (int64_t c = 0; c < channels; c += kW) {
    const int64_t nc = smaller(kW, channels - c);
    for (int64_t h = 0; h < runs; ++h) {
      float* to = dst + h * dst_row + c;
      int64_t column = 0;
      for (int64_t j = 0; j < run; j += kW) {
        const int64_t nj = smaller(kW, run - j);
        const T* from = src + c * sc + h * sh + j * sw;
        vf v[kW];
        for (int i = 0; i < kW; ++i) {
          v[i] = i < nc ? load_strided(from + i * sc, sw, nj) : vf{};
          __builtin_prefetch(from + (i + kW) * sc);  // the same pixels of the next channels
        }
        transpose(v);
        for (int i = 0; i < nj; ++i) {
          store_up_to(to, v[i], nc);
          to += pitch;
          if (++column == columns) column = 0, to += dst_row - columns * pitch;
        }
      }
    }
  }
}

template <typename T>
static void load_rows_of(const Operand& x, int64_t H, int64_t W, const Rows& r, float* dst, int64_t pitch) {
  const int64_t left = smaller(r.columns, larger(0, -r.w0)), right = larger(left, smaller(r.columns, W - r.w0));
  const int64_t top = smaller(r.rows, larger(0, -r.h0)), bottom = larger(top, smaller(r.rows, H - r.h0));
  const int64_t dst_row = r.columns * pitch;
  zero_pixels(dst, top * r.columns, r.channels, pitch);
  zero_pixels(dst + bottom * dst_row, (r.rows - bottom) * r.columns, r.channels, pitch);
  for (int64_t i = top; i < bottom; ++i) {
    zero_pixels(dst + i * dst_row, left, r.channels, pitch);
    zero_pixels(dst + i * dst_row + right * pitch, r.columns - right, r.channels, pitch);
  }
  const T* src = static_cast<const T*>(x.data) + r.n * x.stride[0] + r.c0 * x.stride[1] + (r.h0 + top) * x.stride[2] +
                 (r.w0 + left) * x.stride[3];
  load_block(src, x.stride, r.channels, bottom - top, right - left, dst + top * dst_row + left * pitch, pitch, dst_row);
}

static void load_rows(ElementType type, const Operand& x, int64_t H, int64_t W, const Rows& r, float* dst,
                      int64_t pitch) {
  if (type == ElementType::kFloat32) load_rows_of<float>(x, H, W, r, dst, pitch);
  if (type == ElementType::kBFloat16) load_rows_of<BFloat16>(x, H, W, r, dst, pitch);
  if (type == ElementType::kFloat16) load_rows_of<Float16>(x, H, W, r, dst, pitch);
}

template <typename T>
static void store_rows_of(const float* src, int64_t pitch, const Operand& y, const Rows& r) {
  const int64_t sc = y.stride[1], sh = y.stride[2], sw = y.stride[3];
  T* base = static_cast<T*>(y.data) + r.n * y.stride[0] + r.c0 * sc + r.h0 * sh + r.w0 * sw;
  const bool one_run = sh == r.columns * sw;  // a plane without gaps is one long row
  const int64_t rows = one_run ? 1 : r.rows, columns = one_run ? r.rows * r.columns : r.columns;
  for (int64_t h = 0; h < rows; ++h, src += columns * pitch) {
    T* dst = base + h * sh;
    if (sc == 1) {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t c = 0; c < r.channels; c += kW)
          store_n(dst + j * sw + c, load(src + j * pitch + c), smaller(kW, r.channels - c));
      continue;
    }
    for (int64_t c = 0; c < r.channels; c += kW) {
      const int64_t nc = smaller(kW, r.channels - c);
      for (int64_t j = 0; j < columns; j += kW) {
        const int64_t nj = smaller(kW, columns - j);
        vf v[kW];
        for (int i = 0; i < kW; ++i) v[i] = i < nj ? load(src + (j + i) * pitch + c) : vf{};
        transpose(v);
        if (sw == 1) {
          for (int i = 0; i < nc; ++i)
            nj == kW ? store(dst + (c + i) * sc + j, v[i]) : store_n(dst + (c + i) * sc + j, v[i], nj);
        } else {
          for (int i = 0; i < nc; ++i)
            for (int k = 0; k < nj; ++k) from_float(v[i][k], dst + (c + i) * sc + (j + k) * sw);
        }
      }
    }
  }
}

// `src` may be read up to a vector past the channels of its last pixel.
static void store_rows(ElementType type, const float* src, int64_t pitch, const Operand& y, const Rows& r) {
  if (type == ElementType::kFloat32) store_rows_of<float>(src, pitch, y, r);
  if (type == ElementType::kBFloat16) store_rows_of<BFloat16>(src, pitch, y, r);
  if (type == ElementType::kFloat16) store_rows_of<Float16>(src, pitch, y, r);
}
