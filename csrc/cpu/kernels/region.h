// How the passes cut pixels into bands, and which pixels of the input a band reads.
#pragma once
#include "../../args/conv2d.h"
#include "../../sizes.h"
#include "integers.h"

namespace adderops {
namespace cpu {
namespace {

// A box of pixels.  Rows and columns may lie outside the image: zero padding.
struct Region {
  int64_t n0, images, h0, rows, w0, columns;
  int64_t pixels() const { return images * rows * columns; }
};

// Cache blocking: the pixels of N images of H x W, cut into bands of whole images, of rows of one image, or of columns
// of one row.  A band is the share of one task.
struct Bands {
  int64_t N, H, W;
  int64_t images, rows, columns;  // of a band; all rows when images > 1, all columns when rows > 1
  int64_t count;
  int64_t pixels() const { return product(images, rows, columns); }
};

// Bands that read about `budget` floats each, of at least `least` pixels where there are so many; evenly sized.
inline Bands make_bands(int64_t N, int64_t H, int64_t W, int64_t floats_per_row, int64_t budget, int64_t least) {
  Bands b{N, H, W, 1, H, W, 0};
  const int64_t image = product(H, floats_per_row);
  if (image <= budget || H * W <= least) {
    b.images = smaller(N, larger(budget / larger(image, 1), ceil_div(least, H * W)));
    b.images = smaller(N, larger(b.images, 1));
    b.images = ceil_div(N, ceil_div(N, b.images));
  } else {
    b.rows = smaller(H, larger(larger(1, budget / floats_per_row), ceil_div(least, W)));
    b.rows = ceil_div(H, ceil_div(H, b.rows));
    if (b.rows == 1 && floats_per_row > 4 * budget) {
      b.columns = smaller(W, larger(least, product(W, budget) / floats_per_row));
      b.columns = ceil_div(W, ceil_div(W, b.columns));
    }
  }
  b.count = product(ceil_div(N, b.images), ceil_div(H, b.rows), ceil_div(W, b.columns));
  return b;
}

inline Region band_at(const Bands& b, int64_t i) {
  const int64_t across = ceil_div(b.W, b.columns), down = ceil_div(b.H, b.rows);
  const int64_t w0 = i % across * b.columns, h0 = i / across % down * b.rows, n0 = i / across / down * b.images;
  return {n0, smaller(b.images, b.N - n0), h0, smaller(b.rows, b.H - h0), w0, smaller(b.columns, b.W - w0)};
}

// A sum over all pixels is split into at most this many partial sums, each over consecutive bands.  The number depends
// on the arguments alone, and so does the order of every sum.
constexpr int64_t kMostSplits = 16;
inline int64_t split_begin(const Bands& b, int64_t splits, int64_t i) { return b.count * i / splits; }

// A strided 1x1 kernel without padding is a dense one on a strided view: rewrites *p so, and returns the view of x.
inline Operand dense_view(Operand x, Conv2dProblem* p) {
  if (p->KH == 1 && p->KW == 1 && !p->pad_top && !p->pad_left && (p->OH - 1) * p->stride_h < p->H &&
      (p->OW - 1) * p->stride_w < p->W) {
    x.stride[2] *= p->stride_h, x.stride[3] *= p->stride_w;
    p->H = p->OH, p->W = p->OW, p->stride_h = p->stride_w = 1;
  }
  return x;
}

// The part of x that a band of outputs reads.
inline int64_t window_rows(const Conv2dProblem& p, int64_t outputs) {
  return (outputs - 1) * p.stride_h + (p.KH - 1) * p.dilation_h + 1;
}
inline int64_t window_columns(const Conv2dProblem& p, int64_t outputs) {
  return (outputs - 1) * p.stride_w + (p.KW - 1) * p.dilation_w + 1;
}
inline Region window_of(const Conv2dProblem& p, const Region& b) {
  return {b.n0,
          b.images,
          b.h0 * p.stride_h - p.pad_top,
          window_rows(p, b.rows),
          b.w0 * p.stride_w - p.pad_left,
          window_columns(p, b.columns)};
}
inline bool reads_padding(const Conv2dProblem& p) {
  return p.pad_top || p.pad_left || window_rows(p, p.OH) > p.H || window_columns(p, p.OW) > p.W;
}

inline bool is_depthwise(const Conv2dProblem& p) { return p.groups > 1 && p.C_in == p.groups; }

// Where windows hold little but padding, as with a dilation far beyond the image, the plain loops cost less than copies
// of the windows, whose size follows the distance of the taps and not their number.
//   copied    pixels that a kernel would copy, of `channels` each
//   computed  pixels that are summed for, in `lanes` channels, over all taps and channels
//   others    pixels of the other tensor that is read
// A term of a plain loop costs about as much as two copied floats; a copied pixel costs 32 floats more.  Depthwise
// kernels, whose lanes are the channels, cost little compared to the copy.
inline bool is_sparse(const Conv2dProblem& p, int64_t copied, int64_t computed, int64_t others, int64_t channels,
                      int64_t lanes) {
  const int64_t terms = product(computed, p.KH, p.KW), wanted = sum(terms, others);
  if (copied <= larger(1 << 16, product(4, wanted))) return false;
  return copied > product(64, wanted) ||
         (!is_depthwise(p) && product(copied, channels + 32) > product(2, terms, channels, lanes));
}
// A band of outputs reads a window of `rows` x `columns`.
inline bool windows_are_sparse(const Conv2dProblem& p, const Bands& b, int64_t rows, int64_t columns) {
  return is_sparse(p, product(b.count, b.images, rows, columns), product(p.N, p.OH, p.OW), product(p.N, p.H, p.W),
                   p.C_in / p.groups, p.C_out / p.groups);
}
// A band of inputs reaches `rows` x `columns` outputs, visited once per phase.
inline bool outputs_are_sparse(const Conv2dProblem& p, const Bands& b, int64_t rows, int64_t columns, int64_t phases) {
  return is_sparse(p, product(b.count, sum(product(b.images, rows, columns), phases)), product(p.N, p.H, p.W),
                   product(p.N, p.OH, p.OW), p.C_out / p.groups, p.C_in / p.groups);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
