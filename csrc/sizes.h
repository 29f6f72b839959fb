// Saturating sums and products of non-negative integers, for sizes of memory and counts of work.  A result that does
// not fit becomes kTooLarge, which every allocator refuses, instead of overflowing to a small number.
#pragma once
#include <stdint.h>

namespace adderops {

constexpr int64_t kTooLarge = int64_t(1) << 62;  // two of them still fit

static inline int64_t sum(int64_t a, int64_t b) {
  int64_t result;
  return __builtin_add_overflow(a, b, &result) || result > kTooLarge ? kTooLarge : result;
}
static inline int64_t product(int64_t a, int64_t b) {
  int64_t result;
  return __builtin_mul_overflow(a, b, &result) || result > kTooLarge ? kTooLarge : result;
}
template <typename... More>
static inline int64_t sum(int64_t a, int64_t b, More... more) {
  return sum(sum(a, b), more...);
}
template <typename... More>
static inline int64_t product(int64_t a, int64_t b, More... more) {
  return product(product(a, b), more...);
}

}  // namespace adderops
