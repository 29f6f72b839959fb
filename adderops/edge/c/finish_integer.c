// The fixed-point epilogue: v = (c + m * sum + residual_m * (8 * R)) >> (32 - shift) in int64, clamped. It needs no FPU.
//
// The shift is an arithmetic one, written so that C99 defines it. FORM_FLOATS (logits) is the float32 epilogue.
// constants of a filter: c low, c high, m, 0 (4 words); with FORM_FLOATS: a, b as bit patterns, 0, 0.

#define CONSTANTS 4

static ALWAYS_INLINE uint64_t affine(const uint32_t* constants, int32_t sum) {
  const uint64_t c = (uint64_t)constants[1] << 32 | constants[0];
  return c + (uint64_t)((int64_t)(int32_t)constants[2] * sum);
}

static ALWAYS_INLINE int32_t high_half(uint64_t v) {
  const uint32_t high = (uint32_t)(v >> 32);
  return high < 0x80000000u ? (int32_t)high : -(int32_t)~high - 1;
}

// Stores the output element `at` of filter co from c + m * sum.
static ALWAYS_INLINE void put(const struct output* rule, uint64_t v, const void* residual, int32_t at, int co,
                              void* y) {
  int32_t least = rule->least, most = rule->most, u;
  if (USES(RESIDUALS) && rule->residual == RESIDUAL_BYTES)
    v += (uint64_t)((int64_t)rule->residual_m * (8 * ((const uint8_t*)residual)[at]));
  u = high_half(v << rule->shift);
  if (USES(INTEGERS) && rule->form == FORM_INTEGERS) {
    ((integer*)y)[at] = rule->relu && u < 0 ? 0 : u;
    return;
  }
  if (USES(SUMS) && rule->form == FORM_SUMS) least = rule->relu ? 0 : -rule->bound, most = rule->bound;
  u = u < least ? least : u > most ? most : u;
  if (USES(SUMS) && rule->form == FORM_SUMS)
    ((integer*)y)[co] += u;
  else
    ((uint8_t*)y)[at] = (uint8_t)u;
}

// Whether `four_bytes` has this output rule: most layers.
static ALWAYS_INLINE int is_plain(const struct output* rule) {
  return rule->form == FORM_BYTES && rule->residual <= RESIDUAL_BYTES;
}

// One filter's bytes in four pixels; residual: those of the same elements, or null.
static ALWAYS_INLINE void four_bytes(const struct output* rule, const uint32_t* constants, const int32_t* sums,
                                     const uint8_t* residual, int32_t step, uint8_t* to) {
  for (int p = 0; p < 4; p++) put(rule, affine(constants, sums[p]), residual, p * step, 0, to);
}

// Stores a tile of `pixels` x `filters` outputs from sums[4 * f + p]. `at` is the element of pixel 0 and filter co, `step`
// the number of elements from pixel to pixel. beside: the same of the shortcut, with its constants; or null.
static SMALL void finish(const struct output* rule, const uint32_t* constants, const int32_t* sums,
                         const uint32_t* beside_constants, const int32_t* beside, int pixels, int filters,
                         const void* residual, int32_t at, int32_t step, int co, void* y) {
  for (int f = 0; f < filters; f++) {
    const uint32_t* own = constants + CONSTANTS * f;
    for (int p = 0; p < pixels; p++) {
      const int32_t sum = sums[4 * f + p];
      if (USES(FLOATS) && rule->form == FORM_FLOATS) {
        ((real*)y)[at + p * step + f] = from_bits(own[1]) + rounded(from_bits(own[0]) * (float)sum);
      } else {
        uint64_t v = affine(own, sum);
        if (USES(SHORTCUTS) && beside) v += affine(beside_constants + CONSTANTS * f, beside[4 * f + p]);
        put(rule, v, residual, at + p * step + f, co + f, y);
      }
    }
  }
}
