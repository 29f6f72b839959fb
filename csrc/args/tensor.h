// What all kernels share: integer types, element types, operands.  No torch and no C++ library: NVRTC compiles it too.
#pragma once
#if defined(__CUDACC_RTC__)  // NVRTC has no C headers
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

namespace adderops {

enum class ElementType : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A tensor of four dimensions anywhere in memory; strides count elements.
struct Operand {
  void* data;
  int64_t stride[4];  // (N, C, H, W), or (C_out, C_in/groups, KH, KW) for weights
};

// The arguments of several calls of a pass that one call makes.
template <typename Args>
struct List {
  const Args* items;
  int64_t count;
};

}  // namespace adderops
