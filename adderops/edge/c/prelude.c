// What every fragment rests on: the target, words and floats that may alias bytes, and exact float32 arithmetic.
//
// An epilogue has the bits of the operators in float32 only if each product is rounded before it is added, every operation
// is rounded to float32, and nothing is reordered. So other modes are refused, and `rounded` hides a product from compilers
// that would contract it with the sum that follows (gcc -std=gnu99; any with -ffp-contract=fast).

#define ADDER_C 0
#define ADDER_M_INTRINSICS 1
#define ADDER_M_ASSEMBLY 2
#define ADDER_NEON 3
#define ADDER_SSE2 4
#ifndef ADDER_TARGET
#if defined(__ARM_FEATURE_DSP) && defined(__ARM_ARCH_PROFILE) && __ARM_ARCH_PROFILE == 'M'
#ifdef __GNUC__
#define ADDER_TARGET ADDER_M_ASSEMBLY
#else
#define ADDER_TARGET ADDER_M_INTRINSICS
#endif
#elif defined(__ARM_NEON)
#define ADDER_TARGET ADDER_NEON
#elif defined(__SSE2__) || defined(_M_X64)
#define ADDER_TARGET ADDER_SSE2
#else
#define ADDER_TARGET ADDER_C
#endif
#endif

#if ADDER_TARGET == ADDER_M_INTRINSICS || ADDER_TARGET == ADDER_M_ASSEMBLY
#include <arm_acle.h>
#elif ADDER_TARGET == ADDER_NEON
#include <arm_neon.h>
#elif ADDER_TARGET == ADDER_SSE2
#include <emmintrin.h>
#endif

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__)
#error "adderops: compile without -ffast-math: the results would not be those of the network"
#endif
// 16: of _Float16 in _Float16, which leaves float alone; gcc -std=gnu99 for processors that have it
#if defined(__FLT_EVAL_METHOD__) && __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16
#error "adderops: expected float arithmetic in float (FLT_EVAL_METHOD 0); on x86 use -mfpmath=sse -msse2"
#endif
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "adderops: the packed weights are little-endian"
#endif
#if UINTPTR_MAX < 0xffffffff
#error "adderops: expected a processor with an int of 32 bits"
#endif

// Whether dots and float32 epilogue of a tile are one assembly loop, which leaves less to finish().
#if ADDER_TARGET == ADDER_M_ASSEMBLY && defined(__ARM_FP) && !ADDER_EPILOGUE_INTEGER
#define ADDER_PAIRS 1
#define FINISHES(what) ((ADDER_FINISHES & USES_##what) != 0)
#define LEFT(what) USES(LEFT_##what)
#else
#define FINISHES(what) USES(what)
#define LEFT(what) 1
#endif

#ifdef __GNUC__
typedef uint32_t __attribute__((may_alias)) word;
typedef int32_t __attribute__((may_alias)) integer;
typedef float __attribute__((may_alias)) real;
#define MAYBE_UNUSED __attribute__((unused))
#define NOINLINE __attribute__((noinline, unused))
#define SMALL __attribute__((noinline, cold, unused))  // what is not worth many instructions
#define ALWAYS_INLINE inline __attribute__((always_inline, unused))
#else
typedef uint32_t word;
typedef int32_t integer;
typedef float real;
#define MAYBE_UNUSED
#define NOINLINE
#define SMALL
#define ALWAYS_INLINE inline
#endif

#ifndef __GNUC__
#pragma STDC FP_CONTRACT OFF
#endif

// Which order it is of those in use; ORDER_ROWS_2 if neither.
static ALWAYS_INLINE int is_taps(int order) { return USES(TAPS) && order == ORDER_TAPS; }

static ALWAYS_INLINE int is_rows_1(int order) { return !USES(ROWS_2) || (USES(ROWS_1) && order == ORDER_ROWS_1); }

static ALWAYS_INLINE float rounded(float product) {
#if defined(__GNUC__) && (defined(__SSE2__) || defined(__x86_64__))
  __asm__("" : "+x"(product));
#elif defined(__GNUC__) && defined(__aarch64__)
  __asm__("" : "+w"(product));
#elif defined(__GNUC__) && defined(__arm__) && defined(__ARM_FP)
  __asm__("" : "+t"(product));
#elif defined(__GNUC__) && defined(__riscv_flen)
  __asm__("" : "+f"(product));
#elif defined(__GNUC__)
  __asm__("" : "+m"(product));
#endif
  return product;
}

static ALWAYS_INLINE float from_bits(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both;
  both.bits = bits;
  return both.value;
}

// Returns z rounded to the nearest integer, ties to even, then clamped; |least|, |most| < 2^22. z + 1.5 * 2^23 has its
// integer in the low bits of its pattern; patterns of floats >= 0 ascend, and those below are negative integers.
static ALWAYS_INLINE int32_t nearest(float z, int32_t least, int32_t most) {
  const int32_t zero = 0x4b400000;
  union {
    float value;
    int32_t bits;
  } both;
  both.value = z + 12582912.0f;
  if (both.bits < zero + least) return least;
  if (both.bits > zero + most) return most;
  return both.bits - zero;
}

static ALWAYS_INLINE uint8_t nearest_byte(float z) {
#if ADDER_TARGET == ADDER_M_INTRINSICS || ADDER_TARGET == ADDER_M_ASSEMBLY
  union {
    float value;
    int32_t bits;
  } both;
  both.value = z + 12582912.0f;
  return (uint8_t)__usat(__qsub(both.bits, 0x4b400000), 8);
#else
  return (uint8_t)nearest(z, 0, 255);
#endif
}

static ALWAYS_INLINE void copy_bytes(uint8_t* to, const uint8_t* from, int32_t n) {
  while (n-- > 0) *to++ = *from++;
}
