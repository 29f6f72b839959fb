// Rows of pixels between the tensors of the call (any strides, any element type) and float32 copies in which the
// channels of a pixel are contiguous: copy[image][row][column][channel], `pitch` floats per pixel.
#pragma once
#include "plan.h"
#include "region.h"
#include "vector.h"

namespace adderops {
namespace cpu {
namespace {

inline void zero(float* p, int64_t n) { __builtin_memset(p, 0, (size_t)n * 4); }
inline void zero_pixels(float* p, int64_t pixels, int64_t channels, int64_t pitch) {
  if (channels == pitch) return zero(p, pixels * pitch);
  for (int64_t i = 0; i < pixels; ++i) zero(p + i * pitch, channels);
}

// `rows` x `columns` pixels from `src` on; rows of dst are dst_row floats apart.
template <typename T>
__attribute__((noinline)) void load_pixels(const T* src, const int64_t* stride, int64_t channels, int64_t rows,
                                           int64_t columns, float* dst, int64_t pitch, int64_t dst_row) {
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

// Image n of the region, channels [c0, c0 + channels).
template <typename T>
inline void load_image(const Operand& x, int64_t H, int64_t W, const Region& r, int64_t n, int64_t c0, int64_t channels,
                       float* dst, int64_t pitch) {
  const int64_t left = smaller(r.columns, larger(0, -r.w0)), right = larger(left, smaller(r.columns, W - r.w0));
  const int64_t top = smaller(r.rows, larger(0, -r.h0)), bottom = larger(top, smaller(r.rows, H - r.h0));
  const int64_t dst_row = r.columns * pitch;
  zero_pixels(dst, top * r.columns, channels, pitch);
  zero_pixels(dst + bottom * dst_row, (r.rows - bottom) * r.columns, channels, pitch);
  for (int64_t i = top; i < bottom; ++i) {
    zero_pixels(dst + i * dst_row, left, channels, pitch);
    zero_pixels(dst + i * dst_row + right * pitch, r.columns - right, channels, pitch);
  }
  const T* src = static_cast<const T*>(x.data) + n * x.stride[0] + c0 * x.stride[1] + (r.h0 + top) * x.stride[2] +
                 (r.w0 + left) * x.stride[3];
  load_pixels(src, x.stride, channels, bottom - top, right - left, dst + top * dst_row + left * pitch, pitch, dst_row);
}

// The region of x, of images of H x W, as float32; zeros outside the image.
inline void load_rows(ElementType type, const Operand& x, int64_t H, int64_t W, const Region& r, int64_t c0,
                      int64_t channels, float* dst, int64_t pitch) {
  for (int64_t i = 0; i < r.images; ++i)
    dispatch(type, [&](auto zero) {
      load_image<decltype(zero)>(x, H, W, r, r.n0 + i, c0, channels, dst + i * r.rows * r.columns * pitch, pitch);
    });
}

template <typename T>
__attribute__((noinline)) void store_image(const float* src, int64_t pitch, const Operand& y, const Region& r,
                                           int64_t n, int64_t c0, int64_t channels) {
  const int64_t sc = y.stride[1], sh = y.stride[2], sw = y.stride[3];
  T* base = static_cast<T*>(y.data) + n * y.stride[0] + c0 * sc + r.h0 * sh + r.w0 * sw;
  const bool one_run = sh == r.columns * sw;  // a plane without gaps is one long row
  const int64_t rows = one_run ? 1 : r.rows, columns = one_run ? r.rows * r.columns : r.columns;
  for (int64_t h = 0; h < rows; ++h, src += columns * pitch) {
    T* dst = base + h * sh;
    if (sc == 1) {
      for (int64_t j = 0; j < columns; ++j)
        for (int64_t c = 0; c < channels; c += kW)
          store_n(dst + j * sw + c, load(src + j * pitch + c), smaller(kW, channels - c));
      continue;
    }
    for (int64_t c = 0; c < channels; c += kW) {
      const int64_t nc = smaller(kW, channels - c);
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

// The inverse of load_rows, for a region inside the image.  `src` may be read up to a vector past the channels of its
// last pixel.
inline void store_rows(ElementType type, const float* src, int64_t pitch, const Operand& y, const Region& r, int64_t c0,
                       int64_t channels) {
  for (int64_t i = 0; i < r.images; ++i)
    dispatch(type, [&](auto zero) {
      store_image<decltype(zero)>(src + i * r.rows * r.columns * pitch, pitch, y, r, r.n0 + i, c0, channels);
    });
}

// sums[c] += the sum of channel c over the pixels, one after the other.
inline void add_rows(const float* rows, int64_t pitch, int64_t pixels, int64_t channels, float* sums) {
  for (int64_t c = 0; c < channels; c += kW) {
    const int64_t n = smaller(kW, channels - c);
    vf total = load_n(sums + c, n);
    for (int64_t q = 0; q < pixels; ++q)
      total += n == kW ? load(rows + q * pitch + c) : load_n(rows + q * pitch + c, n);
    store_n(sums + c, total, n);
  }
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
