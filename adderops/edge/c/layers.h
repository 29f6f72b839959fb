// The layers of a generated network as data, and the fragments that compute them.
//
// A generated file is: #define ADDER_EPILOGUE_INTEGER 0 (or 1), #define ADDER_ROWS_WORDS n (the most `words` of a layer in
// ORDER_ROWS; AArch64 has 16 * n bytes of stack for them), this header, prelude.c, then the fragments it uses, in this order.
//
//   fragment           needs                                    defines
//   prelude.c          -                                        target, word, real, rounded(), nearest(), copy_bytes(); always
//   finish_float.c     prelude                                  finish(), CONSTANTS: the float32 epilogue
//   finish_integer.c   prelude                                  the same for the fixed-point epilogue; one of the two
//   gather.c           prelude                                  struct rows, gather_tile()
//   sums_*.c           finish, gather                           sums_4x2(), the micro-kernel; a file is empty for other targets
//   adder_conv.c       finish, gather, all sums_*               adder_conv()
//   adder_depthwise.c  finish; faster on Cortex-M with sums_*   adder_depthwise()
//   multiply_conv.c    finish; faster on Cortex-M with sums_*   multiply_conv()
//   max_pool.c         prelude                                  max_pool()
//   sum_pool.c         prelude                                  sum_pool()
//   elements.c         prelude                                  quantize(), dequantize(), add_floats(), relu_floats()
//   lookup.c           prelude                                  lookup(): bytes through tables (images; another grid)
//
// ADDER_USES, the sum of USES_* below, tells what layers have, and ADDER_FINISHES what those have that leave tiles to finish()
// where a Cortex-M computes tiles in assembly. Compilers drop the rest. Without definitions all is there.
//
// ADDER_TARGET, set by prelude.c unless the compiler's command line sets it, picks the micro-kernel:
//   ADDER_C, ADDER_M_INTRINSICS, ADDER_M_ASSEMBLY (Cortex-M with DSP), ADDER_NEON, ADDER_SSE2
//
//   void sums_4x2(const word *x, const word *w, int order, int steps, int32_t sums[8])
//
// adds up |x - w| of bytes for 4 pixels and 2 filters: sums[4 * f + p]. A step of `order` takes `n` words of each filter,
// w = {word 0 of filter 0, word 0 of filter 1, word 1 of filter 0, ...}; word j of pixel p is x[offset[j] + p]:
//   order          n   offset         x advances by
//   ORDER_TAPS     4   0, 4, 8, 12    16 words
//   ORDER_ROWS_1   3   0, 1, 2        6 words: columns 0 ... 5 of the tile
//   ORDER_ROWS_2   3   0, 5, 1        9 words: columns 0 2 4 6 8, then 1 3 5 7
//
// A target that computes all filters of a tile at once, sums and epilogue, defines ADDER_TILES and
//   struct tile; int start_tiles(layer, word *x, word *beside, struct tile *)    once a layer: whether it has this layer
//   void run_tile(layer, struct tile *, const word *w, void *y, const void *residual, int32_t at)
// for tiles of four pixels; y's element `at` is the first pixel and filter of the group whose weights are w.
//
// Activations are NHWC, tight; bytes, or float32. x, y, residual and scratch are aligned to 4 bytes, except those of
// lookup() and quantize(). Names are the literature's: H, W, C of the input; OH, OW; KH, KW.

#ifndef ADDER_LAYERS_H
#define ADDER_LAYERS_H
#include <stdint.h>

#define USES_BYTES 0x1  // forms
#define USES_QUANTIZED 0x2
#define USES_FLOATS 0x4
#define USES_SUMS 0x8
#define USES_INTEGERS 0x10
#define USES_FORMS 0x1f
#define USES_RESIDUALS 0x20  // of bytes
#define USES_FLOAT_RESIDUALS 0x40
#define USES_SHORTCUTS 0x80
#define USES_CLAMPS 0x100  // of bytes to less than 0 ... 255
#define USES_TAPS 0x200    // orders
#define USES_ROWS_1 0x400
#define USES_ROWS_2 0x800
#define USES_WIDE_TAPS 0x1000       // ORDER_TAPS: windows of more than one column
#define USES_ZERO_WORDS 0x2000      // behind the words of a filter
#define USES_ODD_CHANNELS 0x4000    // channels of a group: no multiple of 4
#define USES_GROUPS 0x8000          // of an adder_conv: more than one
#define USES_WRAPPED_TILES 0x10000  // ORDER_TAPS: tiles that end in another row of y than they begin
#define USES_BORDERS 0x20000        // windows of an adder_conv that reach outside of x
#define USES_RINGS 0x40000
#define USES_LEFT_TILES 0x80000       // adder_conv leaves tiles to finish()
#define USES_LEFT_DEPTHWISE 0x100000  // and adder_depthwise all of them
#define USES_WINDOWS_27 0x200000      // multiply_conv: 3 x 3 pixels of 3 channels, without dilation

#ifndef ADDER_USES
#define ADDER_USES 0x3fffff
#define ADDER_FINISHES ADDER_USES
#endif
#define USES(what) ((ADDER_USES & USES_##what) != 0)

// z = b + a * (float)sum, product rounded, then the sum; then, with a residual R, z + residual_scale * R. Then by form:
//   FORM_BYTES     y = clamp(round(z), least, most)                             uint8; zero_point is not used
//   FORM_QUANTIZED y = clamp(round(z * inverse) + zero_point, least, most)      uint8
//   FORM_FLOATS    y = z, or with relu max(z, 0)                                float32
//   FORM_SUMS      y[co] += clamp(round(z * inverse), -bound, bound)            int32, one for each filter, over all pixels
// a = -scale and b = offset of an adder layer; a = scale and b = bias (-0.0 if none) of one that multiplies.
//
// Fixed-point epilogue: v = (c + m * sum + residual_m * (8 * R)) >> (32 - shift) in int64, arithmetic shift. Then
//   FORM_BYTES     y = clamp(v, least, most)
//   FORM_INTEGERS  y = v, or with relu max(v, 0)                                int32
//   FORM_SUMS      y[co] += clamp(v, -bound, bound); with relu clamp(v, 0, bound)
//   FORM_FLOATS    float32, a and b as above in the first two words of the constants; without residual (logits)
// FORM_SUMS with relu clamps to 0 ... bound in both.
enum { FORM_BYTES, FORM_QUANTIZED, FORM_FLOATS, FORM_SUMS, FORM_INTEGERS };
// RESIDUAL_SHORTCUT: R is z of the layer `shortcut`; the argument `residual` is then that layer's input. Fixed-point: its
// c + m * sum is added as it is (the exporter folds residual_scale into c and m).
enum { RESIDUAL_NONE, RESIDUAL_BYTES, RESIDUAL_FLOATS, RESIDUAL_SHORTCUT };

struct output {
  uint8_t form, residual, relu, zero_point, least, most, shift;
  int32_t bound;
  float residual_scale, inverse;
  int32_t residual_m;
};

struct window {
  uint16_t height, width, channels;         // of x
  uint16_t out_height, out_width, filters;  // of y
  uint16_t kernel_height, kernel_width, stride_y, stride_x, dilation_y, dilation_x, top, left;
  uint8_t outside;  // the byte that stands for what is outside of x
};

enum { ORDER_TAPS, ORDER_ROWS_1, ORDER_ROWS_2 };

// weights: for each group, for each pair of its filters (an odd last one with a filter of zeros): `words` words of each
// filter, interleaved word by word, then the constants of both filters:
//   float32: a0, b0, a1, b1 as bit patterns;  fixed-point: c0 low, c0 high, m0, 0, c1 low, c1 high, m1, 0
// Order of a filter's words: ORDER_TAPS (ky, kx, channel word), each tap's C / groups bytes padded by zeros to words, then
// zero words up to a multiple of 4; ORDER_ROWS_1, _2 (ky, channel word, kx), without padding: KW 3, dilation_x 1,
// stride_x 1 or 2, C / groups a multiple of 4.
//
// ring: 0 if y does not overlap x, or if each tile only overwrites pixels that it or one before it has copied: a window of one
// pixel, stride 1, one group, no more bytes a pixel of y than of x, y starts where x starts. Else y starts where x starts, ring = (KH - 1) * dilation_y + 1, and for each row oy
//   (oy + 1) * OW * filters * sizeof y <= W * C * min(H, oy * stride_y - top + ring).
// y may be the residual; with RESIDUAL_SHORTCUT it must not overlap the residual. FORM_SUMS: y overlaps nothing.
//
// Scratch in bytes, for every target:
//   x of a tile      16 * words (ORDER_TAPS), 24 * KH * C / groups / 4 (ORDER_ROWS_1), 36 * ... (ORDER_ROWS_2)
//   shortcut's x     16 * shortcut->words
//   ring             ring * W * C, rounded up to 4
struct adder_conv {
  const uint32_t* weights;
  const struct adder_conv* shortcut;  // ORDER_TAPS, groups 1, no ring; its output rule is not used
  struct window window;
  uint16_t groups, words, ring;
  uint8_t order;
  struct output output;
};

// Groups of one channel, one filter each: filters = channels, KH * KW <= 257.
// weights: for each four channels: KH * KW words (ky, kx), byte i for channel i; then the constants of four filters.
// Missing channels are zeros (weights and constants). y may be x or the residual, or neither.
// Scratch: 4 + 4 * ((OH - 1) * stride_y + (KH - 1) * dilation_y + 1) * ((OW - 1) * stride_x + (KW - 1) * dilation_x + 1) bytes.
struct adder_depthwise {
  const uint32_t* weights;
  struct window window;
  struct output output;
};

// sum = constant + sum_k X * W in int32; constant = -zero_point * sum_k W, outside = zero_point.
// weights: for each pair of filters (an odd last one with zeros): `words` words of each filter, interleaved word by word, a
// word two terms as int16 (the first in the low half); then the int32 constants of both, then the epilogue's constants.
// Order of the terms: (ky, kx, channel), then zeros up to a multiple of 4 terms: words is even.
// y does not overlap x; it may be the residual. A linear layer is a window of 1 x 1 pixels.
// Scratch: 16 * words bytes (x of a tile).
struct multiply_conv {
  const uint32_t* weights;
  struct window window;
  uint16_t words;
  struct output output;
};

// max_pool: bytes; what is outside counts as 0, which is less than or equal to all. y may be x if top = left = 0.
// sum_pool: sums of a window in int32 (outside counts as 0), then
//   y = clamp(round((float)sum * factor) + zero_point, least, most) (FORM_BYTES) or (float)sum * factor (FORM_FLOATS)
// input: POOL_FLOATS     u = clamp(round(x * inverse), -bound, bound)
//        POOL_BYTES      the same of x = scale * (float)(X - zero) (product rounded)
//        POOL_INTEGERS   u = x, int32. Sums of FORM_SUMS are a window of one pixel.
// y does not overlap x. divisors: none; a window that reaches outside is divided like any other (count_include_pad).
enum { POOL_FLOATS, POOL_BYTES, POOL_INTEGERS };

struct sum_pool {
  struct window window;
  uint8_t input, form, zero, zero_point, least, most;
  int32_t bound;
  float scale, inverse, factor;
};

// Functions (static, in the generated file):
//   adder_conv(const struct adder_conv *, const uint8_t *x, void *y, const void *residual, void *scratch)
//   adder_depthwise(const struct adder_depthwise *, const uint8_t *x, void *y, const void *residual, void *scratch)
//   multiply_conv(const struct multiply_conv *, const uint8_t *x, void *y, const void *residual, void *scratch)
//   max_pool(const struct window *, const uint8_t *x, uint8_t *y)
//   sum_pool(const struct sum_pool *, const void *x, void *y)
//   quantize(const float *x, uint8_t *y, int32_t n, float inverse, int zero_point, int least, int most); y may start at x
//   dequantize(const uint8_t *x, float *y, int32_t n, float scale, int zero_point)   (float)(X - zero_point) * scale
//   add_floats(const float *a, const float *b, float *y, int32_t n); relu_floats(const float *x, float *y, int32_t n)
//   lookup(const uint8_t *x, uint8_t *y, int32_t n, const uint8_t *tables, int channels)
//     y[i] = tables[256 * (i % channels) + x[i]]; y may be x

#endif
