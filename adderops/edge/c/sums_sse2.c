// The micro-kernel for SSE2: psadbw adds up the differences of eight bytes. See layers.h.
//
//   x vectors of word j and j + 1, a word of each pixel   ->   unpacked: two words of pixels 0, 1; two words of pixels 2, 3
//   w: words j, j + 1 of both filters                     ->   shuffled: two words of filters 0, 1; two words of filters 1, 0
//
// so that psadbw gives the sums of pixel 0 with filter 0 and pixel 1 with filter 1, then those crosswise.

#if ADDER_TARGET == ADDER_SSE2
static ALWAYS_INLINE void add_words(__m128i first, __m128i second, __m128i w, __m128i totals[4]) {
  const __m128i low = _mm_unpacklo_epi32(first, second), high = _mm_unpackhi_epi32(first, second);
  const __m128i along = _mm_shuffle_epi32(w, 0xd8), across = _mm_shuffle_epi32(w, 0x8d);
  totals[0] = _mm_add_epi32(totals[0], _mm_sad_epu8(low, along));
  totals[1] = _mm_add_epi32(totals[1], _mm_sad_epu8(low, across));
  totals[2] = _mm_add_epi32(totals[2], _mm_sad_epu8(high, along));
  totals[3] = _mm_add_epi32(totals[3], _mm_sad_epu8(high, across));
}

static ALWAYS_INLINE __m128i load(const word* from) { return _mm_loadu_si128((const __m128i*)from); }

static MAYBE_UNUSED void sums_4x2(const word* x, const word* w, int order, int steps, int32_t sums[8]) {
  __m128i totals[4] = {_mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128(), _mm_setzero_si128()};
  if (order == ORDER_TAPS) {
    for (; steps > 0; steps--, x += 16, w += 8) {
      add_words(load(x), load(x + 4), load(w), totals);
      add_words(load(x + 8), load(x + 12), load(w + 4), totals);
    }
  } else {
    const int advance = order == ORDER_ROWS_1 ? 6 : 9, second = order == ORDER_ROWS_1 ? 1 : 5,
              third = order == ORDER_ROWS_1 ? 2 : 1;
    for (; steps > 0; steps--, x += advance, w += 6) {
      add_words(load(x), load(x + second), load(w), totals);
      add_words(load(x + third), _mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)(w + 4)), totals);
    }
  }
  for (int p = 0; p < 4; p += 2) {
    int32_t parts[8];
    _mm_storeu_si128((__m128i*)parts, totals[p]), _mm_storeu_si128((__m128i*)(parts + 4), totals[p + 1]);
    sums[p] = parts[0], sums[p + 5] = parts[2], sums[p + 4] = parts[4], sums[p + 1] = parts[6];
  }
}
#endif
