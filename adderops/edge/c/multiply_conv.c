// The int8 convolution of the ends (first layer, classifier): sum[p][co] = constant[co] + sum_k X[p][k] * W[co][k].
//
// Terms are pairs of int16, one word of x against one of w (SMLAD): bytes of x are widened when a tile is gathered, weights
// by the exporter. Tile of four pixels x two filters as in adder_conv.c. See layers.h.
//
// Cycles of a Cortex-M4: 38 for 32 products, and 120 for a tile's epilogue; widening takes about 13 for 4 bytes.

#ifdef ADDER_DOTS
static void products_4x2(const word* x, const word* w, int words, int32_t sums[8]) {
  call_dot(before(x, 4), before(w, 4), dot_products, (uint32_t)((uintptr_t)(x + 4 * words) - 4), sums);
}
#else
static ALWAYS_INLINE int32_t products(uint32_t x, uint32_t w) {
#if ADDER_TARGET == ADDER_M_INTRINSICS
  return (int32_t)__smuad((int16x2_t)x, (int16x2_t)w);
#else
  const int32_t low = (int32_t)(w & 0xffff), high = (int32_t)(w >> 16);
  return (int32_t)(x & 0xffff) * (low - (low >> 15 << 16)) + (int32_t)(x >> 16) * (high - (high >> 15 << 16));
#endif
}

static void products_4x2(const word* x, const word* w, int words, int32_t sums[8]) {
  const word* constants = w + 2 * words;
  for (int i = 0; i < 8; i++) sums[i] = (int32_t)constants[i >> 2];
  for (; words > 0; words--, x += 4, w += 2)
    for (int p = 0; p < 4; p++) sums[p] += products(x[p], w[0]), sums[4 + p] += products(x[p], w[1]);
}
#endif

#ifdef ADDER_DOTS
// The 27 terms of n windows of 3 x 3 pixels of 3 channels, all inside of x: r0 to, r1 the first window, r2 bytes of a row of x,
// r3 bytes from window to window; stack: n. A row of nine bytes is two words and a byte, a word is two pairs of terms: 64
// cycles a window, if words at any address cost no more.
// clang-format off
#define PAIRS(word, first, second) \
  LINE("uxtb16 r10, " word) LINE("uxtb16 r11, " word ", ror #8") LINE("pkhbt " word ", r10, r11, lsl #16") \
  LINE("pkhtb r10, r11, r10, asr #16") LINE("str " word ", [r0, #" #first "]") LINE("str r10, [r0, #" #second "]")
NAKED static void windows_of_27(word *to __attribute__((unused)), const uint8_t *from __attribute__((unused)),
                                int32_t length __attribute__((unused)), int32_t step __attribute__((unused)),
                                int n __attribute__((unused))) {
  __asm__ volatile(
      LINE("push {r4-r11, lr}") "1:\n\t" LINE("add r12, r1, r2") LINE("add lr, r1, r2, lsl #1")
      LINE("ldr r4, [r1]") LINE("ldr r5, [r1, #4]") LINE("ldrb r6, [r1, #8]")
      LINE("ldrb r7, [r12]") LINE("ldr r8, [r12, #1]") LINE("ldr r9, [r12, #5]") LINE("add r1, r3")
      PAIRS("r4", 0, 16) PAIRS("r5", 32, 48) LINE("orr r6, r6, r7, lsl #16") LINE("str r6, [r0, #64]")
      PAIRS("r8", 80, 96) PAIRS("r9", 112, 128)
      LINE("ldr r4, [lr]") LINE("ldr r5, [lr, #4]") LINE("ldrb r6, [lr, #8]") LINE("ldr r7, [sp, #36]")
      PAIRS("r4", 144, 160) PAIRS("r5", 176, 192) LINE("str r6, [r0, #208]") LINE("adds r0, #4")
      LINE("subs r7, #1") LINE("str r7, [sp, #36]") LINE("bne.w 1b") LINE("pop {r4-r11, pc}"));
}
#undef PAIRS
// clang-format on
#endif

// Appends n bytes to the k terms of a pixel, two in every fourth word; from null: n times `outside`.
static SMALL int append(word* to, int k, const uint8_t* from, int n, uint32_t outside) {
  const int end = k + n;
  to += 4 * (k >> 1);
  if (!from) {
    for (; k < end; k++) {
      *to = k & 1 ? *to | outside << 16 : outside;
      if (k & 1) to += 4;
    }
    return end;
  }
  if (k & 1 && n > 0) *to |= (uint32_t)*from++ << 16, to += 4, n--;
  for (; n >= 4; n -= 4, from += 4, to += 8) {
    const uint32_t bytes = from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
    const uint32_t even = bytes & 0x00ff00ffu, odd = bytes >> 8 & 0x00ff00ffu;
    to[0] = (even & 0xffff) | odd << 16, to[4] = even >> 16 | (odd & 0xffff0000u);
  }
  for (; n >= 2; n -= 2, from += 2, to += 4) *to = from[0] | (uint32_t)from[1] << 16;
  if (n) *to = from[0];
  return end;
}

static SMALL void gather_terms(const struct window* window, const uint8_t* x, int32_t iy, int32_t ix, int words,
                               word* to) {
  const int c = window->channels, kernel = window->kernel_width, dilation = window->dilation_x;
  int k = 0;
  for (int ky = 0; ky < window->kernel_height; ky++, iy += window->dilation_y) {
    const int inside = (uint32_t)iy < window->height;
    const uint8_t* row = x + (inside ? iy * window->width * c : 0);
    for (int kx = 0, n; kx < kernel; kx += n) {  // columns that are alike, inside or outside of x
      const int32_t at = ix + kx * dilation, beyond = at < 0 ? 0 : window->width;
      n = dilation > 1 ? 1 : inside && at < window->width ? (int)(beyond - at) : kernel;
      if (n > kernel - kx) n = kernel - kx;
      k = append(to, k, inside && (uint32_t)at < window->width ? row + at * c : 0, n * c, window->outside);
    }
  }
  for (k = (k + 1) >> 1; k < words; k++) to[4 * k] = 0;
}

static SMALL void multiply_conv(const struct multiply_conv* layer, const uint8_t* x, void* y, const void* residual,
                                void* scratch) {
  const struct window* window = &layer->window;
  const int filters = window->filters, words = layer->words;
  const int32_t pixels = (int32_t)window->out_height * window->out_width;
  int32_t iy = -window->top, ix = -window->left;
  int ox = 0;
  word* const tile = (word*)scratch;
#ifdef ADDER_DOTS
  const int small = USES(WINDOWS_27) && window->channels == 3 && window->kernel_height == 3 &&
                    window->kernel_width == 3 && window->dilation_x == 1 && window->dilation_y == 1;
#endif
#ifdef ADDER_PAIRS
  struct tile fused;
  const int tiles = has_pairs(&layer->output, filters, filters);
  set_mode(&layer->output, &fused);
  fused.x = before(tile, 4), fused.filters = filters, fused.function = dot_products;
  fused.counter = (uint32_t)((uintptr_t)(tile + 4 * words) - 4);
#endif
  if (USES(SUMS) && layer->output.form == FORM_SUMS)
    for (int co = 0; co < filters; co++) ((integer*)y)[co] = 0;
  for (int32_t pixel = 0; pixel < pixels; pixel += 4) {
    const int count = pixels - pixel < 4 ? (int)(pixels - pixel) : 4;
    const uint32_t* w = layer->weights;
    for (int p = 0; p < count; p++) {
#ifdef ADDER_DOTS
      const int32_t inner = window->width - 3 - ix;  // how far windows may move to the right
      if (small && ix >= 0 && inner >= 0 && iy >= 0 && iy + 3 <= window->height) {
        const int here = p == 0 && count == 4 && ox + 4 <= window->out_width && inner >= 3 * window->stride_x ? 4 : 1;
        windows_of_27(tile + p, x + (iy * window->width + ix) * 3, window->width * 3, window->stride_x * 3, here);
        if (here == 4) {
          ix += 4 * window->stride_x, ox += 4;
          if (ox == window->out_width) ox = 0, ix = -window->left, iy += window->stride_y;
          break;
        }
      } else
#endif
        gather_terms(window, x, iy, ix, words, tile + p);
      ix += window->stride_x;
      if (++ox == window->out_width) ox = 0, ix = -window->left, iy += window->stride_y;
    }
#ifdef ADDER_PAIRS
    if (tiles && count == 4) {
      run_pairs(&layer->output, &fused, w, y, residual, pixel * filters, filters);
      continue;
    }
#endif
    for (int co = 0; co < filters; co += 2, w += 2 * CONSTANTS) {
      int32_t sums[8];
      products_4x2(tile, w, words, sums);
      w += 2 * words + 2;
      finish(&layer->output, w, sums, 0, 0, count, filters - co < 2 ? 1 : 2, residual, pixel * filters + co, filters,
             co, y);
    }
  }
}
