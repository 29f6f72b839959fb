// The gradient of a loss that depends on moments (args/moments.h) by the student's output, many layers in a launch:
//
//   grad_y[c][p] = phi'(p, c) * (weights[D][c] + sum_j weights[j][c] z[p][j])
//   weights[j][c] = scale_a / P * (grad[j][c] + grad[c][j]),    weights[D][c] = scale_a / P * grad[D][c]
//
// One FFMA per term.  phi' is e^x, the student's feature before its centre, which is made again from y at the end.
//   moments_weights_kernel    weights, [j, with the zeros of z][c, to whole tiles], and behind them weights[D]
//   moments_grad_kernel       a block is one tile of one layer; MomentsGradLayer::first numbers the blocks
//
//      weights                  y (student, teacher), any strides and type      block   kM channels c x 128 pixels;
//         | 16 bytes, cp.async     | 8 elements at a time                              kM: 16, 32 or 64
//         v                        v
//   s_weights [2][kSlab][kM]   s_z [2][kSlab][kN + 4]     A slab is 16 features j of one of the two layers.  The next one
//         |                        |                      arrives while this one is multiplied.
//         +----> multiply_slab <---+
//                     |
//       acc = fma(weights, z, acc)    registers; through shared memory, kRows channels at a time, to global memory in
//                                     the order of grad_y
//
//   s_places [3][kN]   where the block's pixels lie in student, teacher and grad_y
//
// Tails: features that are padding have the weight zero; pixels and channels beyond the last are neither read nor written.
#pragma once
#include "features.cuh"
#include "implicit_gemm.cuh"

namespace adderops {
namespace cuda {

struct MomentsGradLayer {
  Feature y[2];
  const float* grad;  // (D + 1, D)
  float* weights;
  char* out;
  uint32_t stride_n, stride_c, stride_h, stride_w;  // of out
  Pixels pixels;
  int pitch, tiles;          // channels of a row of weights; tiles of channels
  int first, first_weights;  // blocks of this launch before this layer's, and of the kernel of the weights
};
constexpr int kMomentsGradLayers = 18;  // kernel arguments are limited to 4 KB
struct MomentsGradList {
  MomentsGradLayer layers[kMomentsGradLayers];
  int count;
  bool exponential;
};
static_assert(sizeof(MomentsGradList) <= 4096 - 64, "what a launch takes");

constexpr int kWeightsThreads = 256;

__global__ void __launch_bounds__(kWeightsThreads) moments_weights_kernel(MomentsGradList list) {
  int at = 0;
  while (at + 1 < list.count && (int)blockIdx.x >= list.layers[at + 1].first_weights) ++at;
  const MomentsGradLayer& layer = list.layers[at];
  const int64_t i = ((int64_t)blockIdx.x - layer.first_weights) * kWeightsThreads + threadIdx.x;
  const int j = (int)(i / layer.pitch), c = (int)(i % layer.pitch);
  const int C_a = layer.y[0].C, padded = layer.y[0].padded, features = padded + layer.y[1].padded;
  if (j > features) return;
  const bool teacher = j >= padded;
  const int channel = teacher ? j - padded : j, D = C_a + layer.y[1].C;
  const float factor = *layer.y[0].scale / (float)layer.pixels.count;
  float weight = 0;
  if (c < C_a) {
    if (j == features)
      weight = layer.grad[(int64_t)D * D + c] * factor;
    else if (channel < layer.y[teacher].C) {
      const int k = teacher ? channel + C_a : channel;
      weight = (layer.grad[(int64_t)k * D + c] + layer.grad[(int64_t)c * D + k]) * factor;
    }
  }
  layer.weights[i] = weight;
}

template <typename Tile, Layout L>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) moments_grad_kernel(MomentsGradList list) {
  using Loader = FeatureLoader<Tile::kThreads, kSlab, Tile::kN, L>;
  constexpr int kPitch = Tile::kN + 4, kSlabFloats = kSlab * kPitch, kWeights = kSlab * Tile::kM;
  constexpr int kCopies = Loader::kCopies / 2, kSteps = kSlab / 2;
  SHARED(float, s_z, [2 * kSlabFloats]);
  SHARED(float, s_weights, [2 * kWeights]);
  SHARED(uint32_t, s_places, [3][Tile::kN]);
  int at = 0;
  while (at + 1 < list.count && (int)blockIdx.x >= list.layers[at + 1].first) ++at;
  const MomentsGradLayer& layer = list.layers[at];
  const bool exponential = list.exponential;
  const int block = (int)blockIdx.x - layer.first, m0 = block % layer.tiles * Tile::kM;
  const int pixel0 = block / layer.tiles * Tile::kN, pixels = layer.pixels.count - pixel0;
  for (int i = threadIdx.x; i < Tile::kN; i += Tile::kThreads) {
    uint32_t n, h, w;
    layer.pixels.at(i < pixels ? pixel0 + i : 0, &n, &h, &w);
#pragma unroll
    for (int k = 0; k < 2; ++k)
      s_places[k][i] = n * layer.y[k].stride_n + h * layer.y[k].stride_h + w * layer.y[k].stride_w;
    s_places[2][i] = n * layer.stride_n + h * layer.stride_h + w * layer.stride_w;
  }
  const Loader loader(threadIdx.x);
  CopySource source = copy_source(layer.y, exponential, 0);
  uint32_t bits[kCopies];
  const char* weights = reinterpret_cast<const char*>(layer.weights + m0);
  const auto load_next_weights = [&](float* slab) {
    load_weights<Tile>(weights, layer.pitch, slab);
    weights += (int64_t)kSlab * layer.pitch * 4;
    cp_async_commit();
  };
  const auto load_half = [&] { loader.template load<0>(source, s_places[source.of_teacher], bits); };
  const auto load_rest = [&] { loader.template load<kCopies>(source, s_places[source.of_teacher], bits); };
  const auto store_half = [&](float* s_slab) {
    loader.template store<0, 1, kPitch>(source, s_slab, bits, exponential);
  };
  const auto store_rest = [&](float* s_slab) {
    loader.template store<kCopies, 1, kPitch>(source, s_slab, bits, exponential);
  };

  const ThreadTile<Tile> own;
  float acc[Tile::kThreadM][Tile::kThreadN] = {};
  const auto product = [](float sum, float weight, float z, int, int) { return fmaf(weight, z, sum); };
  const int slabs = (layer.y[0].padded + layer.y[1].padded) / kSlab;
  load_next_weights(s_weights);
  __syncthreads();
  load_half(), store_half(s_z);
  load_rest(), store_rest(s_z);
  for (int slab = 0; slab < slabs; ++slab) {
    const float* const s_now = s_z + slab % 2 * kSlabFloats + own.n0;
    const float* const s_weights_now = s_weights + slab % 2 * kWeights + own.m0;
    float* const s_next = s_z + (slab + 1) % 2 * kSlabFloats;
    const bool more = slab + 1 < slabs;
    cp_async_wait<0>();
    __syncthreads();
    if (more) {
      load_next_weights(s_weights + (slab + 1) % 2 * kWeights);
      source = copy_source(layer.y, exponential, (slab + 1) * kSlab);
      load_half();
    }
    multiply_slab<Tile, Tile::kM, kPitch, kSteps>(acc, s_weights_now, s_now, product);
    if (more) store_half(s_next), load_rest();
    multiply_slab<Tile, Tile::kM, kPitch, kSteps>(acc, s_weights_now + kSteps * Tile::kM, s_now + kSteps * kPitch,
                                                  product);
    if (more) store_rest(s_next);
  }

  // the tile, kRows channels at a time, in the places of s_z
  constexpr int kRows = Tile::kM < 32 ? Tile::kM : 32;
  const Feature& student = layer.y[0];
  const float* const bias = layer.weights + (int64_t)(student.padded + layer.y[1].padded) * layer.pitch;
  const float scale = *student.scale * kLog2E;
  const ElementType type = student.type;
  const uint32_t bytes = student.bytes;
#pragma unroll
  for (int first = 0; first < Tile::kM; first += kRows) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < Tile::kThreadM; ++i)
      if (own.m(i) >= first && own.m(i) < first + kRows) {
#pragma unroll
        for (int j = 0; j < Tile::kThreadN; ++j) s_z[(own.m(i) - first) * kPitch + own.n(j)] = acc[i][j];
      }
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * Tile::kN; i += Tile::kThreads) {
      constexpr bool kLast = L == Layout::kChannelsLast;
      const int row = kLast ? i % kRows : i / Tile::kN, pixel = kLast ? i / kRows : i % Tile::kN;
      const int c = m0 + first + row;
      if (c >= student.C || pixel >= pixels) continue;
      float v = s_z[row * kPitch + pixel] + bias[c];
      if (exponential) {
        const uint32_t place = s_places[0][pixel] + c * student.stride_c;
        const uint32_t y = load_4_or_2(student.data + (uint64_t)place * bytes, type == ElementType::kFloat32);
        v *= feature_of(value_of_bits(y, type), scale, kMostExponent, true);
      }
      char* const to = layer.out + (uint64_t)(s_places[2][pixel] + c * layer.stride_c) * bytes;
      if (type == ElementType::kFloat32) store_float(reinterpret_cast<float*>(to), v);
      if (type == ElementType::kFloat16) store_float(reinterpret_cast<Float16*>(to), v);
      if (type == ElementType::kBFloat16) store_float(reinterpret_cast<BFloat16*>(to), v);
    }
  }
}

}  // namespace cuda
}  // namespace adderops
