// An operand as the kernels read it: float32, the channels of a pixel contiguous.  Either the tensor itself, or a
// padded copy of the region that a band reads.
#pragma once
#include "rows.h"

namespace adderops {
namespace cpu {
namespace {

struct Input {
  Operand tensor;
  int64_t H, W;   // of its images
  int64_t pitch;  // floats per pixel
  bool in_place;  // float32, channels dense, no padding needed
};

// A pixel pitch of a large power of two would put every row of a tile on the same few cache sets.
inline int64_t copy_pitch(int64_t channels) { return channels % 512 == 0 ? channels + 16 : channels; }

// `padded`: columns or rows outside the image will be read.  `multiple`: channels are read in groups of this size.
inline Input make_input(ElementType type, const Operand& x, int64_t H, int64_t W, int64_t channels, bool padded,
                        int64_t multiple) {
  Input in{x, H, W, 0, false};
  in.in_place = type == ElementType::kFloat32 && x.stride[1] == 1 && !padded && x.stride[3] % 512 != 0 &&
                channels % multiple == 0;
  in.pitch = in.in_place ? x.stride[3] : copy_pitch(channels);
  return in;
}

// Floats of a copy of so many pixels.
inline int64_t copy_floats(const Input& in, int64_t pixels) { return in.in_place ? 0 : product(pixels, in.pitch); }

// Copies channels [c0 + begin, c0 + end) of the region; nothing to do in place.
inline void copy_region(ElementType type, const Input& in, const Region& r, int64_t c0, int64_t begin, int64_t end,
                        float* copy) {
  if (!in.in_place) load_rows(type, in.tensor, in.H, in.W, r, c0 + begin, end - begin, copy + begin, in.pitch);
}

// Pixels in memory: the first one of a region, and the distances to the next pixel, row and image.
template <typename T>
struct View {
  const T* data;
  int64_t pixel, row, image;
  const T* at(int64_t n, int64_t h, int64_t w) const { return data + n * image + h * row + w * pixel; }
};

// The region from channel c0 on: in the tensor, or in its copy.
inline View<float> view_of(const Input& in, const Region& r, int64_t c0, const float* copy) {
  if (!in.in_place) return {copy, in.pitch, r.columns * in.pitch, r.rows * r.columns * in.pitch};
  const int64_t row = in.tensor.stride[2], image = in.tensor.stride[0];
  return {static_cast<const float*>(in.tensor.data) + r.n0 * image + c0 + r.h0 * row + r.w0 * in.pitch, in.pitch, row,
          image};
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
