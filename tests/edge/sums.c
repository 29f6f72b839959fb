// A program: sums_4x2, and on AArch64 sums_of_pairs, against plain sums, for random and for the largest bytes. Returns 0 if they agree.
// Follows layers.h, prelude.c, an epilogue and all sums_*.c.

static int offset_of(int order, int j) {
  return order == ORDER_TAPS ? 4 * j : order == ORDER_ROWS_1 ? j : j == 1 ? 5 : j / 2;
}

static void fill(word* to, int n, int mode) {
  static uint32_t state = 1;
  for (int i = 0; i < n; i++) {
    state = state * 1664525u + 1013904223u;
    to[i] = mode < 0 ? state ^ state >> 15 : mode ? 0xffffffffu : 0;
  }
}

static word x[16 * 720], w[2 * 8 * 720], *const v = w + 8 * 720;
#ifdef ADDER_TILES
static word room[4 * 2100 + 48];
#endif

static int differ(int order, int steps) {
  const int n = order == ORDER_TAPS ? 4 : 3, advance = order == ORDER_TAPS ? 16 : order == ORDER_ROWS_1 ? 6 : 9;
  int32_t expected[16] = {0}, got[16];
  int wrong = 0;
  for (int i = 0; i < n * steps; i++) {
    for (int f = 0; f < 4; f++) {
      for (int p = 0; p < 4; p++) {
        const uint32_t a = x[i / n * advance + offset_of(order, i % n) + p], b = (f < 2 ? w : v)[2 * i + f % 2];
        for (int k = 0; k < 32; k += 8) {
          const int32_t d = (int32_t)(a >> k & 255) - (int32_t)(b >> k & 255);
          expected[4 * f + p] += d < 0 ? -d : d;
        }
      }
    }
  }
  sums_4x2(x, w, order, steps, got);
  sums_4x2(x, v, order, steps, got + 8);
  for (int i = 0; i < 16; i++) wrong += got[i] != expected[i];
#ifdef ADDER_TILES
  spread_tile(x, order, n * steps, order == ORDER_TAPS ? x : room);
  sums_of_pairs(order == ORDER_TAPS ? x : room, w, v, n * steps, got);
  for (int i = 0; i < 16; i++) wrong += got[i] != expected[i];
#endif
  return wrong;
}

static int run(void) {
  int wrong = 0;
  for (int mode = -1; mode < 2; mode++) {
    for (int order = 0; order < 3; order++) {
      for (int steps = 1; steps < 700; steps += steps < 16 ? 1 : steps < 140 ? 31 : 277) {
        fill(x, 16 * 720, mode), fill(w, 16 * 720, mode < 0 ? mode : !mode);
        wrong += differ(order, steps);
      }
    }
  }
  return wrong != 0;
}

#ifdef NO_LIBC
void* memset(void* to, int value, __SIZE_TYPE__ n);
void* memset(void* to, int value, __SIZE_TYPE__ n) {
  for (volatile uint8_t* at = (volatile uint8_t*)to; n > 0; n--) *at++ = (uint8_t)value;
  return to;
}
#endif

#if defined(NO_LIBC) && defined(__i386__)
__attribute__((force_align_arg_pointer)) void _start(void) {
  __asm__ volatile("int $0x80" : : "a"(1), "b"(run()));
  for (;;) {
  }
}
#elif defined(NO_LIBC) && defined(__arm__)
void _start(void) {
  register int result __asm__("r0") = run();
  register int exit __asm__("r7") = 1;
  __asm__ volatile("svc #0" : : "r"(result), "r"(exit));
  for (;;) {
  }
}
#else
int main(void) { return run(); }
#endif
