// Minimum, maximum and division of sizes.
#pragma once
#include <stdint.h>

namespace adderops {
namespace cpu {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
inline int64_t round_up(int64_t a, int64_t step) { return ceil_div(a, step) * step; }

}  // namespace
}  // namespace cpu
}  // namespace adderops
