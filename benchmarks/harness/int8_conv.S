@ Tiles of an int8 convolution for Cortex-M with DSP extension and FPU: pixels x 2 filters against all filters.
@
@ void NAME(const struct tile *): x, w, bytes, y, cout, pairs (int8_conv.h). Of each pair of filters, w has the start of
@ both sums (int32), `bytes` of words, and constants: float a0, b0, a1, b1; or c0 low, c0 high, m0, c1 low, c1 high, m1.
@   taps   4 pixels, int16 weights: word k of filters 0 and 1; x: word k of pixels 0 ... 3. 16 cycles for 16 products
@   rows1  4 pixels of one row, KW 3, stride 1: words kx = 0, 1, 2; x: columns 0 ... 5 of a word. 44 cycles for 48
@   rows2  the same with stride 2: columns 0 ... 8. 46 cycles for 48
@   narrow 2 pixels, int8 weights: 4 terms of filters 0 and 1; x: words (0, 2), (1, 3) of pixels 0 and 1. 19 cycles for 16
@
@ r4 ... r11: sums of filter 0, then of filter 1 (narrow: r4, r5, then r6, r7). r0: x, r1: w.

.syntax unified
.thumb
.text

@ Loads are grouped: a load after a load takes one cycle. r0 and r1 point four bytes low, so that the last load of a
@ turn can move them on.
.macro taps_word i, on=
  ldr r2, [r1, #8 * \i + 4]
  ldr r3, [r1, #8 * \i + 8]\on
  ldr r12, [r0, #16 * \i + 4]
  ldr lr, [r0, #16 * \i + 8]
  two r4, r8, r5, r9
  ldr r12, [r0, #16 * \i + 12]
  ldr lr, [r0, #16 * \i + 16]\on
  two r6, r10, r7, r11
.endm
.macro taps
  taps_word 0
  taps_word 1
  taps_word 2
  taps_word 3, !
.endm

.macro two a, b, c, d   @ x in r12 and lr: sums a, c of filter 0 (r2), b, d of filter 1 (r3)
  smlad \a, r12, r2, \a
  smlad \b, r12, r3, \b
  smlad \c, lr, r2, \c
  smlad \d, lr, r3, \d
.endm
.macro weights at, on=
  ldr r2, [r1, #\at + 4]
  ldr r3, [r1, #\at + 8]\on
.endm
.macro columns i, j, at, on=
  ldr r12, [r0, #4 * \i + \at + 4]
  ldr lr, [r0, #4 * \j + \at + 4]\on
.endm
.macro rows1_step at, on=
  columns 0, 2, \at
  weights \at
  two r4, r8, r6, r10
  columns 1, 3, \at
  two r5, r9, r7, r11
  weights \at + 8
  two r4, r8, r6, r10
  columns 2, 4, \at
  two r5, r9, r7, r11
  weights \at + 16, \on
  two r4, r8, r6, r10
  columns 3, 5, \at, \on
  two r5, r9, r7, r11
.endm
.macro rows1
  rows1_step 0
  rows1_step 24, !
.endm
.macro rows2_step x, w, x2, w2, on=   @ x2, w2: once r0 and r1 have moved on
  columns 0, 2, \x
  weights \w
  two r4, r8, r5, r9
  columns 4, 6, \x
  two r6, r10, r7, r11
  weights \w + 16, \on
  two r5, r9, r6, r10
  columns 2, 8, \x, \on
  two r4, r8, r7, r11
  columns 1, 3, \x2
  weights \w2 + 8
  two r4, r8, r5, r9
  columns 5, 7, \x2
  two r6, r10, r7, r11
.endm
.macro rows2
  rows2_step 0, 0, 0, 0
  rows2_step 36, 24, 36 - 72, 24 - 48, !
.endm

.macro narrow_step i, on=
  ldr r2, [r1, #8 * \i + 4]
  ldr r3, [r1, #8 * \i + 8]\on
  ldr r8, [r0, #16 * \i + 4]
  ldr r9, [r0, #16 * \i + 8]
  ldr r10, [r0, #16 * \i + 12]
  ldr r11, [r0, #16 * \i + 16]\on
  sxtb16 r12, r2
  sxtb16 r2, r2, ror #8
  sxtb16 lr, r3
  sxtb16 r3, r3, ror #8
  smlad r4, r8, r12, r4
  smlad r5, r9, r12, r5
  smlad r6, r8, lr, r6
  smlad r7, r9, lr, r7
  smlad r4, r10, r2, r4
  smlad r5, r11, r2, r5
  smlad r6, r10, r3, r6
  smlad r7, r11, r3, r7
.endm
.macro narrow
  narrow_step 0
  narrow_step 1
  narrow_step 2
  narrow_step 3, !
.endm

.macro start4
  mov r5, r4
  mov r6, r4
  mov r7, r4
  mov r9, r8
  mov r10, r8
  mov r11, r8
.endm

.macro convert a, b, c, d
  vcvt.f32.s32 \a, \a
  vcvt.f32.s32 \b, \b
  vcvt.f32.s32 \c, \c
  vcvt.f32.s32 \d, \d
.endm
.macro affine a, b, c, d, scale, offset
  vmul.f32 \a, \a, \scale
  vmul.f32 \b, \b, \scale
  vmul.f32 \c, \c, \scale
  vmul.f32 \d, \d, \scale
  vadd.f32 \a, \a, \offset
  vadd.f32 \b, \b, \offset
  vadd.f32 \c, \c, \offset
  vadd.f32 \d, \d, \offset
  vcvtr.s32.f32 \a, \a
  vcvtr.s32.f32 \b, \b
  vcvtr.s32.f32 \c, \c
  vcvtr.s32.f32 \d, \d
.endm

.macro float4
  vmov s4, r4
  vmov s5, r5
  vmov s6, r6
  vmov s7, r7
  vldr s0, [r1, #4]
  vldr s1, [r1, #8]
  vldr s2, [r1, #12]
  vldr s3, [r1, #16]
  adds r1, #16
  vmov s8, r8
  vmov s9, r9
  vmov s10, r10
  vmov s11, r11
  convert s4, s5, s6, s7
  convert s8, s9, s10, s11
  affine s4, s5, s6, s7, s0, s1
  affine s8, s9, s10, s11, s2, s3
  vmov r4, s4
  vmov r5, s5
  vmov r6, s6
  vmov r7, s7
  vmov r8, s8
  vmov r9, s9
  vmov r10, s10
  vmov r11, s11
  .irp r, r4, r5, r6, r7, r8, r9, r10, r11
  usat \r, #8, \r
  .endr
.endm
.macro float2
  vmov s4, r4
  vmov s5, r5
  vldr s0, [r1, #4]
  vldr s1, [r1, #8]
  vldr s2, [r1, #12]
  vldr s3, [r1, #16]
  adds r1, #16
  vmov s6, r6
  vmov s7, r7
  convert s4, s5, s6, s7
  vmul.f32 s4, s4, s0
  vmul.f32 s5, s5, s0
  vmul.f32 s6, s6, s2
  vmul.f32 s7, s7, s2
  vadd.f32 s4, s4, s1
  vadd.f32 s5, s5, s1
  vadd.f32 s6, s6, s3
  vadd.f32 s7, s7, s3
  vcvtr.s32.f32 s4, s4
  vcvtr.s32.f32 s5, s5
  vcvtr.s32.f32 s6, s6
  vcvtr.s32.f32 s7, s7
  vmov r4, s4
  vmov r5, s5
  vmov r6, s6
  vmov r7, s7
  .irp r, r4, r5, r6, r7
  usat \r, #8, \r
  .endr
.endm

.macro scaled sum       @ c in r2 and r3, m in r12
  mov r0, r2
  mov lr, r3
  smlal r0, lr, \sum, r12
  usat \sum, #8, lr
.endm
.macro constants
  ldr r2, [r1, #4]
  ldr r3, [r1, #8]
  ldr r12, [r1, #12]!
.endm
.macro fixed4
  constants
  .irp r, r4, r5, r6, r7
  scaled \r
  .endr
  constants
  .irp r, r8, r9, r10, r11
  scaled \r
  .endr
.endm
.macro fixed2
  constants
  scaled r4
  scaled r5
  constants
  scaled r6
  scaled r7
.endm

@ stack: y, cout, pairs, bytes, x; s31: the end of the words
.macro tile name, loop, finish, pixels
.p2align 3
.global \name
.type \name, %function
.thumb_func
\name:
  push {r4-r11, lr}
  sub sp, #20
  ldmia r0, {r1-r6}        @ x, w, bytes, y, cout, pairs
  strd r4, r5, [sp]
  strd r6, r3, [sp, #8]
  subs r1, #4
  str r1, [sp, #16]
  subs r1, r2, #4
2:
  ldr r0, [sp, #16]
  ldr r2, [sp, #12]
  ldr r4, [r1, #4]
.if \pixels == 4
  ldr r8, [r1, #8]
  adds r1, #8
  add r2, r1
  start4
.else
  ldr r6, [r1, #8]
  adds r1, #8
  add r2, r1
  mov r5, r4
  mov r7, r6
.endif
  vmov s31, r2
.p2align 3
1:
  \loop
  vmov r2, s31
  cmp r1, r2
  bne 1b
  \finish
  ldr r0, [sp]         @ y
  ldr r2, [sp, #4]         @ cout
  ldr r12, [sp, #8]       @ pairs
.if \pixels == 4
  orr r4, r4, r8, lsl #8
  orr r5, r5, r9, lsl #8
  orr r6, r6, r10, lsl #8
  orr r7, r7, r11, lsl #8
  add r3, r0, r2, lsl #1
  strh r5, [r0, r2]
  strh r7, [r3, r2]
  strh r6, [r3]
.else
  orr r4, r4, r6, lsl #8
  orr r5, r5, r7, lsl #8
  strh r5, [r0, r2]
.endif
  strh r4, [r0], #2
  str r0, [sp]
  subs r12, #1
  str r12, [sp, #8]
  bne 2b
  add sp, #20
  pop {r4-r11, pc}
.size \name, .-\name
.endm

tile taps_float, taps, float4, 4
tile rows1_float, rows1, float4, 4
tile rows2_float, rows2, float4, 4
tile narrow_float, narrow, float2, 2
tile taps_fixed, taps, fixed4, 4
tile rows1_fixed, rows1, fixed4, 4
tile rows2_fixed, rows2, fixed4, 4
tile narrow_fixed, narrow, fixed2, 2
