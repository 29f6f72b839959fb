// The input of the int8 kernels: uint8, channels last, in one piece.  Either the tensor itself, or a padded copy of the
// region that a band reads.
#pragma once
#include "../../args/int8.h"
#include "input.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int64_t kInt8Budget = 48 * 1024;  // bytes of input per band

struct Int8Input {
  View<uint8_t> tensor;  // from image 0 on
  int64_t H, W;          // of its images
  int64_t pitch;         // bytes per pixel as the kernel reads them
  bool in_place;         // no padding or rounding up of channels needed
};

// Channels [c0, c0 + channels) of the region: in the tensor, or copied to [image][row][column][pitch] with
// `args.padding` outside the image.
inline View<uint8_t> int8_view(const Int8Args& args, const Int8Input& in, const Region& r, int64_t c0, int64_t channels,
                               uint8_t* copy) {
  const View<uint8_t>& x = in.tensor;
  if (in.in_place) return {x.at(r.n0, r.h0, r.w0) + c0, x.pixel, x.row, x.image};
  const int64_t pitch = in.pitch, row = r.columns * pitch;
  const int64_t left = smaller(r.columns, larger(0, -r.w0)), right = larger(left, smaller(r.columns, in.W - r.w0));
  uint8_t* to = copy;
  for (int64_t n = r.n0; n < r.n0 + r.images; ++n)
    for (int64_t h = r.h0; h < r.h0 + r.rows; ++h, to += row) {
      const bool outside = h < 0 || h >= in.H;
      const int64_t begin = outside ? r.columns : left, end = outside ? r.columns : right;
      __builtin_memset(to, args.padding, (size_t)(begin * pitch));
      __builtin_memset(to + end * pitch, args.padding, (size_t)((r.columns - end) * pitch));
      if (begin == end) continue;
      const uint8_t* from = x.at(n, h, r.w0 + begin) + c0;
      if (pitch == x.pixel)
        __builtin_memcpy(to + begin * pitch, from, (size_t)((end - begin) * pitch));
      else
        for (int64_t j = begin; j < end; ++j, from += x.pixel) __builtin_memcpy(to + j * pitch, from, (size_t)channels);
    }
  return {copy, pitch, row, r.rows * row};
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
