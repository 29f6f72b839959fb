// The micro-kernel for Cortex-M with the DSP extension, in assembly: one USADA8 for four terms. See layers.h.
//
// Tile of 4 pixels x 2 filters; all 14 registers are in use, so the loops stand in naked functions:
//   r0  x, less a bias   r4 ... r7   sums of filter 0, pixels 0 ... 3   r2, r3    two words of x
//   r1  w, less 4        r8 ... r11  sums of filter 1                   r12, lr   a word of both filters
// The loop counts in the top byte of r4, from -steps up to the carry: a sum of 256 steps is less than 2^24.
//
// Cycles of a Cortex-M4 per step: loads are grouped, because a load takes 2 cycles, but 1 right after another one.
//   ORDER_TAPS    8 groups of loads, 24 words  32 USADA8 + 32 loads + 4 = 68 for 128 terms    224 bytes of code
//   ORDER_ROWS_1  6 groups, 14 words           24 USADA8 + 20 loads + 2 = 46 for  96 terms    308, two steps a turn
//   ORDER_ROWS_2  6 groups, 16 words           24 USADA8 + 22 loads + 2 = 48 for  96 terms    336, two steps a turn
//
// A dot is a subroutine of its own convention: r0, r1 as above, r4 = -steps << 24; it returns the sums in r4 ... r11 and r1
// behind the weights, less 4; r0, r2, r3, r12, lr are lost, the stack and the floating-point registers are not touched.

#if ADDER_TARGET == ADDER_M_ASSEMBLY
#define ADDER_DOTS 1
// clang-format off
#define NAKED __attribute__((naked, noinline, unused))
#define LINE(text) text "\n\t"
#define CLEAR         \
  LINE("movs r5, #0") \
  LINE("movs r6, #0") \
  LINE("movs r7, #0") LINE("mov.w r8, #0") LINE("mov.w r9, #0") LINE("mov.w r10, #0") LINE("mov.w r11, #0")
#define X(a, b) LINE("ldr r2, [r0, #" #a "]") LINE("ldr r3, [r0, #" #b "]")
#define X_LAST(a, b) LINE("ldr r2, [r0, #" #a "]") LINE("ldr r3, [r0, #" #b "]!")
#define W(a, b) LINE("ldr r12, [r1, #" #a "]") LINE("ldr lr, [r1, #" #b "]")
#define W_LAST(a, b) LINE("ldr r12, [r1, #" #a "]") LINE("ldr lr, [r1, #" #b "]!")
#define PIXEL(op, f0, f1, x) LINE(op " r" #f0 ", " #x ", r12, r" #f0) LINE(op " r" #f1 ", " #x ", lr, r" #f1)
#define PIXEL_0(op, x) PIXEL(op, 4, 8, x)
#define PIXEL_1(op, x) PIXEL(op, 5, 9, x)
#define PIXEL_2(op, x) PIXEL(op, 6, 10, x)
#define PIXEL_3(op, x) PIXEL(op, 7, 11, x)
#define SAD "usada8"
#define MAC "smlad"
#define AGAIN LINE("adds.w r4, r4, #0x1000000") LINE("bcc.w 1b")

NAKED static void dot_taps(void) {
  __asm__ volatile(
      LINE("push {lr}") CLEAR LINE(".p2align 2")
      "1:\n\t"
      X(4, 8)        W(4, 8)        PIXEL_0(SAD, r2) PIXEL_1(SAD, r3)
      X(12, 16)                     PIXEL_2(SAD, r2) PIXEL_3(SAD, r3)
      X(20, 24)      W(12, 16)      PIXEL_0(SAD, r2) PIXEL_1(SAD, r3)
      X(28, 32)                     PIXEL_2(SAD, r2) PIXEL_3(SAD, r3)
      X(36, 40)      W(20, 24)      PIXEL_0(SAD, r2) PIXEL_1(SAD, r3)
      X(44, 48)                     PIXEL_2(SAD, r2) PIXEL_3(SAD, r3)
      X(52, 56)      W_LAST(28, 32) PIXEL_0(SAD, r2) PIXEL_1(SAD, r3)
      X_LAST(60, 64)                PIXEL_2(SAD, r2) PIXEL_3(SAD, r3)
      AGAIN LINE("pop {pc}"));
}

// Two steps a turn; an odd number of them begins with the second.
#define TWICE(step) \
  LINE("push {lr}") \
  CLEAR \
  LINE("lsls r2, r4, #7") \
  LINE("bmi.w 3f") \
  LINE(".p2align 2") \
  "1:\n\t" step \
  "2:\n\t" step \
  LINE("adds.w r4, r4, #0x2000000") \
  LINE("bcc.w 1b") \
  LINE("pop {pc}") \
  "3:\n\t" \
  LINE("sub.w r4, r4, #0x1000000") \
  LINE("b.w 2b")

#define ROWS_1_STEP \
  X(4, 12)       W(4, 8)        PIXEL_0(SAD, r2) PIXEL_2(SAD, r3) \
  X(8, 16)                      PIXEL_1(SAD, r2) PIXEL_3(SAD, r3) \
                 W(12, 16)      PIXEL_0(SAD, r2) PIXEL_2(SAD, r3) \
  X(12, 20)                     PIXEL_1(SAD, r2) PIXEL_3(SAD, r3) \
                 W_LAST(20, 24) PIXEL_0(SAD, r2) PIXEL_2(SAD, r3) \
  X_LAST(16, 24)                PIXEL_1(SAD, r2) PIXEL_3(SAD, r3)

NAKED static void dot_rows_1(void) {
  __asm__ volatile(TWICE(ROWS_1_STEP));
}

// x of this one is biased by 16 the other way: its last word to load is column 8.
#define ROWS_2_STEP \
  X(4, 8)        W(12, 16)      PIXEL_0(SAD, r2) PIXEL_1(SAD, r3) \
  X(12, 16)                     PIXEL_2(SAD, r2) PIXEL_3(SAD, r3) \
  X(-16, -12)    W(4, 8)        PIXEL_0(SAD, r2) PIXEL_1(SAD, r3) \
  X(-8, -4)                     PIXEL_2(SAD, r2) PIXEL_3(SAD, r3) \
                 W_LAST(20, 24) PIXEL_1(SAD, r2) PIXEL_2(SAD, r3) \
  LINE("ldr r2, [r0, #-12]") LINE("ldr r3, [r0], #36") PIXEL_0(SAD, r2) PIXEL_3(SAD, r3)

NAKED static void dot_rows_2(void) {
  __asm__ volatile(TWICE(ROWS_2_STEP));
}

// Sums of products of int16, two a word: r4 is the end of x, less 4. The integer constants of both filters follow the weights.
NAKED static void dot_products(void) {
  __asm__ volatile(
      LINE("push {r4, lr}") LINE("movs r4, #0") CLEAR LINE(".p2align 2")
      "1:\n\t"
      X(4, 8)        W(4, 8)        PIXEL_0(MAC, r2) PIXEL_1(MAC, r3)
      X(12, 16)                     PIXEL_2(MAC, r2) PIXEL_3(MAC, r3)
      X(20, 24)      W_LAST(12, 16) PIXEL_0(MAC, r2) PIXEL_1(MAC, r3)
      X_LAST(28, 32)                PIXEL_2(MAC, r2) PIXEL_3(MAC, r3)
      LINE("ldr r2, [sp]") LINE("cmp r0, r2") LINE("bne.w 1b")
      LINE("ldr r2, [r1, #4]") LINE("ldr r3, [r1, #8]!")
      LINE("add r4, r2") LINE("add r5, r2") LINE("add r6, r2") LINE("add r7, r2")
      LINE("add r8, r3") LINE("add r9, r3") LINE("add r10, r3") LINE("add r11, r3") LINE("pop {r2, pc}"));
}
// clang-format on

typedef void dot(void);

static ALWAYS_INLINE dot* dot_of(int order) {
  return is_taps(order) ? dot_taps : is_rows_1(order) ? dot_rows_1 : dot_rows_2;
}

// The pointer `bytes` before x, which may be before its array.
static ALWAYS_INLINE const word* before(const word* x, int bytes) {
  return (const word*)((uintptr_t)x - (uintptr_t)bytes);
}

static ALWAYS_INLINE const word* biased(const word* x, int order) {
  return order == ORDER_ROWS_2 ? x + 4 : before(x, 4);
}

// Calls a dot from C. r0 ... r3, stack: x and w with their bias, the dot, r4, where the sums go.
NAKED static void call_dot(const word* x __attribute__((unused)), const word* w __attribute__((unused)),
                           dot* function __attribute__((unused)), uint32_t counter __attribute__((unused)),
                           int32_t* sums __attribute__((unused))) {
  __asm__ volatile(LINE("push {r4-r11, lr}") LINE("mov r4, r3") LINE("blx r2") LINE("ldr r0, [sp, #36]")
                       LINE("stmia.w r0, {r4-r11}") LINE("pop {r4-r11, pc}"));
}

static SMALL void sums_4x2(const word* x, const word* w, int order, int steps, int32_t sums[8]) {
  const int advance = 256 * (order == ORDER_TAPS ? 16 : order == ORDER_ROWS_1 ? 6 : 9);
  int32_t part[8];
  for (int i = 0; i < 8; i++) sums[i] = 0;
  for (; steps > 0; steps -= 256, x += advance, w += 256 * (order == ORDER_TAPS ? 8 : 6)) {
    call_dot(biased(x, order), before(w, 4), dot_of(order), 0u - ((uint32_t)(steps < 256 ? steps : 256) << 24), part);
    for (int i = 0; i < 8; i++) sums[i] += part[i];
  }
}
#endif
