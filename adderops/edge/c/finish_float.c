// The float32 epilogue: z = b + a * (float)sum, + residual_scale * R, then a byte, a float or a term of a pool's sum.
//
// Each product is rounded before it is added, in the order of the operators, so the results are theirs, bit for bit.
// constants of a filter: a, b as bit patterns (2 words).

#define CONSTANTS 2

static ALWAYS_INLINE float affine(const uint32_t* constants, int32_t sum) {
  return from_bits(constants[1]) + rounded(from_bits(constants[0]) * (float)sum);
}

// Whether `four_bytes` has this output rule: most layers.
static ALWAYS_INLINE int is_plain(const struct output* rule) {
  return rule->form == FORM_BYTES && rule->residual <= RESIDUAL_BYTES && rule->least == 0 && rule->most == 255;
}

// One filter's bytes in four pixels; residual: those of the same elements, or null.
static ALWAYS_INLINE void four_bytes(const struct output* rule, const uint32_t* constants, const int32_t* sums,
                                     const uint8_t* residual, int32_t step, uint8_t* to) {
  float z0 = affine(constants, sums[0]), z1 = affine(constants, sums[1]);
  float z2 = affine(constants, sums[2]), z3 = affine(constants, sums[3]);
  if (residual) {
    const float scale = rule->residual_scale;
    z0 += rounded(scale * (float)residual[0]), z1 += rounded(scale * (float)residual[step]);
    z2 += rounded(scale * (float)residual[2 * step]), z3 += rounded(scale * (float)residual[3 * step]);
  }
  to[0] = nearest_byte(z0), to[step] = nearest_byte(z1);
  to[2 * step] = nearest_byte(z2), to[3 * step] = nearest_byte(z3);
}

// Stores a tile of `pixels` x `filters` outputs from sums[4 * f + p]. `at` is the element of pixel 0 and filter co, `step`
// the number of elements from pixel to pixel. beside: the same of the shortcut, with its constants; or null.
static SMALL void finish(const struct output* rule, const uint32_t* constants, const int32_t* sums,
                         const uint32_t* beside_constants, const int32_t* beside, int pixels, int filters,
                         const void* residual, int32_t at, int32_t step, int co, void* y) {
  const int form = FINISHES(BYTES) || FINISHES(QUANTIZED) || FINISHES(SUMS) ? rule->form : FORM_FLOATS;
  const int kind = rule->residual;  // copies: what y points to might be the rule, for all C knows
  const int32_t zero = form == FORM_QUANTIZED ? rule->zero_point : 0;
  const int32_t least = form != FORM_SUMS ? rule->least - zero : rule->relu ? 0 : -rule->bound;
  const int32_t most = form != FORM_SUMS ? rule->most - zero : rule->bound;
  const float scale = rule->residual_scale, inverse = rule->inverse, below = rule->relu ? 0.0f : -3.402823466e38f;
  for (int f = 0; f < filters; f++, at++, co++, constants += CONSTANTS) {
    int32_t total = 0, element = at;
    for (int p = 0; p < pixels; p++, element += step) {
      float z = affine(constants, sums[4 * f + p]);
      if (FINISHES(RESIDUALS) && kind == RESIDUAL_BYTES)
        z += rounded(scale * (float)((const uint8_t*)residual)[element]);
      else if (FINISHES(FLOAT_RESIDUALS) && kind == RESIDUAL_FLOATS)
        z += rounded(scale * ((const real*)residual)[element]);
      else if (FINISHES(SHORTCUTS) && beside)
        z += rounded(scale * affine(beside_constants + CONSTANTS * f, beside[4 * f + p]));
      if (FINISHES(FLOATS) && form == FORM_FLOATS) {
        ((real*)y)[element] = z < below ? below : z;
        continue;
      }
      if (form != FORM_BYTES) z = rounded(z * inverse);
      const int32_t u = nearest(z, least, most);
      if (FINISHES(SUMS) && form == FORM_SUMS)
        total += u;
      else
        ((uint8_t*)y)[element] = (uint8_t)(zero + u);
    }
    if (FINISHES(SUMS) && form == FORM_SUMS) ((integer*)y)[co] += total;
  }
}
