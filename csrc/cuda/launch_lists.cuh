// What the host sides of the passes over lists of layers share.
#pragma once
#include "features.cuh"
#include "launch.cuh"

namespace adderops {
namespace cuda {

inline ExactDivisor divisor(int64_t d) {
  int shift = 31;
  while (int64_t(1) << (shift - 31) < d) ++shift;
  return {(uint32_t)d, (uint32_t)((uint64_t(1) << shift) / (uint64_t)d + 1), shift};
}
inline Pixels pixels_of(const MomentsArgs& args) {
  return {(int)(args.N * args.H * args.W), divisor(args.W), divisor(args.H)};
}

// The outputs of the student (0) or the teacher (1), with zeros up to a multiple of `width` channels.
inline Feature feature_of(const MomentsArgs& args, int i, int width) {
  const Operand& y = args.y[i];
  return {static_cast<char*>(y.data),
          args.scale[i],
          (uint32_t)y.stride[0],
          (uint32_t)y.stride[1],
          (uint32_t)y.stride[2],
          (uint32_t)y.stride[3],
          (int)args.C[i],
          (int)round_up(args.C[i], width),
          (uint32_t)element_bytes(args.type[i]),
          args.type[i],
          args.centre[i]};
}

// Do neighbouring channels lie side by side, in both layers?
inline Layout pick_layout(const MomentsArgs& args, const Choice& choice) {
  return pick_layout(args.y[0].stride[1] == 1 && args.y[1].stride[1] == 1, choice);
}

}  // namespace cuda
}  // namespace adderops
