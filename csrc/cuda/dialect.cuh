// The CUDA that the kernels are written in: what nvcc, NVRTC and the host executor (tests/simt/simt.h) each spell
// differently.  Kernel files include this and no host header, and use nothing outside it except
//   __global__, __device__, __forceinline__, __restrict__, __launch_bounds__(threads, blocks),
//   threadIdx, blockIdx, blockDim, gridDim (.x .y .z), __syncthreads(), __syncthreads_or(int), __syncwarp(),
//   __shfl_xor_sync(mask, value, lane mask), fmaf, fminf, fmaxf, fabsf.
#pragma once
#include "../args/conv2d.h"
#include "../definition/conv2d.h"
#include "../definition/elements.h"

#if defined(ADDEROPS_SIMT)
#include "simt.h"
#else

// An array in shared memory:  SHARED(float, s_x, [2][8][128]);
#define SHARED(type, name, extent) __shared__ __align__(16) type name extent

namespace adderops {
namespace cuda {

// Copies 16 or 4 bytes from global to shared memory; writes zeros, and reads nothing, where not `valid`.  Both
// addresses are aligned.  Asynchronous from sm_80 on: this thread sees the data after cp_async_wait, the block after
// the next barrier.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
#else
  const uint4 zeros = {0, 0, 0, 0};
  *static_cast<uint4*>(shared) = valid ? *static_cast<const uint4*>(global) : zeros;
#endif
}
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(valid ? 4 : 0)
               : "memory");
#else
  *static_cast<unsigned*>(shared) = valid ? *static_cast<const unsigned*>(global) : 0u;
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `Pending` of this thread's committed groups are in flight.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#endif
}

// clamp(a - b, 0, 1): one FADD.SAT.  A NaN becomes 0.
__device__ __forceinline__ float saturated_difference(float a, float b) { return __saturatef(a - b); }

// 2^x within 2^-22, relatively, or x itself: one MUFU.EX2 and a select, where the compiler would branch and write the
// code around it twice.  Denormal powers are 0.
__device__ __forceinline__ float exp2_or_same(float x, bool power) {
  float y;
  asm("{ .reg .pred p; .reg .f32 e; setp.ne.s32 p, %2, 0; ex2.approx.ftz.f32 e, %1; selp.f32 %0, e, %1, p; }"
      : "=f"(y)
      : "f"(x), "r"((int)power));
  return y;
}

// Loads 4 bytes, or 2 as the low ones of 4: one of two predicated instructions, where the compiler would branch.
__device__ __forceinline__ uint32_t load_4_or_2(const void* global, bool four) {
  uint32_t bits;
  asm("{ .reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.u32 %0, [%1]; @!p ld.global.u16 %0, [%1]; }"
      : "=r"(bits)
      : "l"(global), "r"((int)four));
  return bits;
}

// Re-reads threadIdx.x, so that the compiler recomputes what depends on it instead of holding registers.
__device__ __forceinline__ unsigned thread_index() {
  unsigned x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// The same value, of which the compiler knows nothing: it recomputes what depends on it instead of holding registers.
__device__ __forceinline__ uint32_t forgotten(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

// c + the sum of |a - b| over four unsigned bytes: one VABSDIFF4.  sm_120 has none: four instructions (VIMNMX.U8x4
// twice, VIADD.U8x4, IDP.4A), where vabsdiff4 with .add would be five.
__device__ __forceinline__ uint32_t add_distances4(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t sum;
#if __CUDA_ARCH__ >= 1200
  asm("vabsdiff4.u32.u32.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(0));
  sum = __dp4a(sum, 0x01010101u, c);
#else
  asm("vabsdiff4.u32.u32.u32.add %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
#endif
  return sum;
}

// The minimum of each of two packed halves; where one is a NaN, the other.
template <typename T>
__device__ __forceinline__ uint32_t minimum2(uint32_t a, uint32_t b);
#if __CUDA_ARCH__ >= 800 || !defined(__CUDA_ARCH__)
template <>
__device__ __forceinline__ uint32_t minimum2<Float16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
template <>
__device__ __forceinline__ uint32_t minimum2<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// C += A * B on the tensor cores, by all lanes of a warp: A (16 x 16) and B (16 x 8) of T, C (16 x 8) of float32.
// With g = lane / 4, t = lane % 4; a word holds two elements, the first in its low half:
//   a[0] = A[g][2t..]  a[1] = A[g+8][2t..]  a[2] = A[g][2t+8..]  a[3] = A[g+8][2t+8..]
//   b[0] = B[2t..][g]  b[1] = B[2t+8..][g]      c[0], c[1] = C[g][2t..]      c[2], c[3] = C[g+8][2t..]
template <typename T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define ADDEROPS_MMA(T, name)                                                                                     \
  template <>                                                                                                     \
  __device__ __forceinline__ void mma_16x8x16<T>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                                                    \
        ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                                                            \
        "{%0,%1,%2,%3};"                                                                                          \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                          \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                      \
  }
ADDEROPS_MMA(Float16, "f16")
ADDEROPS_MMA(BFloat16, "bf16")
#undef ADDEROPS_MMA
#endif

}  // namespace cuda
}  // namespace adderops
#endif  // ADDEROPS_SIMT

namespace adderops {
namespace cuda {

// Vectors for one access to an aligned address: four floats, 16 bytes, 8 bytes.
struct alignas(16) Float4 {
  float v[4];
};
struct alignas(16) Words4 {
  uint32_t v[4];
};
struct alignas(8) Words2 {
  uint32_t v[2];
};
template <typename V>
__device__ __forceinline__ V load_16(const void* p) {
  return *static_cast<const V*>(p);
}
template <typename V>
__device__ __forceinline__ V load_8(const void* p) {
  return *static_cast<const V*>(p);
}
template <typename V>
__device__ __forceinline__ void store_16(void* p, const V& v) {
  *static_cast<V*>(p) = v;
}

}  // namespace cuda
}  // namespace adderops
