// An int8 convolution with the care of the adder's kernels, to compare like with like: the same tiles of four pixels and two
// filters, the same order of rows for 3x3 windows, the same epilogues, SMLAD in place of USADA8 (tiles in int8_conv.S).
//
//   conv_float, conv_fixed                int16 weights (twice the flash), 4 x 2 tiles
//   conv_narrow_float, conv_narrow_fixed  int8 weights, widened in the loop, 2 x 2 tiles
//
// x are bytes with zero point `outside`, which the start of the sums takes off. C_in is a multiple of 4 and C_out of 2.
// A word holds terms 0 and 2, or 1 and 3, of four: two UXTB16 of a word of x.
#include <arm_acle.h>
#include <stdint.h>

typedef uint32_t __attribute__((may_alias)) word;

struct tile {
  const word* x;
  const uint32_t* w;
  int32_t bytes;  // of the words of a pair of filters
  uint8_t* y;
  int32_t cout, pairs;
};

struct conv {
  int32_t height, width, channels, out_height, out_width, filters, kernel, stride, pad, outside, words;  // of a filter
  const uint32_t* weights;
};

typedef void tiles(const struct tile*);
tiles taps_float, rows1_float, rows2_float, narrow_float, taps_fixed, rows1_fixed, rows2_fixed, narrow_fixed;

#define INLINE static inline __attribute__((always_inline))

// n words of x to 2 n words of `to`, `step` words apart
INLINE void widen(word* to, const word* from, int n, int step) {
  for (; n >= 2; n -= 2, from += 2, to += 4 * step) {
    const uint32_t a = from[0], b = from[1];
    to[0] = __uxtb16(a), to[step] = __uxtb16(a >> 8 | a << 24);
    to[2 * step] = __uxtb16(b), to[3 * step] = __uxtb16(b >> 8 | b << 24);
  }
  if (n) to[0] = __uxtb16(*from), to[step] = __uxtb16(*from >> 8 | *from << 24);
}

INLINE void fill(word* to, uint32_t value, int n, int step) {
  for (; n; n--, to += step) *to = value;
}

// One pixel's window: word k to to[step * k].
INLINE void gather_taps(const struct conv* l, const uint8_t* x, int iy, int ix, word* to, int step) {
  const int n = l->channels / 4, row = l->width * l->channels;
  const uint8_t* from = x + iy * row + ix * l->channels;
  const word* const end = to + step * l->words;
  if (iy >= 0 && ix >= 0 && iy + l->kernel <= l->height && ix + l->kernel <= l->width) {
    for (int ky = 0; ky < l->kernel; ky++, from += row, to += 2 * step * n * l->kernel)
      widen(to, (const word*)from, n * l->kernel, step);
  } else {
    for (int ky = 0; ky < l->kernel; ky++, from += row)
      for (int kx = 0; kx < l->kernel; kx++, to += 2 * step * n) {
        if ((unsigned)(iy + ky) < (unsigned)l->height && (unsigned)(ix + kx) < (unsigned)l->width)
          widen(to, (const word*)(from + kx * l->channels), n, step);
        else
          fill(to, (uint32_t)l->outside * 0x10001u, 2 * n, step);
      }
  }
  for (; to < end; to += step) *to = 0;
}

// The columns of four pixels: column j of word k of row ky to to[span * (ky * C / 2 + k) + j].
INLINE void gather_rows(const struct conv* l, const uint8_t* x, int iy, int ix, word* to, int span) {
  const int n = l->channels / 4, row = l->width * l->channels;
  for (int ky = 0; ky < 3; ky++, to += 2 * n * span) {
    const int inside = (unsigned)(iy + ky) < (unsigned)l->height;
    const uint8_t* from = x + (iy + ky) * row + ix * l->channels;
    for (int j = 0; j < span; j++, from += l->channels) {
      if (inside && (unsigned)(ix + j) < (unsigned)l->width)
        widen(to + j, (const word*)from, n, span);
      else
        fill(to + j, (uint32_t)l->outside * 0x10001u, 2 * n, span);
    }
  }
}

INLINE void run(const struct conv* l, const uint8_t* x, uint8_t* y, word* scratch, int most, int bytes, tiles* taps,
                tiles* rows1, tiles* rows2) {
  const int by_row = rows1 && l->kernel == 3 && l->stride <= 2 && l->out_width % 4 == 0;
  struct tile tile = {scratch, l->weights, 4 * bytes * l->words, y, l->filters, l->filters / 2};
  if (by_row) {
    const int span = l->stride == 1 ? 6 : 9;
    for (int oy = 0; oy < l->out_height; oy++)
      for (int ox = 0; ox < l->out_width; ox += 4, tile.y += 4 * l->filters) {
        gather_rows(l, x, oy * l->stride - l->pad, ox * l->stride - l->pad, scratch, span);
        (l->stride == 1 ? rows1 : rows2)(&tile);
      }
    return;
  }
  const int pixels = l->out_height * l->out_width;
  int iy = -l->pad, ix = -l->pad, ox = 0;
  for (int pixel = 0; pixel < pixels; pixel += most) {
    const int count = pixels - pixel < most ? pixels - pixel : most;
    for (int p = 0; p < count; p++, ix += l->stride) {
      if (ox == l->out_width) ox = 0, ix = -l->pad, iy += l->stride;
      gather_taps(l, x, iy, ix, scratch + p, most);
      ox++;
    }
    if (count == most) {
      taps(&tile);
      tile.y += most * l->filters;
    } else {
      struct tile last = tile;
      last.y = (uint8_t*)(scratch + most * l->words);
      taps(&last);
      for (int i = 0; i < count * l->filters; i++) tile.y[i] = last.y[i];
    }
  }
}

void conv_float(const struct conv* l, const uint8_t* x, uint8_t* y, word* scratch) {
  run(l, x, y, scratch, 4, 2, taps_float, rows1_float, rows2_float);
}
void conv_fixed(const struct conv* l, const uint8_t* x, uint8_t* y, word* scratch) {
  run(l, x, y, scratch, 4, 2, taps_fixed, rows1_fixed, rows2_fixed);
}
void conv_narrow_float(const struct conv* l, const uint8_t* x, uint8_t* y, word* scratch) {
  run(l, x, y, scratch, 2, 1, narrow_float, 0, 0);
}
void conv_narrow_fixed(const struct conv* l, const uint8_t* x, uint8_t* y, word* scratch) {
  run(l, x, y, scratch, 2, 1, narrow_fixed, 0, 0);
}
