// The epilogue of the int8 kernels (args/int8.h): sums of |x - w| in registers -> int32, float32 or uint8 in y.
#pragma once
#include "../../args/int8.h"
#include "vector.h"

namespace adderops {
namespace cpu {
namespace {

enum class Residual { kNone, kBytes, kFloats };

// Sums of kW filters of one pixel, of which `lanes` exist, to z of element `at` of y; held by value, in registers,
// where no byte stored to y can change it.
template <Residual residual>
struct Int8Value {
  const void* x;
  vf x_scale, least;
  ALWAYS_INLINE vf operator()(vi sum, vf scale, vf offset, int64_t at, int64_t lanes) const {
    vf z = offset - scale * to_floats(sum);
    if (residual == Residual::kFloats) z = z + x_scale * load_lanes<vf>(static_cast<const float*>(x) + at, lanes);
    if (residual == Residual::kBytes)
      z = z + x_scale * to_floats(load_lanes<vb_quarter>(static_cast<const uint8_t*>(x) + at, lanes));
    return larger(least, z);
  }
};

// Sums [pixel][vector] of a tile, of which `lanes` filters exist, to y from element `at` on.
template <Int8Output output, Residual residual>
inline void int8_epilogue(const Int8Args& args, const vi* sums, int64_t pixels, int64_t vectors, const float* scale,
                          const float* offset, int64_t at, int64_t lanes) {
  const Int8Value<residual> value{args.residual, splat(args.residual_scale), splat(args.least)};
  void* const y = args.y;
  const vf most = splat(args.most);
  const int64_t pitch = args.problem.C_out;
  for (int64_t j = 0; j < vectors; ++j, ++sums, at += kW, lanes -= kW) {
    vf a{}, b{};
    if (output != Int8Output::kSums)
      a = load_lanes<vf>(scale + j * kW, lanes), b = load_lanes<vf>(offset + j * kW, lanes);
    int64_t i = 0;
    if (output == Int8Output::kUInt8 && lanes >= kW)
      for (; i + 4 <= pixels; i += 4) {
        vi bytes[4];
        UNROLL_FOR (q, 4)
          bytes[q] = rounded(smaller(value(sums[(i + q) * vectors], a, b, at + (i + q) * pitch, kW), most));
        store_low_bytes(static_cast<uint8_t*>(y) + at + i * pitch, pitch, bytes);
      }
    for (; i < pixels; ++i) {
      const int64_t to = at + i * pitch;
      if (output == Int8Output::kSums) {
        store_lanes(static_cast<int32_t*>(y) + to, -sums[i * vectors], lanes);
        continue;
      }
      const vf z = value(sums[i * vectors], a, b, to, lanes);
      if (output == Int8Output::kFloat32)
        store_lanes(static_cast<float*>(y) + to, z, lanes);
      else
        store_lanes(static_cast<uint8_t*>(y) + to, low_bytes(rounded(smaller(z, most))), lanes);
    }
  }
}

using Int8Epilogue = void (*)(const Int8Args&, const vi*, int64_t, int64_t, const float*, const float*, int64_t,
                              int64_t);
inline Int8Epilogue int8_epilogue_of(const Int8Args& args) {
  constexpr auto kSums = Int8Output::kSums, kFloat32 = Int8Output::kFloat32, kUInt8 = Int8Output::kUInt8;
  constexpr auto kNone = Residual::kNone, kBytes = Residual::kBytes, kFloats = Residual::kFloats;
  const Residual residual = !args.residual ? kNone : args.float_residual ? kFloats : kBytes;
  if (args.output == kSums) return int8_epilogue<kSums, kNone>;
  if (args.output == kFloat32)
    return residual == kNone    ? int8_epilogue<kFloat32, kNone>
           : residual == kBytes ? int8_epilogue<kFloat32, kBytes>
                                : int8_epilogue<kFloat32, kFloats>;
  return residual == kNone    ? int8_epilogue<kUInt8, kNone>
         : residual == kBytes ? int8_epilogue<kUInt8, kBytes>
                              : int8_epilogue<kUInt8, kFloats>;
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
