// Quantization of floats, any strides, to uint8, channels_last:
//
//   y = round(min(max(x * inverse_scale, -zero_point), quant_max - zero_point)) + zero_point
//
//   x  (N, C, H, W), any strides, float32, bfloat16 or float16       y  (N, H, W, C) bytes
//
//        64 channels                    block   64 pixels x at most 64 channels through shared memory, 256 threads;
//      +-------------+                          beyond 65535 tiles of channels it strides over them
//   64 | c0 c1 c2 .. | write y: along   grid    (tiles of pixels, tiles of channels)
//      | .           | channels
//      | .           |                  read x: along its channels where they are contiguous, else along its pixels
//      +-------------+
//      rows of 64 + 4 bytes: neighbouring pixels in different banks; 4.8 KB with the offsets of the pixels
//
// Tails: pixels and channels beyond the last are neither read nor written.
#pragma once
#include "../args/quantize.h"
#include "dialect.cuh"

namespace adderops {
namespace cuda {

constexpr int kQuantizeThreads = 256, kQuantizePixels = 64, kQuantizeChannels = 64;

template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(QuantizeArgs args) {
  constexpr int kPitch = kQuantizeChannels + 4;  // bytes: neighbouring pixels in different banks
  SHARED(uint8_t, s_bytes, [kQuantizePixels * kPitch]);
  SHARED(int64_t, s_pixels, [kQuantizePixels]);
  const int64_t* const stride = args.x.stride;
  const int64_t pixels = args.N * args.H * args.W, first = (int64_t)blockIdx.x * kQuantizePixels;
  const int count = pixels - first < kQuantizePixels ? (int)(pixels - first) : kQuantizePixels;
  const bool dense = stride[1] == 1;
  const float least = (float)-args.zero_point, most = (float)(args.quant_max - args.zero_point);
  if (threadIdx.x < count) {
    const int64_t pixel = first + threadIdx.x, row = pixel / args.W;
    s_pixels[threadIdx.x] = row / args.H * stride[0] + row % args.H * stride[2] + pixel % args.W * stride[3];
  }
  for (int64_t c0 = (int64_t)blockIdx.y * kQuantizeChannels; c0 < args.C;
       c0 += (int64_t)gridDim.y * kQuantizeChannels) {
    const int channels = args.C - c0 < kQuantizeChannels ? (int)(args.C - c0) : kQuantizeChannels;
    __syncthreads();  // s_pixels is written, and the s_bytes of the previous channels are read
    for (int i = threadIdx.x; i < channels * kQuantizePixels; i += kQuantizeThreads) {
      const int c = dense ? i % channels : i / kQuantizePixels, pixel = dense ? i / channels : i % kQuantizePixels;
      if (pixel >= count) continue;
      const float x = to_float(static_cast<const T*>(args.x.data)[s_pixels[pixel] + (c0 + c) * stride[1]]);
      const float z = x * args.inverse_scale, bounded = z < least ? least : z;  // a NaN passes here, and becomes `most`
      s_bytes[pixel * kPitch + c] = uint8_t(rounded_byte(bounded < most ? bounded : most) + args.zero_point);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < channels * count; i += kQuantizeThreads)
      args.y[(first + i / channels) * args.C + c0 + i % channels] = s_bytes[i / channels * kPitch + i % channels];
  }
}

}  // namespace cuda
}  // namespace adderops
