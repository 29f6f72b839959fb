// The depthwise adder convolution: sum[p][c] = sum_k |X[p][k][c] - W[k][c]|, then the output rule. See layers.h.
//
// Four channels a word. For each word of channels, the plane of x with its outside is copied to scratch, then all outputs of
// these channels are computed, so y may be x. Sums of channels 0 ... 3 stand at sums[0], [4], [1], [5]: `finish` takes two
// filters at a time.
//
// 3 x 3 to bytes in assembly (Cortex-M with DSP and FPU): a plane for each of the four channels, so that three taps of a row
// are one word less its last byte, at any address: a USADA8 for three terms. A tile is a column of four outputs:
//
//   rows of x  0 1 2 3 4 5       r2, r3, r12   w of rows 0, 1, 2        r4 ... r7   sums of the four outputs
//   output 0   + + +             r0            x of row 0, column ox    r8 ... r10  x of three rows
//   output 1     + + +           r1            bytes of a row           r11         y; lr: rows 3 to 5
//   output 2       + + +
//   output 3         + + +       stride 1: 27 cycles, stride 2 (nine rows): 35; + 37 epilogue + 9 loop, for 36 terms
//
// Loads at addresses that are no multiple of 4 are counted like others; a Cortex-M4 takes a cycle more for them.

#ifdef ADDER_PAIRS
struct column {  // in the order in which the assembly loads it
  const uint8_t* x;
  int32_t pitch;
  uint32_t weights[3];
  uint8_t* y;
  int32_t row, pixel;  // bytes from row to row and from pixel to pixel of y
  uint8_t* end;
  int32_t stride;
  float a, b;
};

// clang-format off
#define ROWS(base) \
  LINE("ldr r8, [" base "]") LINE("ldr r9, [" base ", r1]") LINE("ldr r10, [" base ", r1, lsl #1]") \
  LINE("bic r8, r8, #0xff000000") LINE("bic r9, r9, #0xff000000") LINE("bic r10, r10, #0xff000000")
#define FIRST(sum, x) LINE("usad8 " sum ", " x ", r2")
#define SECOND(sum, x) LINE("usada8 " sum ", " x ", r3, " sum)
#define THIRD(sum, x) LINE("usada8 " sum ", " x ", r12, " sum)
#define COLUMN_ENTER LINE("push {r4-r11, lr}") LINE("ldm r0!, {r4-r8, r11}") LINE("vldmia r0, {s10-s15}") \
  LINE("mov r0, r4") LINE("mov r1, r5") LINE("mov r2, r6") LINE("mov r3, r7") LINE("mov r12, r8") "1:\n\t"
#define COLUMN_LEAVE \
  LINE("vmov r8, s10") LINE("vmov r9, s13") Z(0, 1, 2, 3, 4, 5, 6, 7, 14, 15) ROUND(0, 1, 2, 3, 4, 5, 6, 7) \
  LINE("add r10, r11, r8, lsl #1") LINE("add r0, r9") LINE("vmov r9, s11") \
  LINE("strb r4, [r11]") LINE("strb r5, [r11, r8]") LINE("strb r6, [r10]") LINE("strb r7, [r10, r8]") \
  LINE("add r11, r9") LINE("vmov r10, s12") LINE("cmp r11, r10") LINE("bne.w 1b") LINE("pop {r4-r11, pc}")

// Four rows of outputs, from column 0 on.
NAKED static void columns_stride_1(const struct column *column __attribute__((unused))) {
  __asm__ volatile(
      COLUMN_ENTER ROWS("r0") LINE("add lr, r0, r1") FIRST("r4", "r8") FIRST("r5", "r9") FIRST("r6", "r10")
      LINE("add lr, lr, r1, lsl #1") SECOND("r4", "r9") SECOND("r5", "r10") THIRD("r4", "r10")
      ROWS("lr") SECOND("r6", "r8") THIRD("r5", "r8") FIRST("r7", "r8") THIRD("r6", "r9") SECOND("r7", "r9")
      THIRD("r7", "r10") COLUMN_LEAVE);
}

NAKED static void columns_stride_2(const struct column *column __attribute__((unused))) {
  __asm__ volatile(
      COLUMN_ENTER ROWS("r0") LINE("add lr, r0, r1") FIRST("r4", "r8") SECOND("r4", "r9") THIRD("r4", "r10")
      LINE("add lr, lr, r1, lsl #1") FIRST("r5", "r10")
      ROWS("lr") SECOND("r5", "r8") THIRD("r5", "r9") FIRST("r6", "r9") LINE("add lr, lr, r1") SECOND("r6", "r10")
      LINE("add lr, lr, r1, lsl #1") "nop\n\t"
      ROWS("lr") THIRD("r6", "r8") FIRST("r7", "r8") SECOND("r7", "r9") THIRD("r7", "r10") COLUMN_LEAVE);
}
// clang-format on

// Rows of four channels to rows of four planes of bytes, four pixels at a time: r0 to, r1 from, r2 bytes from pixel to pixel,
// r3 bytes of a plane; stack: rows; the pixels of a row, in fours, less the last four; how far `to` and `from` go back before
// these, which may overlap those before; and how far to the next row. 35 cycles for 16 bytes, and 21 a row.
// clang-format off
NAKED static void split_rows(uint8_t *to __attribute__((unused)), const uint8_t *from __attribute__((unused)),
                             int32_t step __attribute__((unused)), int32_t plane __attribute__((unused)),
                             int rows __attribute__((unused)), int fours __attribute__((unused)),
                             int back_to __attribute__((unused)), int32_t back_from __attribute__((unused)),
                             int next_to __attribute__((unused)), int32_t next_from __attribute__((unused))) {
  __asm__ volatile(
      LINE("push {r4-r11, lr}")
      "1:\n\t"
      LINE("ldr r12, [sp, #40]") LINE("cmp r12, #0") LINE("beq.w 3f")
      "2:\n\t"
      LINE("add lr, r1, r2")
      LINE("ldr r4, [r1]") LINE("ldr r5, [r1, r2]") LINE("ldr r6, [r1, r2, lsl #1]") LINE("ldr r7, [lr, r2, lsl #1]")
      LINE("add r1, r1, r2, lsl #2")
      LINE("uxtb16 r8, r4") LINE("uxtb16 r9, r5") LINE("uxtb16 r4, r4, ror #8") LINE("uxtb16 r5, r5, ror #8")
      LINE("orr r8, r8, r9, lsl #8") LINE("orr r4, r4, r5, lsl #8")
      LINE("uxtb16 r9, r6") LINE("uxtb16 r10, r7") LINE("uxtb16 r6, r6, ror #8") LINE("uxtb16 r7, r7, ror #8")
      LINE("orr r9, r9, r10, lsl #8") LINE("orr r6, r6, r7, lsl #8")
      LINE("add lr, r0, r3")
      LINE("pkhbt r10, r8, r9, lsl #16") LINE("pkhtb r9, r9, r8, asr #16")
      LINE("pkhbt r11, r4, r6, lsl #16") LINE("pkhtb r6, r6, r4, asr #16")
      LINE("str r11, [r0, r3]") LINE("str r9, [r0, r3, lsl #1]") LINE("str r6, [lr, r3, lsl #1]") LINE("str r10, [r0], #4")
      LINE("subs r12, r12, #1") LINE("bgt.w 2b") LINE("blt.w 4f")
      "3:\n\t"
      LINE("ldr r4, [sp, #44]") LINE("ldr r5, [sp, #48]") LINE("subs r0, r0, r4") LINE("subs r1, r1, r5") LINE("b.w 2b")
      "4:\n\t"
      LINE("ldr r4, [sp, #52]") LINE("ldr r5, [sp, #56]") LINE("ldr r6, [sp, #36]")
      LINE("add r0, r4") LINE("add r1, r5") LINE("subs r6, r6, #1") LINE("str r6, [sp, #36]") LINE("bne.w 1b")
      LINE("pop {r4-r11, pc}"));
}
// clang-format on

// All outputs in assembly, or none: 0.
static NOINLINE int depthwise_tiles(const struct adder_depthwise* layer, const uint8_t* x, uint8_t* y, int height,
                                    int width, uint8_t* planes) {
  const struct window* window = &layer->window;
  const struct output* rule = &layer->output;
  const int channels = window->channels, stride = window->stride_y, whole = rule->least == 0 && rule->most == 255;
  const int32_t row = (int32_t)window->out_width * channels, plane = height * width;
  const int n = width - window->left < window->width ? width - window->left : window->width;  // pixels of a row to copy
  const uint32_t* w = layer->weights;
  const int rows = height - window->top < window->height ? height - window->top : window->height;
  struct column column;
  if (window->kernel_height != 3 || window->kernel_width != 3 || window->dilation_x != 1 || window->dilation_y != 1)
    return 0;
  if (stride > 2 || window->out_height < 4 || rule->form != FORM_BYTES || rule->residual != RESIDUAL_NONE) return 0;
  if (channels % 4 != 0 || n < 4 || rows < 1) return 0;
  column.pitch = width, column.row = row, column.pixel = channels, column.stride = window->stride_x;
  for (int32_t i = 0; i < 4 * plane; i++) planes[i] = window->outside;
  for (int c = 0; c < channels; c += 4, w += 9 + 4 * CONSTANTS) {
    split_rows(planes + window->top * width + window->left, x + c, channels, plane, rows, (n - 1) >> 2, -n & 3,
               (-n & 3) * channels, width - n, (window->width - n) * channels);
    for (int i = 0; i < 4; i++) {
      for (int ky = 0; ky < 3; ky++)
        column.weights[ky] =
            (w[3 * ky] >> 8 * i & 255) | (w[3 * ky + 1] >> 8 * i & 255) << 8 | (w[3 * ky + 2] >> 8 * i & 255) << 16;
      column.a = from_bits(w[9 + CONSTANTS * i]), column.b = from_bits(w[10 + CONSTANTS * i]);
      for (int oy = 0; oy < window->out_height; oy += 4) {
        const int at =
            oy + 4 <= window->out_height ? oy : window->out_height - 4;  // the last tile repeats some outputs
        column.x = planes + i * plane + at * stride * width;
        column.y = y + at * row + c + i, column.end = column.y + row;
        if (stride == 1)
          columns_stride_1(&column);
        else
          columns_stride_2(&column);
      }
    }
  }
  if (USES(CLAMPS) && !whole) clamp_bytes(y, row * window->out_height, rule->least, rule->most);
  return 1;
}
#endif

// sums[0], [4], [1], [5] of four channels from the words of x and w.
#if ADDER_TARGET == ADDER_M_ASSEMBLY || ADDER_TARGET == ADDER_M_INTRINSICS
#define LANES 1
#endif

static NOINLINE void depthwise_sums(const struct window* window, const word* x, const uint32_t* w, int width,
                                    int32_t sums[8]) {
  const int32_t step = window->dilation_y * width;
#ifdef LANES
  uint32_t low = 0, high = 0;  // channels 0 and 2, 1 and 3: 16 bits each
#else
  int32_t a = 0, b = 0, c = 0, d = 0;
#endif
  for (int ky = window->kernel_height; ky > 0; ky--, x += step) {
    const word* from = x;
    for (int kx = window->kernel_width; kx > 0; kx--, from += window->dilation_x, w++) {
#ifdef LANES
      const uint32_t distance = __uqsub8(*from, *w) | __uqsub8(*w, *from);
      low = __uxtab16(low, distance), high = __uxtab16(high, distance >> 8 | distance << 24);
#else
      const int32_t e = (int32_t)(*from & 255) - (int32_t)(*w & 255),
                    f = (int32_t)(*from >> 8 & 255) - (int32_t)(*w >> 8 & 255);
      const int32_t g = (int32_t)(*from >> 16 & 255) - (int32_t)(*w >> 16 & 255),
                    h = (int32_t)(*from >> 24) - (int32_t)(*w >> 24);
      a += e < 0 ? -e : e, b += f < 0 ? -f : f, c += g < 0 ? -g : g, d += h < 0 ? -h : h;
#endif
    }
  }
#ifdef LANES
  sums[0] = (int32_t)(low & 0xffff), sums[4] = (int32_t)(high & 0xffff);
  sums[1] = (int32_t)(low >> 16), sums[5] = (int32_t)(high >> 16);
#else
  sums[0] = a, sums[4] = b, sums[1] = c, sums[5] = d;
#endif
}

static SMALL void adder_depthwise(const struct adder_depthwise* layer, const uint8_t* x, void* y, const void* residual,
                                  void* scratch) {
  const struct window* window = &layer->window;
  const int channels = window->channels, taps = window->kernel_height * window->kernel_width;
  const int height = (window->out_height - 1) * window->stride_y + (window->kernel_height - 1) * window->dilation_y + 1;
  const int width = (window->out_width - 1) * window->stride_x + (window->kernel_width - 1) * window->dilation_x + 1;
  const uint32_t* w = layer->weights;
  word* const plane = (word*)scratch;
#ifdef ADDER_PAIRS
  if (depthwise_tiles(layer, x, (uint8_t*)y, height, width, (uint8_t*)scratch) || !LEFT(DEPTHWISE)) return;
#endif
  if (USES(SUMS) && layer->output.form == FORM_SUMS)
    for (int co = 0; co < channels; co++) ((integer*)y)[co] = 0;
  for (int c = 0; c < channels; c += 4, w += taps + 4 * CONSTANTS) {
    const int n = channels - c < 4 ? channels - c : 4;
    word* to = plane;
    for (int iy = -window->top; iy < height - window->top; iy++) {
      for (int ix = -window->left; ix < width - window->left; ix++, to++) {
        const int inside = iy >= 0 && iy < window->height && ix >= 0 && ix < window->width;
        const uint8_t* from = inside ? x + ((int32_t)iy * window->width + ix) * channels + c : 0;
        *to = 0;
        for (int i = 0; i < n; i++) *to |= (uint32_t)(from ? from[i] : window->outside) << 8 * i;
      }
    }
    for (int oy = 0; oy < window->out_height; oy++) {
      for (int ox = 0; ox < window->out_width; ox++) {
        const int32_t at = ((int32_t)oy * window->out_width + ox) * channels + c;
        int32_t sums[8];
        depthwise_sums(window, plane + (int32_t)oy * window->stride_y * width + ox * window->stride_x, w, width, sums);
        for (int i = 0; i < n; i += 2)
          finish(&layer->output, w + taps + CONSTANTS * i, sums + i / 2, 0, 0, 1, n - i < 2 ? 1 : 2, residual, at + i,
                 0, c + i, y);
      }
    }
  }
}
