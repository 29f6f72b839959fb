// First and second moments of the features of pairs of layers (args/moments.h), float32 sums, many layers in a launch:
//
//   out[j][k] = 1 / P * sum_p z[p][j] z[p][k],    out[D][k] = 1 / P * sum_p z[p][k]
//
// One FFMA per term; z is made while it is loaded and never leaves shared memory (features.cuh).  Only the tiles on and
// below the diagonal are computed.  The sum over the pixels is split over blocks, and a second kernel adds up the partial
// sums of the splits in a fixed order, divides, and mirrors:
//   moments_kernel          partial[split][tile][kSide][kSide], and behind them sums[split][padded D]
//                           a block is one split of one tile of one layer; MomentsLayer::first numbers the blocks
//   moments_finish_kernel   a thread is one output of the lower triangle, or one mean
//
//     y (student, teacher), any strides and type         block   a tile of kSide x kSide, 256 threads:
//            |  8 elements per thread and slab
//            v                                            kSide     128   64   32    the smallest that holds D, or 128
//   s_z [2][kPixels][kSide + 4]   a slab: 2048 elements;  kPixels    16   32   64    of a slab
//            |                    off the diagonal two    kGroups     1    4   16    of threads, each sums its own steps
//            +--> multiply_slab                           kSteps     16    8    4    of a group and slab
//                       |
//             acc = fma(z_j, z_k, acc)        thread  8 x 8 accumulators of its group
//                       |
//             the groups, in order, through shared memory -> partial[split][tile]
//
//   s_places [2][2][kPixels]   where the pixels of a slab lie in student and teacher, two slabs ahead
//   s_sources [2][kMomentsWarps]   of several tiles: what each warp copies of
//
// A slab arrives in parts, each in flight while a part of the products is computed: of the rows' features, then, off
// the diagonal, of the columns'.  A layer of a single tile has a kernel without the latter.  Tails: pixels beyond the last
// are zeros in z; features that are padding are not stored.
#pragma once
#include "features.cuh"

namespace adderops {
namespace cuda {

constexpr int kMomentsThreads = 256, kMomentsWarps = 8;

template <int Side>
struct MomentsTile {
  using Products = Tile<Side, Side, 8, 8, 2>;  // of a group
  static constexpr int kSide = Side, kPixels = 2048 / Side, kPitch = Side + 4;
  static constexpr int kGroups = kMomentsThreads / Products::kThreads, kSteps = kPixels / kGroups;
  static constexpr int kWidth = Side / kMomentsWarps;  // channels that a warp copies
  static constexpr int kSlabFloats = kPixels * kPitch;
};

struct MomentsLayer {
  Feature y[2];
  float *partial, *sums;
  float* out;
  Pixels pixels;
  int D, tiles;               // with the padding; tiles on and below the diagonal
  int splits, slabs;          // of pixels; of a split
  int first, first_finished;  // blocks of this launch before this layer's, and of the finishing kernel
};
constexpr int kMomentsLayers = 20;  // kernel arguments are limited to 4 KB
struct MomentsList {
  MomentsLayer layers[kMomentsLayers];
  int count;
  bool exponential;
};
static_assert(sizeof(MomentsList) <= 4096 - 64, "what a launch takes");

// Row and column of a tile on or below the diagonal.
__device__ __forceinline__ void tile_at(int tile, int* row, int* column) {
  *row = 0;
  while (tile > *row) tile -= ++*row;
  *column = tile;
}

// Several: tiles of a layer.
template <int Side, bool Several, Layout L>
__global__ void __launch_bounds__(kMomentsThreads, MomentsTile<Side>::Products::kBlocks)
    moments_kernel(MomentsList list) {
  using M = MomentsTile<Side>;
  using Products = typename M::Products;
  using Loader = FeatureLoader<32, M::kWidth, M::kPixels, L>;
  constexpr int kOperand = M::kSlabFloats * 2;  // floats between rows' and columns' slabs
  SHARED(float, s_z, [(Several ? 2 : 1) * kOperand]);
  SHARED(uint32_t, s_places, [2][2][M::kPixels]);
  SHARED(CopySource, s_sources, [2][Several ? kMomentsWarps : 1]);
  int at = 0;
  while (at + 1 < list.count && (int)blockIdx.x >= list.layers[at + 1].first) ++at;
  const MomentsLayer& layer = list.layers[at];
  const bool exponential = list.exponential;
  const int block = (int)blockIdx.x - layer.first, tile = block % layer.tiles, split = block / layer.tiles;
  int row = 0, column = 0;
  if (Several) tile_at(tile, &row, &column);
  const bool diagonal = !Several || row == column;
  const int warp = threadIdx.x / 32, first_pixel = split * layer.slabs * M::kPixels;

  const auto find_pixels = [&](int slab) {
    if (threadIdx.x >= M::kPixels) return;
    const int pixel = first_pixel + slab * M::kPixels + (int)threadIdx.x;
    uint32_t n, h, w;
    layer.pixels.at(pixel < layer.pixels.count ? pixel : 0, &n, &h, &w);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      s_places[slab % 2][i][threadIdx.x] = n * layer.y[i].stride_n + h * layer.y[i].stride_h + w * layer.y[i].stride_w;
  };
  // The channels of this warp, in a row or column of tiles.
  const Loader loader(threadIdx.x % 32);
  CopySource own_source = copy_source(layer.y, exponential, row * M::kSide + warp * M::kWidth);
  if (Several && threadIdx.x % 32 == 0) {
    s_sources[0][warp] = own_source;
    s_sources[1][warp] = copy_source(layer.y, exponential, column * M::kSide + warp * M::kWidth);
  }
  // A slab is copied in parts: of the rows' features, then, off the diagonal, of the columns'.
  constexpr int kPartsOfSide = kShortOfRegisters ? 2 : 1, kCopies = Loader::kCopies / kPartsOfSide;
  constexpr int kParts = kPartsOfSide * (Several ? 2 : 1), kSteps = M::kSteps / (kParts < 2 ? 2 : kParts);
  const int parts = diagonal ? kPartsOfSide : kParts;
  uint32_t bits[kCopies];
  const int left = layer.pixels.count - first_pixel;  // pixels of this split and the next ones
  const auto source_of = [&](int part) -> const CopySource& {
    return Several ? s_sources[part / kPartsOfSide][warp] : own_source;
  };
  const auto load = [&](int part, int slab) {
    const CopySource& source = source_of(part);
    const uint32_t* const places = s_places[slab % 2][source.of_teacher];
    part % kPartsOfSide ? loader.template load<kCopies>(source, places, bits)
                        : loader.template load<0>(source, places, bits);
  };
  const auto store = [&](int part, int slab) {
    float* const s_slab = s_z + part / kPartsOfSide * kOperand + slab % 2 * M::kSlabFloats + warp * M::kWidth;
    part % kPartsOfSide ? loader.template store<kCopies, M::kPitch, 1>(source_of(part), s_slab, bits, exponential)
                        : loader.template store<0, M::kPitch, 1>(source_of(part), s_slab, bits, exponential);
    const int pixels = left - slab * M::kPixels;
    if (pixels >= M::kPixels) return;
    const int first = part % kPartsOfSide * kCopies;
    for (int i = first; i < first + kCopies; ++i) {
      const int pixel = loader.pixel + i * Loader::kPixelStep;
      if (pixel >= pixels) s_slab[pixel * M::kPitch + loader.channel + i * Loader::kChannelStep] = 0;
    }
  };

  const int slabs_left = (left + M::kPixels - 1) / M::kPixels;
  const int slabs = slabs_left < layer.slabs ? slabs_left : layer.slabs;
  find_pixels(0);
  if (1 < slabs) find_pixels(1);
  __syncthreads();
#pragma unroll
  for (int part = 0; part < kParts; ++part)
    if (part < parts) load(part, 0), store(part, 0);
  __syncthreads();

  const int group = threadIdx.x / Products::kThreads;
  const ThreadTile<Products> own(threadIdx.x % Products::kThreads);
  float acc[8][8] = {};
  float sum = 0;  // of channel threadIdx.x % kSide, over some steps of each slab
  constexpr int kSumSteps = M::kPixels / (kMomentsThreads / M::kSide);
  const auto product = [](float sum, float a, float b, int, int) { return fmaf(a, b, sum); };
  for (int slab = 0; slab < slabs; ++slab) {
    // the 64 x 64 tile would spill
    const unsigned thread = Side == 64 ? thread_index() : threadIdx.x;
    const ThreadTile<Products> own(thread % Products::kThreads);
    const float* const s_rows = s_z + slab % 2 * M::kSlabFloats + thread / Products::kThreads * M::kSteps * M::kPitch;
    const float* const s_columns = diagonal ? s_rows : s_rows + kOperand;
    const int arriving = slab + 1 < slabs ? parts : 0;
#pragma unroll
    for (int step = 0; step < M::kSteps; step += kSteps) {
      const int part = step / kSteps, at = step * M::kPitch;
      if (part < arriving) load(part, slab + 1);
      multiply_slab<Products, M::kPitch, M::kPitch, kSteps>(acc, s_rows + at + own.m0, s_columns + at + own.n0,
                                                            product);
      if (part < arriving) store(part, slab + 1);
    }
    if (diagonal) {
      const unsigned thread = thread_index();  // not held in a register
      const float* const from =
          s_z + slab % 2 * M::kSlabFloats + thread / M::kSide * kSumSteps * M::kPitch + thread % M::kSide;
#pragma unroll
      for (int k = 0; k < kSumSteps; ++k) sum += from[k * M::kPitch];
    }
    if (slab + 2 < slabs) find_pixels(slab + 2);  // in the places of this slab's pixels, which nobody reads
    __syncthreads();
  }

  float* const to = layer.partial + (int64_t)block * (M::kSide * M::kSide);
  if constexpr (M::kGroups == 1) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; j += 4)
        store_16(to + own.m(i) * M::kSide + own.n(j), Float4{{acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]}});
  } else {
    // as many groups at a time as shared memory holds
    constexpr int kOutputs = M::kSide * M::kSide, kAtOnce = kOperand / kOutputs, kOwn = kOutputs / kMomentsThreads;
    float total[kOwn] = {};
#pragma unroll 1
    for (int first = 0; first < M::kGroups; first += kAtOnce) {
      if (group >= first && group < first + kAtOnce) {
        float* const s_outputs = s_z + (group - first) * kOutputs;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < 8; j += 4)
            store_16(s_outputs + own.m(i) * M::kSide + own.n(j),
                     Float4{{acc[i][j], acc[i][j + 1], acc[i][j + 2], acc[i][j + 3]}});
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kOwn; ++i)
        for (int g = 0; g < kAtOnce; ++g) total[i] += s_z[g * kOutputs + i * kMomentsThreads + threadIdx.x];
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) to[i * kMomentsThreads + threadIdx.x] = total[i];
  }
  if (!diagonal) return;
  s_z[threadIdx.x] = sum;
  __syncthreads();
  const int channel = row * M::kSide + (int)threadIdx.x;
  if (threadIdx.x >= M::kSide || channel >= layer.D) return;
  float total = 0;
  for (int i = threadIdx.x; i < kMomentsThreads; i += M::kSide) total += s_z[i];
  layer.sums[(int64_t)split * layer.D + channel] = total;
}

// The sum of `count` numbers that lie `stride` floats apart: four sums of every fourth, then those.
__device__ __forceinline__ float sum_of_splits(const float* from, int64_t stride, int count) {
  float sums[4] = {};
  int i = 0;
  for (; i + 4 <= count; i += 4)
#pragma unroll
    for (int u = 0; u < 4; ++u) sums[u] += from[(i + u) * stride];
  for (; i < count; ++i) sums[0] += from[i * stride];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <int Side>
__global__ void __launch_bounds__(kMomentsThreads) moments_finish_kernel(MomentsList list) {
  constexpr int kOutputs = Side * Side;
  int at = 0;
  while (at + 1 < list.count && (int)blockIdx.x >= list.layers[at + 1].first_finished) ++at;
  const MomentsLayer& layer = list.layers[at];
  const float inverse = 1.f / (float)layer.pixels.count;
  const int C_a = layer.y[0].C, padded = layer.y[0].padded, D = C_a + layer.y[1].C;
  // the number of a feature without the zeros, or -1 for one of those
  const auto feature = [&](int j) {
    if (j < padded) return j < C_a ? j : -1;
    return j - padded < layer.y[1].C ? j - padded + C_a : -1;
  };
  const int64_t i = ((int64_t)blockIdx.x - layer.first_finished) * kMomentsThreads + threadIdx.x;
  const int64_t products = (int64_t)layer.tiles * kOutputs;
  if (i < products) {
    int row, column;
    tile_at((int)(i / kOutputs), &row, &column);
    const int place = (int)(i % kOutputs), j = row * Side + place / Side, k = column * Side + place % Side;
    const int to_j = feature(j), to_k = feature(k);
    if (k > j || to_j < 0 || to_k < 0) return;
    const float mean = sum_of_splits(layer.partial + i, products, layer.splits) * inverse;
    layer.out[(int64_t)to_j * D + to_k] = mean;
    layer.out[(int64_t)to_k * D + to_j] = mean;
  } else if (i - products < layer.D) {
    const int k = (int)(i - products), to_k = feature(k);
    if (to_k >= 0) layer.out[(int64_t)D * D + to_k] = sum_of_splits(layer.sums + k, layer.D, layer.splits) * inverse;
  }
}

}  // namespace cuda
}  // namespace adderops
