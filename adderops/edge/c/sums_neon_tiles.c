// All filters of a tile for AArch64: a vector is four words of one pixel, or of one filter.
//
//                  pixel 0  1  2  3       16 sums in 16 registers, in each 8 lanes of 16 bits
//   pair w, filter 0     s  s  s  s
//           filter 1     s  s  s  s       a step: 4 words of each pixel (LD1) and of each filter (LD2 parts a pair),
//   pair v, filter 0     s  s  s  s       256 terms in 37 instructions: 3 loads, 16 uabd, 16 uadalp, 2 for the loop
//           filter 1     s  s  s  s
//
// So the words of a tile are spread first, once for all filters: four words of pixel 0, of pixel 1 ... With the dot product the
// loop would be the same: it multiplies.

#if ADDER_TARGET == ADDER_NEON && defined(__aarch64__) && defined(__GNUC__)
#define ADDER_TILES 1

#ifndef ADDER_ROWS_WORDS
#define ADDER_ROWS_WORDS 1152  // the most words of a layer in ORDER_ROWS that is spread: 16 bytes of stack for each
#endif

// In assembly, because sums, x, w and differences take all registers: gcc 12 moves every uabd before the first uadalp, until
// sums spill, which makes 42 instructions of the 37. A uadalp follows its uabd by eight instructions, for processors that
// keep the order. v0-v3: x, v4-v7: w, v8-v15: differences, v16-v31: sums.
#define NEON_UABD(w, d0, d1, d2, d3)                                                                                  \
  "uabd v" #d0 ".16b, v0.16b, v" #w ".16b\n uabd v" #d1 ".16b, v1.16b, v" #w ".16b\n uabd v" #d2 ".16b, v2.16b, v" #w \
  ".16b\n uabd v" #d3 ".16b, v3.16b, v" #w ".16b\n"
#define NEON_UADALP(s0, s1, s2, s3, d0, d1, d2, d3)                                                 \
  "uadalp v" #s0 ".8h, v" #d0 ".16b\n uadalp v" #s1 ".8h, v" #d1 ".16b\n uadalp v" #s2 ".8h, v" #d2 \
  ".16b\n uadalp v" #s3 ".8h, v" #d3 ".16b\n"
#define NEON_ZERO(s0, s1, s2, s3) \
  "movi v" #s0 ".4s, #0\n movi v" #s1 ".4s, #0\n movi v" #s2 ".4s, #0\n movi v" #s3 ".4s, #0\n"
#define NEON_ACROSS(y, s0, s1, s2, s3)                                                                     \
  "uaddlp v" #s0 ".4s, v" #s0 ".8h\n uaddlp v" #s1 ".4s, v" #s1 ".8h\n uaddlp v" #s2 ".4s, v" #s2          \
  ".8h\n"                                                                                                  \
  "uaddlp v" #s3 ".4s, v" #s3 ".8h\n addp v" #s0 ".4s, v" #s0 ".4s, v" #s1 ".4s\n addp v" #s2 ".4s, v" #s2 \
  ".4s, v" #s3 ".4s\n addp v" #y ".4s, v" #s0 ".4s, v" #s2 ".4s\n"

// sums[4 * f + p] of up to NEON_TURNS steps: filters 0 and 1 at w, 2 and 3 at v. x: for each step four words of each pixel.
static ALWAYS_INLINE void sums_4x4(const word* x, const word* w, const word* v, int32_t steps, int32_t* sums) {
  __asm__ volatile(
        NEON_ZERO(16, 17, 18, 19) NEON_ZERO(20, 21, 22, 23) NEON_ZERO(24, 25, 26, 27) NEON_ZERO(28, 29, 30, 31)
        "1:\n"
        "ld1 {v0.16b, v1.16b, v2.16b, v3.16b}, [%[x]], #64\n"
        "ld2 {v4.4s, v5.4s}, [%[w]], #32\n"
        "ld2 {v6.4s, v7.4s}, [%[v]], #32\n"
        "subs %w[steps], %w[steps], #1\n"
        NEON_UABD(4, 8, 9, 10, 11)
        NEON_UABD(5, 12, 13, 14, 15)
        NEON_UADALP(16, 17, 18, 19, 8, 9, 10, 11)
        NEON_UABD(6, 8, 9, 10, 11)
        NEON_UADALP(20, 21, 22, 23, 12, 13, 14, 15)
        NEON_UABD(7, 12, 13, 14, 15)
        NEON_UADALP(24, 25, 26, 27, 8, 9, 10, 11)
        NEON_UADALP(28, 29, 30, 31, 12, 13, 14, 15)
        "b.ne 1b\n"
        NEON_ACROSS(0, 16, 17, 18, 19)
        NEON_ACROSS(1, 20, 21, 22, 23)
        NEON_ACROSS(2, 24, 25, 26, 27)
        NEON_ACROSS(3, 28, 29, 30, 31)
        "st1 {v0.4s, v1.4s, v2.4s, v3.4s}, [%[sums]]\n"
        : [x] "+r"(x), [w] "+r"(w), [v] "+r"(v), [steps] "+r"(steps)
        : [sums] "r"(sums)
        : "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17",
          "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30", "v31", "cc", "memory");
}

// Four words of each pixel, from vectors of one word of each pixel at x + offset.
static ALWAYS_INLINE void store_step(const word* x, int offset0, int offset1, int offset2, int offset3, word* to) {
  uint32x4x4_t words;
  words.val[0] = vld1q_u32(x + offset0), words.val[1] = vld1q_u32(x + offset1);
  words.val[2] = vld1q_u32(x + offset2), words.val[3] = vld1q_u32(x + offset3);
  vst4q_u32(to, words);
}

// Four groups of three words: three steps. In a group of `span` words, a pixel's second and third word are at b and c.
static ALWAYS_INLINE void store_groups(const word* x, int span, int b, int c, word* to) {
  store_step(x, 0, b, c, span, to);
  store_step(x, span + b, span + c, 2 * span, 2 * span + b, to + 16);
  store_step(x, 2 * span + c, 3 * span, 3 * span + b, 3 * span + c, to + 32);
}

static ALWAYS_INLINE void store_rows(const word* x, int groups, int span, int b, int c, word* to) {
  word rest[36] = {0};
  for (; groups >= 4; groups -= 4, x += 4 * span, to += 48) store_groups(x, span, b, c, to);
  if (!groups) return;
  for (int i = 0; i < groups * span; i++) rest[i] = x[i];
  store_groups(rest, span, b, c, to);
}

// From the order of scratch to that of sums_4x4, `words` of each pixel and up to 11 of zeros after them. Of ORDER_TAPS: in place.
static void spread_tile(const word* x, int order, int words, word* to) {
  if (order == ORDER_ROWS_1) store_rows(x, words / 3, 6, 1, 2, to);
  if (order == ORDER_ROWS_2) store_rows(x, words / 3, 9, 5, 1, to);
  if (order == ORDER_TAPS)
    for (; words > 0; words -= 4, x += 16, to += 16) store_step(x, 0, 4, 8, 12, to);
}

// The sums of two pairs of filters. The words of ORDER_ROWS need not be whole steps: the last one reads copies of them.
static MAYBE_UNUSED void sums_of_pairs(const word* x, const word* w, const word* v, int words, int32_t* sums) {
  int32_t part[16], *to = sums;
  word ends[16];
  for (int steps = words / 4; words > 0; to = part) {
    int32_t turn = steps < NEON_TURNS ? steps : NEON_TURNS;
    if (!turn) {
      for (int i = 0; i < 8; i++) ends[i] = i < 2 * words ? w[i] : 0, ends[8 + i] = i < 2 * words ? v[i] : 0;
      w = ends, v = ends + 8, turn = 1;
    }
    sums_4x4(x, w, v, turn, to);
    for (int i = 0; i < 16 && to == part; i++) sums[i] += part[i];
    x += 16 * turn, w += 8 * turn, v += 8 * turn, steps -= turn, words -= 4 * turn;
  }
}

// Four outputs of each of four pixels, FORM_BYTES, from sums[4 * f + p]. `products` are rounded before they are added.
typedef uint32_t __attribute__((may_alias, aligned(1))) loose_word;

static ALWAYS_INLINE float32x4_t rounded_products(float32x4_t a, float32x4_t b) {
  float32x4_t products = vmulq_f32(a, b);
  __asm__("" : "+w"(products));
  return products;
}

struct affine4 {
  float32x4_t a, b;
};

static ALWAYS_INLINE struct affine4 affine_of(const word* w, const word* v) {
  const float32x4_t first = vreinterpretq_f32_u32(vld1q_u32(w)), second = vreinterpretq_f32_u32(vld1q_u32(v));
  const struct affine4 found = {vuzp1q_f32(first, second), vuzp2q_f32(first, second)};
  return found;
}

static ALWAYS_INLINE float32x4_t z_of(struct affine4 line, int32x4_t sums) {
  return vaddq_f32(line.b, rounded_products(line.a, vcvtq_f32_s32(sums)));
}

// The rest of the rule for FORM_BYTES: integers from the z of four filters in one pixel.
static ALWAYS_INLINE int32x4_t integers_of(const struct output* rule, float32x4_t z, float32x4_t beside,
                                           const void* residual, int32_t at) {
  const float32x4_t scale = vdupq_n_f32(rule->residual_scale);
  if (rule->residual == RESIDUAL_BYTES) {
    const loose_word bytes = *(const loose_word*)((const uint8_t*)residual + at);
    const uint16x8_t halves = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)));
    beside = vcvtq_f32_u32(vmovl_u16(vget_low_u16(halves)));
  } else if (rule->residual == RESIDUAL_FLOATS) {
    beside = vld1q_f32((const float*)residual + at);
  }
  if (rule->residual != RESIDUAL_NONE) z = vaddq_f32(z, rounded_products(scale, beside));
  return vminq_s32(vmaxq_s32(vcvtnq_s32_f32(z), vdupq_n_s32(rule->least)), vdupq_n_s32(rule->most));
}

static ALWAYS_INLINE void put_bytes(const struct output* rule, struct affine4 own, const int32_t* sums,
                                    struct affine4 other, const int32_t* beside, const void* residual, int32_t at,
                                    int32_t step, uint8_t* y) {
  const int32x4x4_t s = vld4q_s32(sums), t = vld4q_s32(beside);
  const int32x4_t p0 = integers_of(rule, z_of(own, s.val[0]), z_of(other, t.val[0]), residual, at);
  const int32x4_t p1 = integers_of(rule, z_of(own, s.val[1]), z_of(other, t.val[1]), residual, at + step);
  const int32x4_t p2 = integers_of(rule, z_of(own, s.val[2]), z_of(other, t.val[2]), residual, at + 2 * step);
  const int32x4_t p3 = integers_of(rule, z_of(own, s.val[3]), z_of(other, t.val[3]), residual, at + 3 * step);
  const int16x8_t p01 = vcombine_s16(vmovn_s32(p0), vmovn_s32(p1)), p23 = vcombine_s16(vmovn_s32(p2), vmovn_s32(p3));
  const uint32x4_t bytes = vreinterpretq_u32_s8(vcombine_s8(vmovn_s16(p01), vmovn_s16(p23)));
  *(loose_word*)(y + at) = vgetq_lane_u32(bytes, 0);
  *(loose_word*)(y + at + step) = vgetq_lane_u32(bytes, 1);
  *(loose_word*)(y + at + 2 * step) = vgetq_lane_u32(bytes, 2);
  *(loose_word*)(y + at + 3 * step) = vgetq_lane_u32(bytes, 3);
}

struct tile {
  word *x, *beside;
};

// Returns whether `run_tile` has room for the layer. Any output rule will do.
static int start_tiles(const struct adder_conv* layer, word* x, word* beside, struct tile* tile) {
  tile->x = x, tile->beside = beside;
  return layer->order == ORDER_TAPS || layer->words <= ADDER_ROWS_WORDS;
}

// One group's filters of a tile whose first pixel and filter is y's element `at`.
static void run_tile(const struct adder_conv* layer, const struct tile* tile, const word* w, void* y,
                     const void* residual, int32_t at) {
  const struct output* rule = &layer->output;
  const struct adder_conv* shortcut = layer->shortcut;
  const int32_t step = layer->window.filters, filters = step / layer->groups, co = at % step;
  const int32_t next = 2 * (layer->words + CONSTANTS);
  const int32_t next_beside = shortcut ? 2 * (shortcut->words + CONSTANTS) : 0;
  const word* beside_w = shortcut ? shortcut->weights : w;
  int32_t sums[16], beside_sums[16] = {0};
  word room[4 * ADDER_ROWS_WORDS + 48];
  word *const spread = layer->order == ORDER_TAPS ? tile->x : room, *const beside = tile->beside;
  spread_tile(tile->x, layer->order, layer->words, spread);
  if (shortcut) spread_tile(beside, ORDER_TAPS, shortcut->words, beside);
  for (int32_t f = 0; f < filters; f += 4, w += 2 * next, beside_w += 2 * next_beside) {
    const int two = f + 2 < filters;
    const word *const v = two ? w + next : w, *const beside_v = two ? beside_w + next_beside : beside_w;
    sums_of_pairs(spread, w, v, layer->words, sums);
    if (shortcut) sums_of_pairs(beside, beside_w, beside_v, shortcut->words, beside_sums);
#if !ADDER_EPILOGUE_INTEGER
    if (rule->form == FORM_BYTES && f + 4 <= filters) {
      const struct affine4 own = affine_of(w + 2 * layer->words, v + 2 * layer->words);
      const struct affine4 other =
          shortcut ? affine_of(beside_w + 2 * shortcut->words, beside_v + 2 * shortcut->words) : own;
      put_bytes(rule, own, sums, other, beside_sums, residual, at + f, step, (uint8_t*)y);
      continue;
    }
#endif
    for (int i = 0; i < 4 && f + i < filters; i += 2) {
      const word *const u = i ? v : w, *const beside_u = i ? beside_v : beside_w;
      finish(rule, u + 2 * layer->words, sums + 4 * i, shortcut ? beside_u + 2 * shortcut->words : 0,
             shortcut ? beside_sums + 4 * i : 0, 4, filters - f - i < 2 ? 1 : 2, residual, at + f + i, step, co + f + i,
             y);
    }
  }
}
#endif
