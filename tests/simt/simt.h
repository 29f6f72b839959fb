// csrc/cuda/dialect.cuh on the host: kernels compiled with -DADDEROPS_SIMT run as plain C++, one fiber per CUDA thread,
// one thread at a time, each up to its next barrier.  executor.cpp runs them, race_checker.cpp watches.
//
// Not modelled: time, memory order, contraction to FMA, the hardware's order of sums in an mma, threads that spin on a
// flag (they never stop).  One launch at a time per process.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <source_location>
#include <tuple>

#include "definition/elements.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// The numbers are CUDA's.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
  cudaErrorUnknown = 999,
};
typedef struct CUstream_st* cudaStream_t;
// The error of the last launch; until the next call of a pass it stays, and nothing more is launched.
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

namespace simt {

typedef std::source_location Where;

// Waits for all threads of the block; is any predicate not 0?
int block_barrier(int predicate, const char* name, Where where);

// Waits for all lanes of `mask`; the last to arrive calls combine() on all payloads, which lie on the lanes' stacks.
typedef void (*Combine)(void* const payloads[32], uint32_t mask);
void warp_collective(uint32_t mask, const char* name, Combine combine, void* payload, Where where);

struct ShuffleLane {
  uint64_t value, result;
  int source;
};
void combine_nothing(void* const payloads[32], uint32_t mask);
void combine_shuffle(void* const payloads[32], uint32_t mask);
void combine_ballot(void* const payloads[32], uint32_t mask);
int lane();

template <typename T>
T shuffle(uint32_t mask, const char* name, T value, int source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what the hardware shuffles");
  ShuffleLane payload = {0, 0, source};
  memcpy(&payload.value, &value, sizeof value);
  warp_collective(mask, name, combine_shuffle, &payload, where);
  memcpy(&value, &payload.result, sizeof value);
  return value;
}

void* shared_array(const void* key, const char* name, size_t bytes);

// `Tag` is the type of a lambda, distinct per declaration and instantiation of a kernel.
template <typename Array, typename Tag>
Array& shared(Tag, const char* name) {
  static const char key = 0;
  return *static_cast<Array*>(shared_array(&key, name, sizeof(Array)));
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid);
void copy_async_commit();
void copy_async_wait(size_t pending);

void launch_blocks(const char* name, dim3 grid, dim3 block, void (*thread)(const void* call), const void* call,
                   size_t call_bytes);

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t,
            const Arguments&... arguments) {
  static_assert(sizeof...(Parameters) == sizeof...(Arguments), "a kernel has no default arguments");
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> parameters;
  };
  const Call call = {kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  launch_blocks(
      name, grid, block,
      [](const void* call) {
        std::apply(static_cast<const Call*>(call)->kernel, static_cast<const Call*>(call)->parameters);
      },
      &call, sizeof call);
}

}  // namespace simt

#define SHARED(type, name, extent)  \
  typedef type name##_array extent; \
  auto& name = simt::shared<name##_array>([] {}, #name)
#define LAUNCH(kernel, grid, block, stream, ...) \
  simt::launch(#kernel, kernel, grid, block, stream __VA_OPT__(, ) __VA_ARGS__)

inline void __syncthreads(simt::Where where = simt::Where::current()) {
  simt::block_barrier(0, "__syncthreads", where);
}
inline int __syncthreads_or(int predicate, simt::Where where = simt::Where::current()) {
  return simt::block_barrier(predicate, "__syncthreads_or", where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  simt::warp_collective(mask, "__syncwarp", simt::combine_nothing, nullptr, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Where where = simt::Where::current()) {
  const int lane = simt::lane(), source = lane ^ lane_mask, end = (lane & ~(width - 1)) + width;
  return simt::shuffle(mask, "__shfl_xor_sync", value, source < end ? source : lane, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Where where = simt::Where::current()) {
  const int lane = simt::lane(), source = lane + int(delta), end = (lane & ~(width - 1)) + width;
  return simt::shuffle(mask, "__shfl_down_sync", value, source < end ? source : lane, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Where where = simt::Where::current()) {
  simt::ShuffleLane payload = {predicate != 0, 0, 0};
  simt::warp_collective(mask, "__ballot_sync", simt::combine_ballot, &payload, where);
  return unsigned(payload.result);
}

namespace adderops {
namespace cuda {

// Documented in csrc/cuda/dialect.cuh.  A copy is as late as the hardware allows: its destination holds poison from the
// call on, and the data arrives in cp_async_wait.
inline void cp_async_16(void* shared, const void* global, bool valid) { simt::copy_async(shared, global, 16, valid); }
inline void cp_async_4(void* shared, const void* global, bool valid) { simt::copy_async(shared, global, 4, valid); }
inline void cp_async_commit() { simt::copy_async_commit(); }
template <int Pending>
inline void cp_async_wait() {
  static_assert(Pending >= 0);
  simt::copy_async_wait(Pending);
}

inline uint32_t forgotten(uint32_t x) { return x; }
inline unsigned thread_index() { return threadIdx.x; }

inline uint32_t add_distances4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) {
    const int d = int(a >> i & 255) - int(b >> i & 255);
    c += uint32_t(d < 0 ? -d : d);
  }
  return c;
}

inline uint32_t load_4_or_2(const void* global, bool four) {
  return four ? *static_cast<const uint32_t*>(global) : *static_cast<const uint16_t*>(global);
}
inline float exp2_or_same(float x, bool power) {
  if (!power) return x;
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0 : y;  // a NaN compares false
}

inline float saturated_difference(float a, float b) {
  const float d = a - b;
  return d > 0 ? (d < 1 ? d : 1) : 0;  // a NaN compares false
}

template <typename T>
inline uint16_t minimum(uint16_t a, uint16_t b) {
  const float x = to_float(T{a}), y = to_float(T{b});
  if (x != x && y != y) return 0x7fff;
  if (y != y) return a;
  if (x == y) return a | b;  // equal bits, or two zeros: the negative one
  return x < y ? a : b;      // b where x is a NaN
}
template <typename T>
inline uint32_t minimum2(uint32_t a, uint32_t b) {
  return minimum<T>(uint16_t(a), uint16_t(b)) | uint32_t(minimum<T>(uint16_t(a >> 16), uint16_t(b >> 16))) << 16;
}

template <typename T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 simt::Where where = simt::Where::current());
extern template void mma_16x8x16<Float16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], simt::Where);
extern template void mma_16x8x16<BFloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], simt::Where);

}  // namespace cuda
}  // namespace adderops
