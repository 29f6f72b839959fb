// The micro-kernel in C99: sums[4 * f + p] = sum |x - w| over the bytes of four pixels and two filters. See layers.h.

#if ADDER_TARGET == ADDER_C
static ALWAYS_INLINE int32_t distance(uint32_t x, uint32_t w) {
  int32_t sum = 0;
  for (int i = 0; i < 32; i += 8) {
    const int32_t d = (int32_t)(x >> i & 255) - (int32_t)(w >> i & 255);
    sum += d < 0 ? -d : d;
  }
  return sum;
}

static void sums_4x2(const word* x, const word* w, int order, int steps, int32_t sums[8]) {
  const int n = order == ORDER_TAPS ? 4 : 3, advance = order == ORDER_TAPS ? 16 : order == ORDER_ROWS_1 ? 6 : 9;
  for (int i = 0; i < 8; i++) sums[i] = 0;
  for (; steps > 0; steps--, x += advance) {
    for (int j = 0; j < n; j++, w += 2) {
      const int offset = order == ORDER_TAPS ? 4 * j : order == ORDER_ROWS_1 ? j : j == 1 ? 5 : j / 2;
      for (int p = 0; p < 4; p++)
        sums[p] += distance(x[offset + p], w[0]), sums[4 + p] += distance(x[offset + p], w[1]);
    }
  }
}
#endif
