// The micro-kernel for Cortex-M with the DSP extension, by ACLE intrinsics: one USADA8 for four terms. See layers.h.
//
// Tile of 4 pixels x 2 filters: 8 sums, 2 pointers, 2 + 2 words are all 14 registers. So the loop counts in the top byte of a
// sum, and each order has a function of its own. Which sums stay in registers is the compiler's choice; two things guide it.
// Reads are volatile, so they stay in groups: a load takes 2 cycles, but 1 right after another one. And no instruction passes
// a FENCE, or words would be loaded before there are registers for them. Where fences and counters stand was tried out.
//
// Cycles of a Cortex-M4 per step, gcc 12 -O2 (assembly): ORDER_TAPS 72 (68), ORDER_ROWS_1 51 (48), ORDER_ROWS_2 53 (50).

#if ADDER_TARGET == ADDER_M_INTRINSICS
#ifdef __GNUC__
#define HOT __attribute__((noinline, hot, unused))  // for speed, though functions for size call it
#define FENCE __atomic_signal_fence(__ATOMIC_SEQ_CST)
#else
#define HOT
#define FENCE (void)0
#endif

#define DISTANCES(p, q)                                         \
  s##p = __usada8(x0, w0, s##p), t##p = __usada8(x0, w1, t##p); \
  s##q = __usada8(x1, w0, s##q), t##q = __usada8(x1, w1, t##q)
#define LESS_ONE_STEP(sum) (sum -= 1u << 24)
#define STORE()                                                                               \
  sums[0] = (int32_t)s0, sums[1] = (int32_t)s1, sums[2] = (int32_t)s2, sums[3] = (int32_t)s3; \
  sums[4] = (int32_t)t0, sums[5] = (int32_t)t1, sums[6] = (int32_t)t2, sums[7] = (int32_t)t3

// count: of steps, 1 ... 255, << 24
typedef void dot(const volatile word* x, const volatile word* w, uint32_t count, int32_t sums[8]);

static HOT void dot_taps(const volatile word* x, const volatile word* w, uint32_t count, int32_t sums[8]) {
  uint32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = count, x0, x1, w0, w1;
  do {
    x0 = x[0], x1 = x[1], w0 = w[0], w1 = w[1];
    DISTANCES(0, 1);
    x0 = x[2], x1 = x[3];
    FENCE;
    DISTANCES(2, 3);
    x0 = x[4], x1 = x[5], w0 = w[2], w1 = w[3];
    FENCE;
    DISTANCES(0, 1);
    FENCE;
    x0 = x[6], x1 = x[7];
    DISTANCES(2, 3);
    FENCE;
    x0 = x[8], x1 = x[9], w0 = w[4], w1 = w[5];
    DISTANCES(0, 1);
    FENCE;
    x0 = x[10], x1 = x[11];
    FENCE;
    DISTANCES(2, 3);
    FENCE;
    x0 = x[12], x1 = x[13], w0 = w[6], w1 = w[7];
    DISTANCES(0, 1);
    FENCE;
    x0 = x[14], x1 = x[15], x += 16, w += 8;
    FENCE;
    DISTANCES(2, 3);
    FENCE;
  } while (LESS_ONE_STEP(t3) >> 24);
  STORE();
}

static HOT void dot_rows_1(const volatile word* x, const volatile word* w, uint32_t count, int32_t sums[8]) {
  uint32_t s0 = 0, s1 = 0, s2 = 0, s3 = 0, t0 = count, t1 = 0, t2 = 0, t3 = 0, x0, x1, w0, w1;
  do {
    w0 = w[0], w1 = w[1], x0 = x[0], x1 = x[2];
    FENCE;
    DISTANCES(0, 2);
    FENCE;
    x0 = x[1], x1 = x[3];
    FENCE;
    DISTANCES(1, 3);
    FENCE;
    w0 = w[2], w1 = w[3];
    FENCE;
    DISTANCES(0, 2);
    FENCE;
    x0 = x[2], x1 = x[4];
    FENCE;
    DISTANCES(1, 3);
    FENCE;
    w0 = w[4], w1 = w[5];
    FENCE;
    DISTANCES(0, 2);
    FENCE;
    x0 = x[3], x1 = x[5], x += 6, w += 6;
    FENCE;
    DISTANCES(1, 3);
    FENCE;
  } while (LESS_ONE_STEP(t0) >> 24);
  STORE();
}

static HOT void dot_rows_2(const volatile word* x, const volatile word* w, uint32_t count, int32_t sums[8]) {
  uint32_t s0 = count, s1 = 0, s2 = 0, s3 = 0, t0 = 0, t1 = 0, t2 = 0, t3 = 0, x0, x1, w0, w1;
  do {
    x0 = x[5], x1 = x[6], w0 = w[2], w1 = w[3];
    FENCE;
    DISTANCES(0, 1);
    LESS_ONE_STEP(s0);
    x0 = x[7], x1 = x[8];
    FENCE;
    DISTANCES(2, 3);
    x0 = x[0], x1 = x[1], w0 = w[0], w1 = w[1];
    FENCE;
    DISTANCES(0, 1);
    FENCE;
    x0 = x[2], x1 = x[3];
    FENCE;
    DISTANCES(2, 3);
    w0 = w[4], w1 = w[5];
    DISTANCES(1, 2);
    FENCE;
    x0 = x[1], x1 = x[4], x += 9, w += 6;
    FENCE;
    DISTANCES(0, 3);
    FENCE;
  } while (s0 >> 24);
  STORE();
}
#undef STORE
#undef LESS_ONE_STEP
#undef DISTANCES

static ALWAYS_INLINE dot* dot_of(int order) {
  return is_taps(order) ? dot_taps : is_rows_1(order) ? dot_rows_1 : dot_rows_2;
}

static SMALL void sums_4x2(const word* x, const word* w, int order, int steps, int32_t sums[8]) {
  int32_t part[8];
  for (int i = 0; i < 8; i++) sums[i] = 0;
  for (; steps > 0; steps -= 255, x += 255 * span_of(order) * (is_taps(order) ? 4 : 1)) {
    dot_of(order)(x, w, (uint32_t)(steps < 255 ? steps : 255) << 24, part);
    for (int i = 0; i < 8; i++) sums[i] += part[i];
    w += 255 * (is_taps(order) ? 8 : 6);
  }
}

#if !ADDER_EPILOGUE_INTEGER
#define ADDER_TILES 1

struct tile {
  const word* x;
  dot* function;
  uint32_t count;
};

// Whether the layer's outputs are bytes that need no other clamp, in pairs.
static SMALL int start_tiles(const struct adder_conv* layer, const word* x, const word* beside MAYBE_UNUSED,
                             struct tile* tile) {
  const int steps = layer->words / (is_taps(layer->order) ? 4 : 3);
  tile->x = x, tile->function = dot_of(layer->order), tile->count = (uint32_t)steps << 24;
  return steps <= 255 && is_plain(&layer->output) &&
         layer->window.filters / (USES(GROUPS) ? layer->groups : 1) % 2 == 0;
}

static HOT void run_tile(const struct adder_conv* layer, struct tile* tile, const word* w, void* y,
                         const void* residual, int32_t at) {
  const struct output* rule = &layer->output;
  const word* const x = tile->x;
  dot* const function = tile->function;
  const uint32_t count = tile->count;
  const int32_t step = layer->window.filters;
  const int words = 2 * layer->words;
  uint8_t* to = (uint8_t*)y + at;
  const uint8_t* from = USES(RESIDUALS) && rule->residual == RESIDUAL_BYTES ? (const uint8_t*)residual + at : 0;
  for (int f = layer->window.filters / (USES(GROUPS) ? layer->groups : 1); f > 0; f -= 2, to += 2) {
    int32_t sums[8];
    function(x, w, count, sums);
    w += words;
    four_bytes(rule, w, sums, from, step, to);
    four_bytes(rule, w + CONSTANTS, sums + 4, from ? from + 1 : 0, step, to + 1);
    w += 2 * CONSTANTS;
    if (from) from += 2;
  }
}
#endif
#undef FENCE
#undef HOT
#endif
