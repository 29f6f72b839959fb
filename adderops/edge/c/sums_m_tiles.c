// All filters of a tile for Cortex-M with the DSP extension and an FPU: dots and float32 epilogue in one assembly loop.
//
//   for each pair of filters: dot -> 8 sums in r4 ... r11 -> s0 ... s7 -> z -> bytes -> four halfwords of y
//
// VCVTR rounds as the FPSCR says, to nearest even. A result of the FPU is used two instructions later at the earliest, for
// one that is used at once costs a cycle more. Cycles of a Cortex-M4 besides the dot's loop, for 8 outputs: dot's call 19,
// constants 6, z 32, bytes 28, stores 9, loop and modes 13 = 107; + 50 with a residual of bytes, + 17 with `inverse`.
//
// The tile's state stays in floating-point registers, where it costs a cycle to get at instead of two:
//   s10 x   s11 y   s12 filters   s13 end of y in pixel 0   s14 dot   s15 counter of the dot   s16 mode   s17 residual
//   s18 inverse or residual_scale   of the shortcut: s19 w   s20 x   s21 counter   s22 dot   s24 ... s31 z, scaled; s23 w

#ifdef ADDER_PAIRS
#define ADDER_TILES 1

enum { MODE_BYTES = 0, MODE_RESIDUAL = 2, MODE_QUANTIZED = 4, MODE_SHORTCUT = 33, MODE_SUMS = 64 };

struct tile {  // in the order in which the assembly loads it
  const word* w;
  const word* x;
  uint8_t* y;
  int32_t filters;
  uint8_t* end;
  dot* function;
  uint32_t counter, mode;
  uintptr_t residual;  // of the element y; MODE_SUMS: bound
  float factor;        // inverse, or residual_scale
  const word* beside_w;
  const word* beside_x;
  uint32_t beside_counter;
  dot* beside_function;
  float inverse;  // of sums, read from memory, at byte 56
  uint32_t sums;  // whether they are, at byte 60
};

// clang-format off
#define EACH(op, s0, s1, s2, s3) \
  LINE(op " s" #s0 ", s" #s0) LINE(op " s" #s1 ", s" #s1) LINE(op " s" #s2 ", s" #s2) LINE(op " s" #s3 ", s" #s3)
#define EACH_BY(op, s0, s1, s2, s3, n) \
  LINE(op " s" #s0 ", s" #s0 ", s" #n) LINE(op " s" #s1 ", s" #s1 ", s" #n) \
  LINE(op " s" #s2 ", s" #s2 ", s" #n) LINE(op " s" #s3 ", s" #s3 ", s" #n)
// z of four sums: n, m are the registers of a and b
#define Z(s0, s1, s2, s3, r0, r1, r2, r3, n, m) \
  LINE("vmov s" #s0 ", s" #s1 ", r" #r0 ", r" #r1) LINE("vmov s" #s2 ", s" #s3 ", r" #r2 ", r" #r3) \
  EACH("vcvt.f32.s32", s0, s1, s2, s3) EACH_BY("vmul.f32", s0, s1, s2, s3, n) EACH_BY("vadd.f32", s0, s1, s2, s3, m)
#define ROUND(s0, s1, s2, s3, r0, r1, r2, r3) \
  EACH("vcvtr.s32.f32", s0, s1, s2, s3) \
  LINE("vmov r" #r0 ", r" #r1 ", s" #s0 ", s" #s1) LINE("vmov r" #r2 ", r" #r3 ", s" #s2 ", s" #s3) \
  LINE("usat r" #r0 ", #8, r" #r0) LINE("usat r" #r1 ", #8, r" #r1) \
  LINE("usat r" #r2 ", #8, r" #r2) LINE("usat r" #r3 ", #8, r" #r3)
#define PLUS(s, other) LINE("vadd.f32 s" #s ", s" #s ", s" #other)
#define SCALED(s, other) LINE("vmul.f32 s" #s ", s" #other ", s18")
// z += residual_scale * R of one filter, whose bytes are in r8 ... r11
#define PLUS_BYTES(s0, s1, s2, s3) \
  LINE("vmov s20, s21, r8, r9") LINE("vmov s22, s23, r10, r11") \
  EACH("vcvt.f32.u32", 20, 21, 22, 23) EACH_BY("vmul.f32", 20, 21, 22, 23, 18) \
  PLUS(s0, 20) PLUS(s1, 21) PLUS(s2, 22) PLUS(s3, 23)

#define AT_MOST_R3(r) LINE("cmp " #r ", r3") LINE("it hi") LINE("movhi " #r ", r3")
// MODE_SUMS is for relu: VCVTR to unsigned integers makes 0 of what is less.
// MODE_SHORTCUT goes through dot and z twice for each pair: first for the shortcut, in mode 33, then in mode 8.
NAKED static void tile_of_pairs(const struct tile* tile __attribute__((unused))) {
  __asm__ volatile(
      LINE("push {r0, r4-r11, lr}") LINE("vpush {s16-s31}") LINE("ldr r1, [r0], #4") LINE("vldmia r0, {s10-s22}")
      "2:\n\t"
      LINE("vmov r2, s16") LINE("lsls r2, r2, #31") LINE("bne.w 7f")
      "3:\n\t"
      LINE("vmov r0, s10") LINE("vmov r4, s15") LINE("vmov r3, s14")
      "6:\n\t"
      LINE("blx r3")
      LINE("vldr s8, [r1, #4]") LINE("vldr s9, [r1, #8]") Z(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
      LINE("vldr s8, [r1, #12]") LINE("vldr s9, [r1, #16]") LINE("adds r1, #16") Z(4, 5, 6, 7, 8, 9, 10, 11, 8, 9)
      LINE("vmov r2, s16") LINE("cmp r2, #0") LINE("bne.w 8f")
      "4:\n\t"
      ROUND(0, 1, 2, 3, 4, 5, 6, 7) ROUND(4, 5, 6, 7, 8, 9, 10, 11)
      LINE("vmov r2, s11") LINE("vmov r3, s12")
      LINE("orr r4, r4, r8, lsl #8") LINE("orr r5, r5, r9, lsl #8") LINE("add r12, r2, r3, lsl #1")
      LINE("orr r6, r6, r10, lsl #8") LINE("orr r7, r7, r11, lsl #8")
      LINE("strh r5, [r2, r3]") LINE("strh r4, [r2], #2") LINE("strh r6, [r12]") LINE("strh r7, [r12, r3]")
      LINE("vmov r3, s13") LINE("vmov s11, r2") LINE("cmp r2, r3") LINE("bne.w 2b")
      LINE("vpop {s16-s31}") LINE("pop {r0, r4-r11, pc}"));
  __asm__ volatile(  // a second text, because C99 promises 4095 characters
      "7:\n\t"
      LINE("vmov s23, r1") LINE("vmov r1, s19") LINE("vmov r0, s20") LINE("vmov r4, s21") LINE("vmov r3, s22") LINE("b.w 6b")
      "8:\n\t"
      LINE("cmp r2, #4") LINE("bcc.w 5f") LINE("beq.n 9f") LINE("cmp r2, #64") LINE("beq.n 10f")
      LINE("movs r3, #33") LINE("cmp r2, #8") LINE("vmov s16, r3") LINE("beq.n 1f")
      LINE("movs r3, #8") LINE("vmov s16, r3") LINE("vmov s19, r1") LINE("vmov r1, s23")
      SCALED(24, 0) SCALED(25, 1) SCALED(26, 2) SCALED(27, 3) SCALED(28, 4) SCALED(29, 5) SCALED(30, 6) SCALED(31, 7)
      LINE("b.w 3b")
      "1:\n\t"
      PLUS(0, 24) PLUS(1, 25) PLUS(2, 26) PLUS(3, 27) PLUS(4, 28) PLUS(5, 29) PLUS(6, 30) PLUS(7, 31)
      LINE("ldr r2, [sp, #64]") LINE("ldr r2, [r2, #60]") LINE("cmp r2, #0") LINE("beq.w 4b") LINE("b.n 10f")
      "9:\n\t"
      SCALED(0, 0) SCALED(1, 1) SCALED(2, 2) SCALED(3, 3) SCALED(4, 4) SCALED(5, 5) SCALED(6, 6) SCALED(7, 7)
      LINE("b.w 4b")
      "10:\n\t"
      LINE("ldr r2, [sp, #64]") LINE("vldr s9, [r2, #56]")
      EACH_BY("vmul.f32", 0, 1, 2, 3, 9) EACH_BY("vmul.f32", 4, 5, 6, 7, 9)
      EACH("vcvtr.u32.f32", 0, 1, 2, 3) EACH("vcvtr.u32.f32", 4, 5, 6, 7) LINE("vmov r3, s17")
      LINE("vmov r4, r5, s0, s1") LINE("vmov r6, r7, s2, s3") LINE("vmov r8, r9, s4, s5") LINE("vmov r10, r11, s6, s7")
      AT_MOST_R3(r4) AT_MOST_R3(r5) AT_MOST_R3(r6) AT_MOST_R3(r7) AT_MOST_R3(r8) AT_MOST_R3(r9) AT_MOST_R3(r10) AT_MOST_R3(r11)
      LINE("vmov r2, s11") LINE("add r4, r5") LINE("add r6, r7") LINE("ldr r5, [r2]") LINE("ldr r7, [r2, #4]")
      LINE("add r8, r9") LINE("add r10, r11") LINE("add r4, r6") LINE("add r8, r10") LINE("add r5, r4") LINE("add r7, r8")
      LINE("stmia r2!, {r5, r7}") LINE("vmov r3, s13") LINE("vmov s11, r2") LINE("cmp r2, r3") LINE("bne.w 2b")
      LINE("vpop {s16-s31}") LINE("pop {r0, r4-r11, pc}")
      "5:\n\t"
      LINE("vmov r2, s17") LINE("vmov r3, s12") LINE("adds r0, r2, #2") LINE("add r12, r2, r3, lsl #1")
      LINE("vmov s17, r0")
      LINE("ldrh r4, [r2]") LINE("ldrh r5, [r2, r3]") LINE("ldrh r6, [r12]") LINE("ldrh r7, [r12, r3]")
      LINE("uxtb r8, r4") LINE("uxtb r9, r5") LINE("uxtb r10, r6") LINE("uxtb r11, r7") PLUS_BYTES(0, 1, 2, 3)
      LINE("lsr r8, r4, #8") LINE("lsr r9, r5, #8") LINE("lsr r10, r6, #8") LINE("lsr r11, r7, #8") PLUS_BYTES(4, 5, 6, 7)
      LINE("b.w 4b"));
}
// clang-format on

// Clamps n bytes beyond what USAT did, four at a time; n is a multiple of 4.
static MAYBE_UNUSED void clamp_bytes(uint8_t* y, int32_t n, uint32_t least, uint32_t most) {
  const uint32_t below = least * 0x01010101u, above = (255 - most) * 0x01010101u, both = below + above;
  word* to = (word*)y;
  for (; n > 0; n -= 4, to++) *to = __uqsub8(__uqadd8(__uqsub8(*to, below), both), above);
}

// Whether the assembly has an output rule, for this many filters at once.
static SMALL int has_pairs(const struct output* rule, int filters, int all_filters) {
  const int clamped = rule->least > 0 || rule->most < 255;
  if (rule->form == FORM_SUMS)
    return filters % 2 == 0 && rule->relu && (rule->residual == RESIDUAL_NONE || rule->residual == RESIDUAL_SHORTCUT);
  if (filters % 2 != 0 || (clamped && (filters % 4 != 0 || filters != all_filters))) return 0;
  if (rule->form == FORM_QUANTIZED) return rule->residual == RESIDUAL_NONE && rule->zero_point == 0;
  return rule->form == FORM_BYTES && rule->residual != RESIDUAL_FLOATS;
}

static SMALL void set_mode(const struct output* rule, struct tile* tile) {
  const int quantized = rule->form == FORM_QUANTIZED, kind = rule->residual;
  tile->sums = rule->form == FORM_SUMS, tile->inverse = rule->inverse;
  tile->factor = quantized ? rule->inverse : rule->residual_scale;
  tile->mode = quantized                   ? MODE_QUANTIZED
               : kind == RESIDUAL_SHORTCUT ? MODE_SHORTCUT
               : tile->sums                ? MODE_SUMS
               : kind == RESIDUAL_BYTES    ? MODE_RESIDUAL
                                           : MODE_BYTES;
}

// Filters of a tile whose first pixel and filter is y's element `at`. The rest of `tile` is set.
static SMALL void run_pairs(const struct output* rule, struct tile* tile, const word* w, void* y, const void* residual,
                            int32_t at, int filters) {
  uint8_t* to = (uint8_t*)y + at;
  tile->w = before(w, 4), tile->y = to, tile->end = to + filters;
  tile->residual = (uintptr_t)residual + (uintptr_t)at;
  if (USES(SUMS) && tile->sums) {
    tile->y = (uint8_t*)y + 4 * (at % tile->filters), tile->end = tile->y + 4 * filters;
    tile->residual = (uintptr_t)rule->bound;
  }
  tile_of_pairs(tile);
  if (USES(CLAMPS) && !tile->sums && (rule->least > 0 || rule->most < 255))
    clamp_bytes(to, 4 * filters, rule->least, rule->most);
}

// Sets what all tiles of a layer have in common; 0 if the assembly does not have the layer.
static SMALL int start_tiles(const struct adder_conv* layer, const word* x, const word* beside, struct tile* tile) {
  const struct adder_conv* shortcut = layer->shortcut;
  const int steps = layer->words / (layer->order == ORDER_TAPS ? 4 : 3);
  tile->x = biased(x, layer->order), tile->filters = layer->window.filters, tile->function = dot_of(layer->order);
  tile->counter = 0u - ((uint32_t)steps << 24);
  set_mode(&layer->output, tile);
  if (USES(SHORTCUTS) && shortcut) {
    tile->beside_w = before((const word*)shortcut->weights, 4), tile->beside_x = before(beside, 4),
    tile->beside_function = dot_taps;
    tile->beside_counter = 0u - ((uint32_t)(shortcut->words / 4) << 24);
  }
  return !LEFT(TILES) || (steps <= 256 && (!shortcut || shortcut->words <= 1024) &&
                          has_pairs(&layer->output, layer->window.filters / layer->groups, layer->window.filters));
}

static ALWAYS_INLINE void run_tile(const struct adder_conv* layer, struct tile* tile, const word* w, void* y,
                                   const void* residual, int32_t at) {
  run_pairs(&layer->output, tile, w, y, residual, at, layer->window.filters / layer->groups);
}
#endif
