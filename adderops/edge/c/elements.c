// Element by element: floats to bytes of a grid and back, sums and ReLU of floats.

static MAYBE_UNUSED void quantize(const float* x, uint8_t* y, int32_t n, float inverse, int zero_point, int least,
                                  int most) {
  const real* from = (const real*)x;
  for (; n > 0; n--)
    *y++ = (uint8_t)(zero_point + nearest(rounded(*from++ * inverse), least - zero_point, most - zero_point));
}

static MAYBE_UNUSED void dequantize(const uint8_t* x, float* y, int32_t n, float scale, int zero_point) {
  real* to = (real*)y;
  for (; n > 0; n--) *to++ = (float)(*x++ - zero_point) * scale;
}

static MAYBE_UNUSED void add_floats(const float* a, const float* b, float* y, int32_t n) {
  const real *left = (const real*)a, *right = (const real*)b;
  real* to = (real*)y;
  for (; n > 0; n--) *to++ = *left++ + *right++;
}

static MAYBE_UNUSED void relu_floats(const float* x, float* y, int32_t n) {
  const real* from = (const real*)x;
  real* to = (real*)y;
  for (; n > 0; n--, from++) *to++ = *from < 0.0f ? 0.0f : *from;
}
