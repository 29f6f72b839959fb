// Int8 depthwise layers (C_in == groups; filter c*multiplier + j reads channel c alone).  Lanes are channels.
//
//   Y[n,co,p] = -sum_t |X[n,c,p+t] - W[co,t]|      t = (kh, kw);  then the epilogue of args/int8.h
//
//   x    the window of one band, [image][row][column][channel], channels rounded up to whole vectors; or the tensor
//        itself
//   w    [j][t][channel], likewise
//
//   stage 0: task = pack filter j of every channel
//   stage 1: task = band of output pixels; pixel -> half a vector of channels -> filter j:
//
//     x[pixel + t]  [ kHalfLanes bytes         ]   lanes: channels ->
//     w[j][t]       [ kHalfLanes bytes         ]
//     accumulator   [ kHalfLanes 16-bit lanes  ]   widened to two vectors of 32 bits after at most kMostTerms16 terms
//
// Budget per term: 2 loads, |a - b| on bytes (max, min, sub), a conversion to 16 bits, an add.
// Tails: lanes beyond C_in have zero weights and are never stored.
#pragma once
#include "../../definition/int8.h"
#include "int8_epilogue.h"
#include "int8_input.h"
#include "plan.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int kHalfLanes = kVectorBytes / 2;  // 16-bit lanes of a vector
constexpr int64_t kMostTerms16 = 257;         // * 255 < 2^16

typedef uint8_t vb_half __attribute__((vector_size(kHalfLanes)));
typedef uint16_t vh __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vh_half __attribute__((vector_size(kHalfLanes)));

struct Int8DepthwiseShape {
  Conv2dProblem p;
  int64_t multiplier, taps, channels;  // channels in whole vectors
  Int8Input x;
  Bands bands;
  int64_t rows, columns;  // of the window that a band reads
  struct Shared : Layout {
    Part<uint8_t> w;
  } shared;
  struct Worker : Layout {
    Part<uint8_t> x;
    Part<int64_t> offset;
  } worker;
};

inline Int8DepthwiseShape int8_depthwise_shape(const Int8Args& args) {
  Int8DepthwiseShape f{};
  f.p = args.problem;
  const Conv2dProblem& p = f.p;
  f.multiplier = p.C_out / p.groups, f.taps = product(p.KH, p.KW), f.channels = round_up(p.C_in, kHalfLanes);
  f.x = {{args.x, p.C_in, p.W * p.C_in, p.H * p.W * p.C_in},
         p.H,
         p.W,
         f.channels,
         !reads_padding(p) && f.channels == p.C_in};
  f.bands = make_bands(p.N, p.OH, p.OW, product(p.stride_h, window_columns(p, p.OW), f.channels), kInt8Budget, 16);
  f.rows = window_rows(p, f.bands.rows), f.columns = window_columns(p, f.bands.columns);
  f.shared.add(&f.shared.w, product(f.multiplier, f.taps, f.channels));
  f.worker.add(&f.worker.x, f.x.in_place ? 0 : product(f.bands.images, f.rows, f.columns, f.channels));
  f.worker.add(&f.worker.offset, f.taps);
  return f;
}

inline void int8_depthwise_pack(const Int8Args& args, const Int8DepthwiseShape& f, int64_t j, char* shared, char*) {
  uint8_t* const w = f.shared.w.in(shared) + j * f.taps * f.channels;
  for (int64_t t = 0; t < f.taps; ++t)
    for (int64_t c = 0; c < f.channels; ++c)
      w[t * f.channels + c] = c < f.p.C_in ? args.w[(c * f.multiplier + j) * f.taps + t] : 0;
}

// The sums of one vector of channels at one pixel.
ALWAYS_INLINE void int8_depthwise_sums(const uint8_t* x, const int64_t* offset, int64_t taps, const uint8_t* w,
                                       int64_t pitch, vi (&sums)[2]) {
  sums[0] = sums[1] = vi{};
  for (int64_t t = 0; t < taps;) {
    vh c{};
    for (const int64_t end = smaller(taps, t + kMostTerms16); t < end; ++t) {
      vb_half a, b;
      __builtin_memcpy(&a, x + offset[t], sizeof(a));
      __builtin_memcpy(&b, w + t * pitch, sizeof(b));
      c += __builtin_convertvector((a > b ? a : b) - (a < b ? a : b), vh);
    }
    vh_half halves[2];
    __builtin_memcpy(halves, &c, sizeof(c));
    UNROLL_FOR (i, 2) sums[i] += __builtin_convertvector(halves[i], vi);
  }
}

inline void int8_depthwise_task(const Int8Args& args, const Int8DepthwiseShape& f, int64_t task, char* shared,
                                char* worker) {
  const Conv2dProblem& p = f.p;
  const uint8_t* const packed = f.shared.w.in(shared);
  const Region b = band_at(f.bands, task);
  const View<uint8_t> x = int8_view(args, f.x, window_of(p, b), 0, p.C_in, f.worker.x.in(worker));
  int64_t* const offset = f.worker.offset.in(worker);
  for (int64_t t = 0; t < f.taps; ++t) offset[t] = t / p.KW * p.dilation_h * x.row + t % p.KW * p.dilation_w * x.pixel;

  const Int8Epilogue epilogue = int8_epilogue_of(args);
  const int64_t m = f.multiplier;
  int64_t at = ((b.n0 * p.OH + b.h0) * p.OW + b.w0) * p.C_out;
  for (int64_t n = 0; n < b.images; ++n)
    for (int64_t h = 0; h < b.rows; ++h)
      for (int64_t ow = 0; ow < b.columns; ++ow, at += p.C_out) {
        const uint8_t* pixel = x.at(n, h * p.stride_h, ow * p.stride_w);
        for (int64_t c = 0; c < p.C_in; c += kHalfLanes)
          for (int64_t j = 0; j < m; ++j) {
            vi sums[2];
            int8_depthwise_sums(pixel + c, offset, f.taps, packed + j * f.taps * f.channels + c, f.channels, sums);
            if (m == 1) {
              epilogue(args, sums, 1, ceil_div(smaller(kHalfLanes, p.C_in - c), kW), args.scale + c, args.offset + c,
                       at + c, p.C_in - c);
              continue;
            }
            for (int64_t k = 0; k < smaller(kHalfLanes, p.C_in - c); ++k)
              definition::int8_finish(args, sums[k / kW][k % kW], (c + k) * m + j, at + (c + k) * m + j);
          }
      }
}

inline Plan<Int8Args> int8_depthwise_plan(const Int8Args& args) {
  const Int8DepthwiseShape f = int8_depthwise_shape(args);
  if (windows_are_sparse(f.p, f.bands, f.rows, f.columns)) return kDefinitionKernels.int8(args);
  return make_plan<Int8Args, Int8DepthwiseShape, int8_depthwise_pack, int8_depthwise_task>(f, f.multiplier,
                                                                                           f.bands.count);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
