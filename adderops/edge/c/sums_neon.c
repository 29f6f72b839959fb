// The micro-kernel for NEON: a vector is one word of each of the four pixels, against one word of a filter in all lanes.
//
// uabd takes 16 differences of bytes, uadalp adds them in pairs to lanes of 16 bits. A lane grows by up to 2 * 255 each time,
// so it holds 128 of them; then it is added to lanes of 32 bits. AArch64 has a larger one, see sums_neon_tiles.c.

#if ADDER_TARGET == ADDER_NEON
#define NEON_TURNS 128

static MAYBE_UNUSED void sums_4x2(const word* x, const word* w, int order, int steps, int32_t sums[8]) {
  const int n = order == ORDER_TAPS ? 4 : 3, advance = order == ORDER_TAPS ? 16 : order == ORDER_ROWS_1 ? 6 : 9;
  const int second = order == ORDER_TAPS ? 4 : order == ORDER_ROWS_1 ? 1 : 5;
  const int third = order == ORDER_TAPS ? 8 : order == ORDER_ROWS_1 ? 2 : 1;
  const int offset[4] = {0, second, third, 12};
  uint32x4_t total0 = vdupq_n_u32(0), total1 = total0;
  while (steps > 0) {
    int turn = steps < NEON_TURNS / 4 ? steps : NEON_TURNS / 4;
    uint16x8_t sum0 = vdupq_n_u16(0), sum1 = sum0;
    for (steps -= turn; turn > 0; turn--, x += advance) {
      for (int j = 0; j < n; j++, w += 2) {
        const uint8x16_t pixels = vreinterpretq_u8_u32(vld1q_u32(x + offset[j]));
        sum0 = vpadalq_u8(sum0, vabdq_u8(pixels, vreinterpretq_u8_u32(vld1q_dup_u32(w))));
        sum1 = vpadalq_u8(sum1, vabdq_u8(pixels, vreinterpretq_u8_u32(vld1q_dup_u32(w + 1))));
      }
    }
    total0 = vpadalq_u16(total0, sum0), total1 = vpadalq_u16(total1, sum1);
  }
  vst1q_s32(sums, vreinterpretq_s32_u32(total0)), vst1q_s32(sums + 4, vreinterpretq_s32_u32(total1));
}
#endif
