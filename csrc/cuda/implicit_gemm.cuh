// The main loop that forward and grad_x share, an implicit matrix product (no im2col matrix): over the taps of a filter
// and the channels of the source S, which is X in forward and dY in grad_x,
//
//   acc[m][pixel] = term(acc, W[tap, channel, m], S[channel, window of the pixel, tap])
//
//            packed weights            source, any strides           A slab is kSlab channels of one tap.  Two of each
//         [tap][channel][m]            [n][c][h][w]                  operand are in shared memory: slab s is computed
//               | 16 bytes, cp.async      | 4 or 16 bytes            while slab s + 1 arrives.
//               v                         v
//   s_weights [kSlab][kM]      s_pixels [kSlab][kN + 4]              One barrier per slab: after it slab s is
//               |                         |                          complete, and no thread still reads slab s - 1,
//               +---> multiply_slab <-----+                          whose place slab s + 1 takes.
//                          |
//                     acc, registers                                 Taps of a pixel outside the image, and channels
//                                                                    beyond the last, are copied as zeros.
//
// Loading pixels: kStrided, neighbouring threads copy neighbouring pixels, 4 bytes each, asynchronously (halves
// through registers); kChannelsLast, 16 bytes of channels each, through registers, where they are transposed.  The
// four floats of padding keep those stores free of bank conflicts.  The predicate, whether a pixel's tap lies inside
// the image, is computed once per tap.
#pragma once
#include "pack.cuh"

namespace adderops {
namespace cuda {

// The same for all threads, so the host computes it: kernel parameters cost a thread neither an instruction nor a
// register.
struct GemmParams {
  const void* source;
  int64_t stride_n, stride_c, stride_h, stride_w;  // of source, in bytes
  int H, W, channels;                              // of source; channels of a group
  int taps_h, taps_w;
  int dilation_h, dilation_w;  // tap (i, j) reads source at (h + i*dilation_h, w + j*dilation_w); negative in grad_x
  int slabs;                   // of all taps
  // bytes from one slab of source to the next: of the same tap, of the next tap, of the next row of taps
  int64_t next_slab, next_tap, next_tap_row;
  int64_t next_weights, next_weights_tap, next_weights_tap_row;
  int64_t first_weights;  // bytes from a group's first slab of weights to that of tap (0, 0)
};

// A thread's pointers into the source, one for each pixel that it copies, and the predicates of the current tap.  Where
// registers are short, the positions of several pixels, which are read once per tap, lie in shared memory.
template <int Count, int Threads>
struct TapIterator {
  struct alignas(8) Position {
    int h, w;
  };
  static constexpr bool kInShared = kShortOfRegisters && Count > 1;
  const char* pointer[Count];
  Position kept[kInShared ? 1 : Count];
  bool inside[Count];

  static __device__ __forceinline__ Position* in_shared() {
    SHARED(Position, s_positions, [kInShared ? Count * Threads : 1]);
    return s_positions + thread_index();
  }
  __device__ __forceinline__ void set_window(int i, const char* source, const Window& window) {
    if constexpr (kInShared)
      in_shared()[i * Threads] = {window.h, window.w};
    else
      kept[i] = {window.h, window.w};
    pointer[i] = source + window.offset;
  }
  __device__ __forceinline__ void set_tap(const GemmParams& params, int tap_i, int tap_j) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      Position position;
      if constexpr (kInShared)
        position = in_shared()[i * Threads];
      else
        position = kept[i];
      inside[i] = (unsigned)(position.h + tap_i * params.dilation_h) < (unsigned)params.H &&
                  (unsigned)(position.w + tap_j * params.dilation_w) < (unsigned)params.W;
    }
  }
  __device__ __forceinline__ void advance(int64_t bytes) {
#pragma unroll
    for (int i = 0; i < Count; ++i) pointer[i] += bytes;
  }
};

// A thread's share of copying a slab of pixels.  A copy is kVector channels of one pixel.
//   kStrided:      copy = part * kN + pixel        a thread's next copy: the same pixel, kNextPart parts on
//   kChannelsLast: copy = pixel * kParts + part    a thread's next copy: the same part, kNextPixel pixels on
template <typename Tile, typename T, Layout L>
struct PixelLoader {
  static constexpr int kVector = L == Layout::kChannelsLast ? 16 / (int)sizeof(T) : 1;
  static constexpr int kParts = kSlab / kVector;     // copies of a pixel
  static constexpr int kCopies = Tile::kN * kParts;  // of the block
  static constexpr int kThreadCopies = kCopies / Tile::kThreads;
  static constexpr int kWindows = L == Layout::kChannelsLast ? kThreadCopies : 1;
  static constexpr int kPitch = Tile::kN + 4;
  static constexpr bool kAsynchronous = L == Layout::kStrided && sizeof(T) == 4;
  static constexpr int kNextPart = L == Layout::kStrided ? Tile::kThreads / Tile::kN : 0;
  static constexpr int kNextPixel = L == Layout::kChannelsLast ? Tile::kThreads / kParts : 0;
  static_assert(kCopies % Tile::kThreads == 0, "every thread copies as much");

  TapIterator<kWindows, Tile::kThreads> taps;
  T elements[L == Layout::kStrided && !kAsynchronous ? kThreadCopies : 1];
  Words4 words[L == Layout::kChannelsLast ? kThreadCopies : 1];

  static __device__ __forceinline__ int first_pixel() {
    return L == Layout::kStrided ? threadIdx.x % Tile::kN : threadIdx.x / kParts;
  }
  static __device__ __forceinline__ int first_part() {
    return L == Layout::kStrided ? threadIdx.x / Tile::kN : threadIdx.x % kParts;
  }

  template <typename WindowOf>
  __device__ __forceinline__ PixelLoader(const GemmParams& params, const char* source, const WindowOf& window_of) {
#pragma unroll
    for (int i = 0; i < kWindows; ++i) {
      taps.set_window(i, source, window_of(first_pixel() + i * kNextPixel));
      taps.pointer[i] += first_part() * kVector * params.stride_c;
    }
  }
  // Channels [c, c + kSlab) of the current tap: into `slab` asynchronously, or into registers.
  __device__ __forceinline__ void load(const GemmParams& params, int c, float* slab) {
    const int left = params.channels - c - first_part() * kVector;
    if constexpr (L == Layout::kStrided) {
      float* const to = slab + first_part() * kPitch + first_pixel();
#pragma unroll
      for (int i = 0; i < kThreadCopies; ++i) {
        const bool valid = taps.inside[0] && i * kNextPart < left;
        const char* from = taps.pointer[0] + i * kNextPart * params.stride_c;
        if constexpr (kAsynchronous)
          cp_async_4(to + i * kNextPart * kPitch, from, valid);
        else
          elements[i] = valid ? *reinterpret_cast<const T*>(from) : T{};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kThreadCopies; ++i)
        words[i] = taps.inside[i] && left > 0 ? load_16<Words4>(taps.pointer[i]) : Words4{};
    }
  }
  // What load() left in registers, to `slab`.
  __device__ __forceinline__ void store(float* slab) {
    float* const to = slab + first_part() * kVector * kPitch + first_pixel();
    if constexpr (L == Layout::kStrided && !kAsynchronous) {
#pragma unroll
      for (int i = 0; i < kThreadCopies; ++i) to[i * kNextPart * kPitch] = load_float(&elements[i]);
    }
    if constexpr (L == Layout::kChannelsLast) {
#pragma unroll
      for (int i = 0; i < kThreadCopies; ++i) {
        const T* channel = reinterpret_cast<const T*>(&words[i]);
#pragma unroll
        for (int v = 0; v < kVector; ++v) to[v * kPitch + i * kNextPixel] = load_float(channel + v);
      }
    }
  }
};

// A slab of packed weights, [kSlab][kM] floats; nothing to check, they are padded to whole slabs and tiles.
template <typename Tile>
__device__ __forceinline__ void load_weights(const char* weights, int pitch, float* slab) {
  constexpr int kRow = Tile::kM / 4, kCopies = kSlab * kRow;
#pragma unroll
  for (int i = 0; i < (kCopies + Tile::kThreads - 1) / Tile::kThreads; ++i) {
    const int copy = threadIdx.x + i * Tile::kThreads;
    if (kCopies % Tile::kThreads && copy >= kCopies) break;
    cp_async_16(slab + copy * 4, weights + (copy / kRow * pitch + copy % kRow * 4) * 4, true);
  }
}

// Shared memory, in floats: a slab of weights followed by one of pixels; kSlabFloats for both, twice that in all.
template <typename Tile>
constexpr int kPixelsAt = kSlab * Tile::kM;
template <typename Tile>
constexpr int kSlabFloats = kSlab * (Tile::kM + Tile::kN + 4);

// The sum of S over each pixel's window: thread t adds up pixel t % kN over some steps of every slab.
template <typename Tile>
struct WindowSums {
  static constexpr int kGroups = Tile::kThreads / Tile::kN, kSteps = kSlab / kGroups;
  static_assert(Tile::kThreads % Tile::kN == 0 && kSlab % kGroups == 0, "all threads, all steps");
  float partial = 0;

  __device__ __forceinline__ void add(const float* pixels, int pitch) {
    const float* from = pixels + threadIdx.x / Tile::kN * kSteps * pitch + threadIdx.x % Tile::kN;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) partial += from[k * pitch];
  }
  // s_sums[kN], for all threads; `s_partials` has room for kThreads floats that no thread reads any more.
  __device__ __forceinline__ void reduce(float* s_partials, float* s_sums) {
    __syncthreads();
    s_partials[threadIdx.x] = partial;
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::kN; i += Tile::kThreads) {
      float sum = s_partials[i];
      for (int group = 1; group < kGroups; ++group) sum += s_partials[group * Tile::kN + i];
      s_sums[i] = sum;
    }
    __syncthreads();
  }
};

// The whole sum, into acc; with Sums, also the window sums of S.
template <typename Tile, typename T, Layout L, bool Sums, typename WindowOf, typename Term>
__device__ __forceinline__ void implicit_gemm(const GemmParams& params, const char* source, const WindowOf& window_of,
                                              const char* weights, int pitch, float* s_slabs,
                                              float (&acc)[Tile::kThreadM][Tile::kThreadN], WindowSums<Tile>& sums,
                                              const Term& term) {
  using Loader = PixelLoader<Tile, T, L>;
  Loader pixels(params, source, window_of);
  int tap_i = 0, tap_j = 0, c = 0, left = params.slabs;
  pixels.taps.set_tap(params, 0, 0);
  pixels.load(params, 0, s_slabs + kPixelsAt<Tile>);
  load_weights<Tile>(weights, pitch, s_slabs);
  cp_async_commit();
  for (int at = 0;; at = kSlabFloats<Tile> - at) {
    float *const s_now = s_slabs + at, *const s_next = s_slabs + kSlabFloats<Tile> - at;
    pixels.store(s_now + kPixelsAt<Tile>);
    cp_async_wait<0>();
    __syncthreads();
    if (--left) {
      c += kSlab;
      if (c < params.channels) {
        pixels.taps.advance(params.next_slab), weights += params.next_weights;
      } else {
        c = 0;
        if (++tap_j < params.taps_w)
          pixels.taps.advance(params.next_tap), weights += params.next_weights_tap;
        else
          tap_j = 0, ++tap_i, pixels.taps.advance(params.next_tap_row), weights += params.next_weights_tap_row;
        pixels.taps.set_tap(params, tap_i, tap_j);
      }
      pixels.load(params, c, s_next + kPixelsAt<Tile>);
      load_weights<Tile>(weights, pitch, s_next);
      cp_async_commit();
    }
    const ThreadTile<Tile> own(kShortOfRegisters && L == Layout::kChannelsLast ? thread_index() : threadIdx.x);
    if (Sums) sums.add(s_now + kPixelsAt<Tile>, Loader::kPitch);
    multiply_slab<Tile, Tile::kM, Loader::kPitch>(acc, s_now + own.m0, s_now + kPixelsAt<Tile> + own.n0, term);
    if (!left) break;
  }
}

}  // namespace cuda
}  // namespace adderops
