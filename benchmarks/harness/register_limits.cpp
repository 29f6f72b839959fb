// Upper bounds of the terms per second of each pass: loops that stay within registers and L1 cache.
//
// A term is one accumulated |x - w|, or one multiply-accumulate of a convolution. Every loop is the innermost loop of a
// direct convolution: a tile of kRows scalars times kCols vectors, with accumulators in registers and operands in L1,
//
//     for k in 0..kDepth:  for r in 0..kRows:  for c in 0..kCols:  acc[r][c] = term(acc[r][c], row[k][r], col[k][c])
//
//                 col[k][0]  col[k][1]  ...         (vectors: output channels; in grad_x input channels)
//     row[k][0]   acc[0][0]  acc[0][1]
//     row[k][1]   acc[1][0]  acc[1][1]              (scalars: pixels of x; in grad_x of grad_y)
//        ...
//
// register_limits.py compiles this file once per instruction set and vector width (-DVECTOR_BITS on x86), times every
// tile of every loop and keeps the best. The sums are meaningless; only the time matters.
#include <chrono>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "vector loops exist for x86-64 and AArch64"
#endif

namespace {

// ---- one vector of floats; each function is one instruction ------------------------------------------------------
// *_scalar take one operand as a scalar in memory. With AVX-512 it must remain a memory operand of the instruction: a
// separate vbroadcastss takes a slot of an arithmetic pipe (Zen 4: 47 instead of 58 Gterm/s for min+fma). The compiler
// would hoist such a broadcast out of the loop over columns, hence the assembly.

#if defined(__aarch64__)
using Vec = float32x4_t;
inline Vec broadcast(float s) { return vdupq_n_f32(s); }
inline Vec load(const float* p) { return vld1q_f32(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec min(Vec a, Vec b) { return vminq_f32(a, b); }
inline Vec max(Vec a, Vec b) { return vmaxq_f32(a, b); }
inline Vec abs(Vec a) { return vabsq_f32(a); }
inline Vec min_signed(Vec a, Vec b) {
  return vreinterpretq_f32_s32(vminq_s32(vreinterpretq_s32_f32(a), vreinterpretq_s32_f32(b)));
}
inline Vec min_unsigned(Vec a, Vec b) {
  return vreinterpretq_f32_u32(vminq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)));
}
#define OPAQUE(v) asm volatile("" : "+w"(v))
#define HAS_FMA 1
#elif VECTOR_BITS == 512
using Vec = __m512;
inline Vec broadcast(float s) { return _mm512_set1_ps(s); }
inline Vec load(const float* p) { return _mm512_load_ps(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec min_signed(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_min_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline Vec min_unsigned(Vec a, Vec b) {
  return _mm512_castsi512_ps(_mm512_min_epu32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
}
inline Vec range(Vec a, Vec b) { return _mm512_range_ps(a, b, 0x2); }
#define EMBEDDED_BROADCAST "%{1to16%}"
#elif VECTOR_BITS == 256
using Vec = __m256;
inline Vec broadcast(float s) { return _mm256_set1_ps(s); }
inline Vec load(const float* p) { return _mm256_load_ps(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec min_signed(Vec a, Vec b) {
  return _mm256_castsi256_ps(_mm256_min_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
inline Vec min_unsigned(Vec a, Vec b) {
  return _mm256_castsi256_ps(_mm256_min_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
}
#if defined(__AVX512VL__)
inline Vec range(Vec a, Vec b) { return _mm256_range_ps(a, b, 0x2); }
#define EMBEDDED_BROADCAST "%{1to8%}"
#endif
#define HAS_FMA 1
#else  // the x86-64 baseline, SSE2: no FMA and no 32-bit integer minima
using Vec = __m128;
inline Vec broadcast(float s) { return _mm_set1_ps(s); }
inline Vec load(const float* p) { return _mm_load_ps(p); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm_add_ps(_mm_mul_ps(a, b), c); }
inline Vec min(Vec a, Vec b) { return _mm_min_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm_max_ps(a, b); }
inline Vec abs(Vec a) { return _mm_andnot_ps(_mm_set1_ps(-0.0f), a); }
#endif

#if defined(EMBEDDED_BROADCAST)
#define HAS_FMA 1
#define OPAQUE(v) asm volatile("" : "+v"(v))
inline Vec fma_scalar(const float* s, Vec b, Vec c) {
  asm("vfmadd231ps %2" EMBEDDED_BROADCAST ", %1, %0" : "+v"(c) : "v"(b), "m"(*s));
  return c;
}
inline Vec min_scalar(const float* s, Vec b) {
  Vec result;
  asm("vminps %2" EMBEDDED_BROADCAST ", %1, %0" : "=v"(result) : "v"(b), "m"(*s));
  return result;
}
inline Vec sub_scalar(const float* s, Vec b) {
  Vec result;
  asm("vsubps %2" EMBEDDED_BROADCAST ", %1, %0" : "=v"(result) : "v"(b), "m"(*s));
  return result;
}
#else
#if defined(__x86_64__)
#define OPAQUE(v) asm volatile("" : "+x"(v))
#endif
inline Vec fma_scalar(const float* s, Vec b, Vec c) { return fma(broadcast(*s), b, c); }
inline Vec min_scalar(const float* s, Vec b) { return min(b, broadcast(*s)); }
inline Vec sub_scalar(const float* s, Vec b) { return b - broadcast(*s); }
#endif

struct Constants {
  Vec one, minus_one;
};

// ---- one term of each pass --------------------------------------------------------------------------------------
// kElement is the position in the tile. `held` is the operand that belongs to an accumulator: x in grad_x.
// An addition may be written fma(v, 1, acc): the same value bit for bit, but on the multiplier's pipes, which are idle
// if the adder's pipes also execute the minima (AMD Zen 4).

struct Convolution {  // F.conv2d and grad_w
  static constexpr const char* name = "convolution: fma";
  static constexpr bool kHolds = false;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec, const Constants&) {
    return fma_scalar(row, col, acc);
  }
};

struct MinAdd {
  static constexpr const char* name = "forward: min add";
  static constexpr bool kHolds = false;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec, const Constants&) {
    return acc + min_scalar(row, col);
  }
};

// The same bits as bytes: each 32-bit lane compares 4 bytes; the scalar is 8 bytes (4 on AArch64).
struct SumOfDistances {
  static constexpr const char* name = "int8: sums of |a - b| of bytes";
  static constexpr bool kHolds = false;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec, const Constants&) {
#if defined(__aarch64__)
    const uint8x16_t bytes = vreinterpretq_u8_f32(vdupq_n_f32(*row));
    const uint16x8_t pairs = vpaddlq_u8(vabdq_u8(bytes, vreinterpretq_u8_f32(col)));
    return vreinterpretq_f32_u32(vpadalq_u16(vreinterpretq_u32_f32(acc), pairs));
#else
    long long bytes;
    __builtin_memcpy(&bytes, row, 8);
#if VECTOR_BITS == 512
    const __m512i sums = _mm512_sad_epu8(_mm512_set1_epi64(bytes), _mm512_castps_si512(col));
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(acc), sums));
#elif VECTOR_BITS == 256
    const __m256i sums = _mm256_sad_epu8(_mm256_set1_epi64x(bytes), _mm256_castps_si256(col));
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(acc), sums));
#else
    const __m128i sums = _mm_sad_epu8(_mm_set1_epi64x(bytes), _mm_castps_si128(col));
    return _mm_castsi128_ps(_mm_add_epi32(_mm_castps_si128(acc), sums));
#endif
#endif
  }
};

struct SubAbsAdd {
  static constexpr const char* name = "forward direct: sub abs add";
  static constexpr bool kHolds = false;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec, const Constants&) {
    return acc + abs(sub_scalar(row, col));
  }
};

struct ClampFloat {
  static constexpr const char* name = "grad_x: sub max min fma";
  static constexpr bool kHolds = true;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec held, const Constants& c) {
    return fma_scalar(row, min(max(col - held, c.minus_one), c.one), acc);
  }
};

#if HAS_FMA
struct MinFma {
  static constexpr const char* name = "forward: min fma";
  static constexpr bool kHolds = false;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec, const Constants& c) {
    return fma(min_scalar(row, col), c.one, acc);
  }
};

struct SubAbsFma {
  static constexpr const char* name = "forward direct: sub abs fma";
  static constexpr bool kHolds = false;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec, const Constants& c) {
    return fma(abs(sub_scalar(row, col)), c.one, acc);
  }
};

struct ClampInteger {  // minima of the raw bits: signed with those of 1.0f, then unsigned with those of -1.0f
  static constexpr const char* name = "grad_x: sub 2 integer min fma";
  static constexpr bool kHolds = true;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec held, const Constants& c) {
    return fma_scalar(row, min_unsigned(min_signed(col - held, c.one), c.minus_one), acc);
  }
};
#endif

#if defined(__x86_64__) && HAS_FMA
struct ClampFloatFms {
  static constexpr const char* name = "grad_x: fms max min fma";
  static constexpr bool kHolds = true;
  template <int>
  static Vec term(Vec acc, const float* row, Vec col, Vec held, const Constants& c) {
    return fma_scalar(row, min(max(fms(col, c.one, held), c.minus_one), c.one), acc);
  }
};
#endif

#if defined(EMBEDDED_BROADCAST)
// vrangeps(z, 1) takes the smaller absolute value and the sign of z: the whole clamp. On Zen 4 it shares the adder's
// pipes, so kFms of every kOf subtractions move to the multiplier.
template <int kFms, int kOf>
struct ClampRange {
  static constexpr bool kHolds = true;
  template <int kElement>
  static Vec term(Vec acc, const float* row, Vec col, Vec held, const Constants& c) {
    constexpr bool kOnMultiplier = kElement * kFms % kOf < kFms;
    const Vec z = kOnMultiplier ? fms(col, c.one, held) : col - held;
    return fma_scalar(row, range(z, c.one), acc);
  }
};
struct ClampRangeSub : ClampRange<0, 1> {
  static constexpr const char* name = "grad_x: sub range fma";
};
struct ClampRangeTwoFifths : ClampRange<2, 5> {
  static constexpr const char* name = "grad_x: 3/5 sub 2/5 fms, range fma";
};
struct ClampRangeHalf : ClampRange<1, 2> {
  static constexpr const char* name = "grad_x: 1/2 sub 1/2 fms, range fma";
};
#endif

template <class Term>
constexpr int kTermsOfLane = 1;
template <>
constexpr int kTermsOfLane<SumOfDistances> = 4;

// ---- the tile ---------------------------------------------------------------------------------------------------

constexpr int kLanes = sizeof(Vec) / sizeof(float);
constexpr int kDepth = 96;  // steps per sweep: the operands of the widest tile fill 24 KiB
constexpr int kMaxCols = 4;
constexpr int kMaxRows = 12;

alignas(64) thread_local float t_cols[kDepth * kMaxCols * kLanes];
alignas(64) thread_local float t_rows[kDepth * kMaxRows + 1];  // the last byte scalar reads 8 bytes
thread_local volatile float t_sink;

// f(0), f(1), ... f(n - 1) with constant arguments: in a loop GCC would keep the accumulators in memory.
template <class F, int... kElement>
inline __attribute__((always_inline)) void unrolled(std::integer_sequence<int, kElement...>, const F& f) {
  (f(std::integral_constant<int, kElement>{}), ...);
}

// Seconds of `sweeps` times kDepth * kRows * kCols * kLanes terms.
template <class Term, int kRows, int kCols>
double seconds(long sweeps) {
  constexpr auto kTile = std::make_integer_sequence<int, kRows * kCols>{};
  for (int i = 0; i < kDepth * kCols * kLanes; ++i) t_cols[i] = static_cast<float>(i * 37 % 101) / 32 - 1.5f;
  for (int i = 0; i < kDepth * kRows; ++i) t_rows[i] = static_cast<float>(i * 29 % 103) / 32 - 1.5f;
  Constants constants{broadcast(1.0f), broadcast(-1.0f)};
  OPAQUE(constants.one);  // otherwise the compiler would fold a product with one
  OPAQUE(constants.minus_one);
  Vec acc[kRows * kCols], held[kRows * kCols];
  unrolled(kTile, [&](auto e) __attribute__((always_inline)) {
    acc[e] = broadcast(0.0f);
    held[e] = broadcast(t_rows[e]);
    if constexpr (Term::kHolds) OPAQUE(held[e]);
  });
  const auto start = std::chrono::steady_clock::now();
  for (long sweep = 0; sweep < sweeps; ++sweep) {
    const float* cols = t_cols;
    const float* rows = t_rows;
    asm volatile("" : "+r"(cols), "+r"(rows) : : "memory");  // the compiler carries nothing from one sweep to the next
#pragma GCC unroll 1
    for (int k = 0; k < kDepth; ++k, cols += kCols * kLanes, rows += kRows) {
      Vec col[kCols];
      unrolled(std::make_integer_sequence<int, kCols>{},
               [&](auto j) __attribute__((always_inline)) { col[j] = load(cols + j * kLanes); });
      unrolled(kTile, [&](auto e) __attribute__((always_inline)) {
        acc[e] = Term::template term<e>(acc[e], rows + e / kCols, col[e % kCols], held[e], constants);
      });
    }
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  Vec total = broadcast(0.0f);
  unrolled(kTile, [&](auto e) __attribute__((always_inline)) { total = total + acc[e]; });
  float first;
  __builtin_memcpy(&first, &total, sizeof(first));
  t_sink = first;
  return elapsed.count();
}

struct Loop {
  const char* name;
  int rows, cols, terms_of_lane;
  double (*seconds)(long);
};

#define TILE(Term, rows, cols) {Term::name, rows, cols, kTermsOfLane<Term>, seconds<Term, rows, cols>}
// A tile may fill 12 of 16 registers, or 24 of 32; grad_x holds an x next to every accumulator.
#if defined(__AVX512F__) || defined(__aarch64__)
#define TILES(Term) TILE(Term, 12, 1), TILE(Term, 6, 2), TILE(Term, 12, 2), TILE(Term, 4, 4), TILE(Term, 6, 4)
#define TILES_HELD(Term) TILE(Term, 8, 1), TILE(Term, 10, 1), TILE(Term, 12, 1), TILE(Term, 4, 2), TILE(Term, 3, 4)
#else
#define TILES(Term) \
  TILE(Term, 8, 1), TILE(Term, 12, 1), TILE(Term, 6, 2), TILE(Term, 4, 2), TILE(Term, 2, 4), TILE(Term, 3, 4)
#define TILES_HELD(Term) TILE(Term, 4, 1), TILE(Term, 5, 1), TILE(Term, 2, 2), TILE(Term, 3, 2)
#endif

const Loop kLoops[] = {
    TILES(Convolution),
    TILES(MinAdd),
    TILES(SubAbsAdd),
    TILES(SumOfDistances),
    TILES_HELD(ClampFloat),
#if HAS_FMA
    TILES(MinFma),
    TILES(SubAbsFma),
    TILES_HELD(ClampInteger),
#endif
#if defined(__x86_64__) && HAS_FMA
    TILES_HELD(ClampFloatFms),
#endif
#if defined(EMBEDDED_BROADCAST)
    TILES_HELD(ClampRangeSub),
    TILES_HELD(ClampRangeTwoFifths),
    TILES_HELD(ClampRangeHalf),
#endif
};

}  // namespace

extern "C" {
// Whether this processor supports the library's instruction set.
int limit_runnable() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}
int limit_count() { return static_cast<int>(sizeof(kLoops) / sizeof(kLoops[0])); }
const char* limit_name(int i) { return kLoops[i].name; }
int limit_rows(int i) { return kLoops[i].rows; }
int limit_cols(int i) { return kLoops[i].cols; }
double limit_terms(int i) {
  const Loop& loop = kLoops[i];
  return double(kDepth) * loop.rows * loop.cols * kLanes * loop.terms_of_lane;
}
double limit_seconds(int i, long sweeps) { return kLoops[i].seconds(sweeps); }
}
