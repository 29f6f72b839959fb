// What the kernels of moments.cuh and moments_grad.cuh share: the outputs of a student's and a teacher's layer, read as
// they are and turned into features z (args/moments.h) on their way into shared memory.
//
//   z = exp2(min(y * scale * log2(e), 10 log2(e))) - centre, or y * scale - centre: one MUFU.EX2 per element loaded.
//   The relative error of e^x is at most 2^-22 (MUFU.EX2) + 1.2 |x| 2^-23 (the exponent, rounded twice, and log2(e)).
//
// The features of a pixel are [student's channels, padding | teacher's channels, padding], each of the two up to a
// multiple of the channels that a warp, or a slab, copies: then a copy concerns one of the two.  Padding repeats the last
// channel; what is computed of it is not stored, or has the weight zero.  Pixels beyond the last repeat the first.
//
// Layout (tile.cuh): kChannelsLast, neighbouring threads read neighbouring channels, where both layers have them side by
// side; kStrided, neighbouring pixels, whatever the strides.  The two layers may differ in type: a load is one of two
// predicated instructions.
#pragma once
#include "../args/moments.h"
#include "tile.cuh"

namespace adderops {
namespace cuda {

constexpr float kLog2E = 1.44269504f;
constexpr float kMostExponent = 10.f * kLog2E;

// n / d and n % d for n below 2^31: n * factor / 2^shift exceeds n / d by less than 1 / d.
struct ExactDivisor {
  uint32_t d, factor;  // 2^shift / d, rounded down, plus 1
  int shift;           // 31 + log2(d), rounded up
  __device__ __forceinline__ void divide(uint32_t n, uint32_t* quotient, uint32_t* rest) const {
    *quotient = (uint32_t)((uint64_t)n * factor >> shift);
    *rest = n - *quotient * d;
  }
};

// The outputs of one of the two layers.  An element's place is below 2^32: strides count elements modulo that.
struct Feature {
  char* data;
  const float* scale;
  uint32_t stride_n, stride_c, stride_h, stride_w;
  int C, padded;   // channels, and with the padding
  uint32_t bytes;  // of an element: a factor that is read costs one instruction, one that is chosen three
  ElementType type;
  float centre;
};
// Its pixels, which are those of the other layer too.
struct Pixels {
  int count;
  ExactDivisor by_W, by_H;
  __device__ __forceinline__ void at(uint32_t pixel, uint32_t* n, uint32_t* h, uint32_t* w) const {
    uint32_t row;
    by_W.divide(pixel, &row, w);
    by_H.divide(row, n, h);
  }
};

__device__ __forceinline__ float value_of_bits(uint32_t bits, ElementType type) {
  const float half = to_float(Float16{(uint16_t)bits});
  const float other = float_from_bits(bits << (type == ElementType::kFloat32 ? 0 : 16));
  return type == ElementType::kFloat16 ? half : other;
}
// The largest x that feature_of() takes as it is.
__device__ __forceinline__ float feature_limit(bool exponential) {
  return exponential ? kMostExponent : float_from_bits(0x7f800000u);
}
// phi(scale * v); a NaN stays one.
__device__ __forceinline__ float feature_of(float v, float scale, float limit, bool exponential) {
  const float x = v * scale;
  return exp2_or_same(x > limit ? limit : x, exponential);
}

// What a warp, or a block, copies of: in shared memory where registers are short.
struct alignas(16) CopySource {
  const char* data;
  uint32_t stride_c, bytes;
  float scale, centre;
  ElementType type;
  int of_teacher;  // else of the student
  int from, last;  // channels: the first to copy; the last there is, which padding repeats
};
// Features [feature, feature + the width of a copy) of the two layers.
__device__ __forceinline__ CopySource copy_source(const Feature (&y)[2], bool exponential, int feature) {
  const int of_teacher = feature >= y[0].padded;
  const Feature& f = y[of_teacher];
  const float scale = exponential ? *f.scale * kLog2E : *f.scale;
  const int from = of_teacher ? feature - y[0].padded : feature;
  return {f.data, f.stride_c, f.bytes, scale, f.centre, f.type, of_teacher, from, f.C - 1};
}

// A thread's share of copying a slab of `Width` channels of `PixelCount` pixels, which `Workers` threads copy: kCopies
// elements, of pixel + i * kPixelStep and channel + i * kChannelStep.
template <int Workers, int Width, int PixelCount, Layout L>
struct FeatureLoader {
  static constexpr int kCopies = Width * PixelCount / Workers;
  // lanes side by side along the pixels; the copies continue where the lanes end
  static constexpr bool kAlongPixels = L == Layout::kChannelsLast || PixelCount > Workers;
  static constexpr int kLanes = kAlongPixels ? Workers / Width : PixelCount;
  static constexpr int kPixelStep = kAlongPixels ? kLanes : 0, kChannelStep = kAlongPixels ? 0 : Workers / kLanes;
  static_assert(Workers % Width == 0 && Workers % kLanes == 0, "copies at equal distances");

  int pixel, channel;  // of the first copy

  __device__ __forceinline__ explicit FeatureLoader(int worker)
      : pixel(L == Layout::kChannelsLast ? worker / Width : worker % kLanes),
        channel(L == Layout::kChannelsLast ? worker % Width : worker / kLanes) {}

  // Copies [First, First + Count); `places` of the slab's pixels.
  template <int First, int Count>
  __device__ __forceinline__ void load(const CopySource& source, const uint32_t* places,
                                       uint32_t (&bits)[Count]) const {
    const int wanted = source.from + channel, last = source.last, first = wanted < last ? wanted : last;
    const uint32_t stride_c = forgotten(source.stride_c), at = (uint32_t)first * stride_c;
    const char* const data = source.data;
    const uint32_t bytes = source.bytes;
    const bool four = source.type == ElementType::kFloat32;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      constexpr int kStep = kChannelStep;
      const int on = (First + i) * kStep < last - first ? (First + i) * kStep : last - first;
      const uint32_t place = at + places[pixel + (First + i) * kPixelStep] + (kStep ? on * stride_c : 0);
      bits[i] = load_4_or_2(data + (uint64_t)place * bytes, four);
    }
  }
  // Those to slab[pixel * PixelPitch + channel * ChannelPitch].
  template <int First, int PixelPitch, int ChannelPitch, int Count>
  __device__ __forceinline__ void store(const CopySource& source, float* slab, const uint32_t (&bits)[Count],
                                        bool exponential) const {
    float* const to = slab + pixel * PixelPitch + channel * ChannelPitch;
    const float limit = feature_limit(exponential), scale = source.scale, centre = source.centre;
    const ElementType type = source.type;
#pragma unroll
    for (int i = 0; i < Count; ++i)
      to[(First + i) * (kPixelStep * PixelPitch + kChannelStep * ChannelPitch)] =
          feature_of(value_of_bits(bits[i], type), scale, limit, exponential) - centre;
  }
};

}  // namespace cuda
}  // namespace adderops
