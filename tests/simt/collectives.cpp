// The collective operations of a warp, computed by the last lane to arrive.
#include "executor.h"
#include "simt.h"

namespace simt {

void combine_nothing(void* const[32], uint32_t) {}

void combine_shuffle(void* const payloads[32], uint32_t mask) {
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    ShuffleLane& lane = *static_cast<ShuffleLane*>(payloads[i]);
    if (!(mask >> lane.source & 1)) fail("lane %d shuffles from lane %d, which is not in the mask", i, lane.source);
    lane.result = static_cast<ShuffleLane*>(payloads[lane.source])->value;
  }
}

void combine_ballot(void* const payloads[32], uint32_t mask) {
  uint64_t votes = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) votes |= static_cast<ShuffleLane*>(payloads[i])->value << i;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) static_cast<ShuffleLane*>(payloads[i])->result = votes;
}

}  // namespace simt

namespace adderops {
namespace cuda {
namespace {

struct MmaLane {
  float (&c)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];
};

// Every product of halves is exact in float32; the sum runs over k upwards, each step rounded to nearest.  The
// hardware's order and rounding differ: no test may rely on more than the sum of sixteen terms and C to float32
// accuracy.
template <typename T>
void combine_mma(void* const payloads[32], uint32_t mask) {
  if (mask != 0xffffffffu) simt::fail("mma_16x8x16 needs all lanes");
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& l = *static_cast<const MmaLane*>(payloads[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i)
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = to_float(T{uint16_t(l.a[i] >> 16 * half)});
      for (int i = 0; i < 2; ++i) b[2 * t + i * 8 + half][g] = to_float(T{uint16_t(l.b[i] >> 16 * half)});
    }
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = l.c[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane) {
    const MmaLane& l = *static_cast<const MmaLane*>(payloads[lane]);
    for (int i = 0; i < 4; ++i) l.c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

}  // namespace

template <typename T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Where where) {
  MmaLane payload = {c, a, b};
  simt::warp_collective(0xffffffffu, "mma_16x8x16", combine_mma<T>, &payload, where);
}
template void mma_16x8x16<Float16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], simt::Where);
template void mma_16x8x16<BFloat16>(float (&)[4], const uint32_t (&)[4], const uint32_t (&)[2], simt::Where);

}  // namespace cuda
}  // namespace adderops
