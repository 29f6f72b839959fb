// Small kernels that test the executor and the race checker: one correct, and one per deliberate bug.
#include "cuda/dialect.cuh"
#include "executor.h"
#include "simt_interface.h"

namespace {

using namespace adderops;
using namespace adderops::cuda;

enum Bug : int {
  kNone,
  kNoBarrierBeforeRead,
  kNoBarrierBeforeWrite,
  kNoWait,
  kWaitForTooFew,
  kSharedRowTooFar,
  kGlobalRowTooFar,
  kGlobalReadBefore,
  kDifferentBarriers,
  kBarrierAfterReturn,
  kDeadlock,
  kOtherBlocksRow,
  kUninitialised,
  kLaneReturned,
  kLaneNotInMask,
  kNoWarpBarrier,
  kWriteToInput,
  kNeverWaited,
  kMisaligned,
  kWild,
  kTooMuchShared,
  kReadWhileCopying,
  kCopyFromAnywhere,
};

constexpr int kThreads = 64, kRounds = 4;

// Every block: kRounds times, 64 floats come in by cp.async, double buffered, leave in reverse order, and the block
// adds them up.  x [blocks * kRounds * 64] -> y [blocks * kRounds * 64], sums [blocks].
template <int B>
__global__ void __launch_bounds__(kThreads) trial_kernel(const float* __restrict__ x, float* y, float* sums) {
  SHARED(float, s_in, [2][kThreads]);
  SHARED(float, s_turned, [kThreads]);
  SHARED(float, s_share, [kThreads / 32]);
  const int t = threadIdx.x, lane = t % 32;
  const int64_t first = (int64_t)blockIdx.x * kRounds * kThreads;
  if (B == kLaneReturned && t == 5) return;
  if (B == kBarrierAfterReturn && t >= 32) return;
  if (B == kTooMuchShared) {
    SHARED(float, s_more, [12200]);
    s_more[t] = 0;
  }
  if (B == kWild && t == 9) y[int64_t(1) << 40] = 0;

  const auto fetch = [&](int round) {
    if (round < kRounds)
      cp_async_4(&s_in[round % 2][t], x + first + round * kThreads + t + (B == kCopyFromAnywhere) * (int64_t(1) << 40),
                 true);
    cp_async_commit();
  };
  fetch(0);
  float sum = 0;
  for (int round = 0; round < kRounds; ++round) {
    fetch(round + 1);
    if (B == kReadWhileCopying && round > 0 && round + 1 < kRounds) sum += 0 * s_in[(round + 1) % 2][t];
    if (B != kNoWait) cp_async_wait<B == kWaitForTooFew ? 2 : 1>();
    s_turned[kThreads - 1 - t] = s_in[round % 2][t] + (B == kUninitialised && t < 2 ? 0 * s_share[t] : 0);
    if (B == kDifferentBarriers && t < 32) {
      __syncthreads();
    } else if (B != kNoBarrierBeforeRead) {
      __syncthreads();
    }
    if (B == kDeadlock && t == 40) __syncwarp(0x300);
    const int row = B == kGlobalRowTooFar && round == kRounds - 1 ? round + 1 : round;
    y[first + row * kThreads + t] = s_turned[t];
    sum += B == kSharedRowTooFar ? s_turned[t + kThreads * (round == 1)] : s_turned[t];
    if (B == kGlobalReadBefore && t == 0 && blockIdx.x == 0) sum += x[-1];
    if (B != kNoBarrierBeforeWrite) __syncthreads();
  }
  if (B == kOtherBlocksRow && t == 0 && blockIdx.x > 0) sum += 0 * y[first - 1];
  if (B == kWriteToInput && t == 3) const_cast<float*>(x)[first] = 1;
  if (B == kNeverWaited) cp_async_4(&s_in[0][t], x, true);
  if (B == kMisaligned && t == 3) store_16(y + first, load_16<Float4>(&s_in[0][t]));

  const unsigned all = B == kLaneNotInMask && t == 33 ? 0x1u : 0xffffffffu;
  for (int step = 16; step > 8; step /= 2) sum += __shfl_down_sync(all, sum, step);
  for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(all, sum, step);
  s_turned[t] = sum;
  if (B != kNoWarpBarrier) __syncwarp();
  if (lane == 1) s_share[t / 32] = s_turned[t - 1];
  if (__syncthreads_or(t == 13) && t == 0) sums[blockIdx.x] = s_share[0] + s_share[1];
}

template <int B>
void launch(int bug, int blocks, const float* x, float* y, float* sums) {
  if (bug == B)
    LAUNCH(trial_kernel<B>, blocks, kThreads, nullptr, x, y, sums);
  else if constexpr (B < kCopyFromAnywhere)
    launch<B + 1>(bug, blocks, x, y, sums);
}

// Barriers and nothing else, to see how fast they are.
__global__ void barrier_kernel(int barriers, int* votes) {
  int vote = 0;
  for (int i = 0; i < barriers; ++i) vote += __syncthreads_or(threadIdx.x + i == 7);
  if (votes && threadIdx.x == 0) votes[blockIdx.x] = vote;
}

// Writes the numbers of the threads in the order in which they pass the barrier, and what its shared memory held
// before.
__global__ void order_kernel(int* next, int* order, uint32_t* fresh) {
  SHARED(uint32_t, s_word, [1]);
  if (threadIdx.x == 0) fresh[blockIdx.x] = s_word[0];
  __syncthreads();
  if (threadIdx.x == 0) s_word[0] = 1;
  order[(*next)++] = (int)(blockIdx.x * blockDim.x + threadIdx.x);
}

// A write after a barrier of its own warp only: the read of another warp is not ordered before it.
__global__ void readers_kernel(float* out) {
  SHARED(float, s_value, [1]);
  const int t = threadIdx.x;
  if (t == 0) s_value[0] = 1;
  __syncthreads();
  out[t] = t == 0 || t == 1 || t == 32 ? s_value[0] : 0;
  __syncwarp();
  if (t == 0) s_value[0] = 2;
}

// A warp for each group of inputs: the fragments as dialect.cuh numbers them, from row-major matrices.
template <typename T>
__global__ void mma_kernel(const uint16_t* a, const uint16_t* b, float* c) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  a += blockIdx.x * 256, b += blockIdx.x * 128, c += blockIdx.x * 128;
  const auto pair = [](uint16_t low, uint16_t high) { return low | uint32_t(high) << 16; };
  uint32_t fa[4], fb[2];
  float fc[4];
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i == 1 || i == 3), k = 2 * t + 8 * (i >= 2);
    fa[i] = pair(a[row * 16 + k], a[row * 16 + k + 1]);
    fc[i] = c[(g + 8 * (i >= 2)) * 8 + 2 * t + i % 2];
  }
  for (int i = 0; i < 2; ++i) fb[i] = pair(b[(2 * t + 8 * i) * 8 + g], b[(2 * t + 8 * i + 1) * 8 + g]);
  mma_16x8x16<T>(fc, fa, fb);
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i >= 2)) * 8 + 2 * t + i % 2] = fc[i];
}

template <typename T>
__global__ void minimum_kernel(const uint32_t* a, const uint32_t* b, uint32_t* out, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i] = minimum2<T>(a[i], b[i]);
}

__global__ void collectives_kernel(int* out) {
  const int t = threadIdx.x;
  int* const row = out + t * 6;
  row[0] = __shfl_xor_sync(0xffffffffu, t * 10, 5);
  row[1] = __shfl_down_sync(0xffffffffu, t * 10, 3);
  row[2] = __shfl_down_sync(0xffffffffu, t * 10, 3, 8);
  row[3] = (int)__ballot_sync(0xffffffffu, t % 3 == 0);
  row[4] = (int)(__shfl_xor_sync(0xffffffffu, t * 1.5, 1) * 2);
  row[5] = t % 32 < 8 ? __shfl_xor_sync(0xffu, t, 7) : -1;
}

const char* result() { return simt::error(); }

}  // namespace

extern "C" {

EXPORTED int trial_bugs() { return kCopyFromAnywhere; }

EXPORTED const char* trial_run(int bug, int blocks, const float* x, float* y, float* sums) {
  simt::clear_error();
  launch<kNone>(bug, blocks, x, y, sums);
  return result();
}

EXPORTED const char* trial_barriers(int blocks, int threads, int barriers, int* votes) {
  simt::clear_error();
  LAUNCH(barrier_kernel, blocks, threads, nullptr, barriers, votes);
  return result();
}

EXPORTED const char* trial_order(int blocks, int threads, int* next, int* order, uint32_t* fresh) {
  simt::clear_error();
  LAUNCH(order_kernel, blocks, threads, nullptr, next, order, fresh);
  return result();
}

EXPORTED const char* trial_readers(float* out) {
  simt::clear_error();
  LAUNCH(readers_kernel, 1, 64, nullptr, out);
  return result();
}

EXPORTED const char* trial_mma(int bfloat16, int count, const uint16_t* a, const uint16_t* b, float* c) {
  simt::clear_error();
  if (bfloat16)
    LAUNCH(mma_kernel<BFloat16>, count, 32, nullptr, a, b, c);
  else
    LAUNCH(mma_kernel<Float16>, count, 32, nullptr, a, b, c);
  return result();
}

EXPORTED const char* trial_minimum(int bfloat16, int count, const uint32_t* a, const uint32_t* b, uint32_t* out) {
  simt::clear_error();
  if (bfloat16)
    LAUNCH(minimum_kernel<BFloat16>, (count + 255) / 256, 256, nullptr, a, b, out, count);
  else
    LAUNCH(minimum_kernel<Float16>, (count + 255) / 256, 256, nullptr, a, b, out, count);
  return result();
}

EXPORTED const char* trial_collectives(int threads, int* out) {
  simt::clear_error();
  LAUNCH(collectives_kernel, 1, threads, nullptr, out);
  return result();
}

EXPORTED float trial_saturated_difference(float a, float b) { return saturated_difference(a, b); }
}
