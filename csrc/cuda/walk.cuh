// The sum that forward and grad_x have in common: over the taps of a kernel and the channels of the tensor behind it,
//
//   acc[lane][pixel] = term(acc, W[tap, channel, lane], S[channel, position of the tap, of the pixel])
//
// as an implicit matrix product: no im2col matrix.  Shared memory holds two slabs of kSlab channels of one tap:
//
//   lanes    [kSlab][kLanes]         packed weights (pack.cuh), in the order of the walk: copied 16 bytes at a time,
//            nothing to check
//   columns  [kSlab][kColumns + 4]   the pixels' channels; zero outside the image and beyond the last channel.
//              kPlanes (any strides): neighbouring threads copy neighbouring pixels, 4 bytes each, asynchronously;
//              kChannels: 16 bytes of channels each, through registers, where they are transposed.  The four floats of
//              padding keep those stores free of bank conflicts.
//
// One barrier a slab: behind it slab s is complete and nobody reads slab s-1 any more, whose place slab s+1 then takes.
// Whether a tap of a pixel lies inside the image is decided once a tap.
#pragma once
#include "pack.cuh"

namespace adderops {
namespace cuda {

// Everything the kernel needs to know of the sum, the same for all of its threads.  The host fills it: what stands in
// the constants of a launch costs the threads neither an instruction nor a register.
struct Walk {
  const void* source;
  int64_t image, channel, row, column;  // strides of source, in bytes
  int H, W, channels;
  int taps_h, taps_w;  // tap (i, j) reads source at (h + i*step_h, w + j*step_w)
  int step_h, step_w;
  int slabs;  // of all taps
  // bytes from a slab's first channel to that of the next one: of the same tap, of the next tap, of the next row of
  // taps
  int64_t next_slab, next_tap, next_row;
  int64_t next_weights, next_weights_tap, next_weights_row;
  int64_t first_weights;  // bytes from a group's first slab to that of tap (0, 0)
};
// Where tap (0, 0) of a pixel lies; `offset` of its image in bytes.
struct Site {
  int64_t offset;
  int h, w;
  bool valid;
};

// Where tap (0, 0) of a pixel lies in its image.
struct alignas(8) Corner {
  int h, w;
};

// What a thread could keep and need not is kept out of its registers, or a tile of 128 x 128 spills: ptxas 13.0 does so
// for sm_100 and sm_120, and has registers to spare for the others.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr bool kShortOfRegisters = false;
#else
constexpr bool kShortOfRegisters = true;
#endif

// The pixels that a thread copies from: where it is in each, and whether the tap it aims at lies inside the image.
// Where registers are short, the corners of several pixels, wanted once a tap, are in shared memory, each thread's in
// places of its own.
template <int Count, int Threads>
struct Cursors {
  static constexpr bool kInShared = kShortOfRegisters && Count > 1;
  const char* at[Count];
  Corner kept[kInShared ? 1 : Count];
  bool inside[Count];

  static __device__ __forceinline__ Corner* in_shared() {
    SHARED(Corner, s_corners, [kInShared ? Count * Threads : 1]);
    return s_corners + thread_index();
  }
  __device__ __forceinline__ void place(int i, const Walk& walk, const char* source, const Site& site) {
    const Corner corner = {site.valid ? site.h : -0x40000000, site.w};  // behind the last pixel: never inside
    if constexpr (kInShared)
      in_shared()[i * Threads] = corner;
    else
      kept[i] = corner;
    at[i] = source + site.offset + site.h * walk.row + site.w * walk.column;
  }
  __device__ __forceinline__ void aim(const Walk& walk, int tap_i, int tap_j) {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      Corner corner;
      if constexpr (kInShared)
        corner = in_shared()[i * Threads];
      else
        corner = kept[i];
      inside[i] = (unsigned)(corner.h + tap_i * walk.step_h) < (unsigned)walk.H &&
                  (unsigned)(corner.w + tap_j * walk.step_w) < (unsigned)walk.W;
    }
  }
  __device__ __forceinline__ void advance(int64_t bytes) {
#pragma unroll
    for (int i = 0; i < Count; ++i) at[i] += bytes;
  }
};

// A thread's part of copying the pixels' channels.
template <typename Tile, typename T, Layout L>
struct ColumnCopy {
  static constexpr int kVector = L == Layout::kChannels ? 16 / (int)sizeof(T) : 1;
  static constexpr int kParts = kSlab / kVector;           // of a pixel's slab
  static constexpr int kPieces = Tile::kColumns * kParts;  // of the block's slab
  static constexpr int kMine = (kPieces + Tile::kThreads - 1) / Tile::kThreads;
  static constexpr int kSites = L == Layout::kChannels ? kMine : 1;
  static constexpr int kPitch = Tile::kColumns + 4;
  static constexpr bool kAsynchronous = L == Layout::kPlanes && sizeof(T) == 4;
  static_assert(L == Layout::kChannels || kPieces % Tile::kThreads == 0, "planes: every thread copies as much");

  Cursors<kSites, Tile::kThreads> to_read;
  T plane[L == Layout::kPlanes && !kAsynchronous ? kMine : 1];
  Words4 words[L == Layout::kChannels ? kMine : 1];

  // planes: piece = part * kColumns + pixel;  channels: piece = pixel * kParts + part.  A thread's next piece is
  // kThreads on: the same pixel some parts on, or the same part some pixels on.
  static constexpr int kNextPart = L == Layout::kPlanes ? Tile::kThreads / Tile::kColumns : 0;
  static constexpr int kNextPixel = L == Layout::kChannels ? Tile::kThreads / kParts : 0;
  static __device__ __forceinline__ int first_pixel() {
    return L == Layout::kPlanes ? threadIdx.x % Tile::kColumns : threadIdx.x / kParts;
  }
  static __device__ __forceinline__ int first_part() {
    return L == Layout::kPlanes ? threadIdx.x / Tile::kColumns : threadIdx.x % kParts;
  }

  template <typename SiteOf>
  __device__ __forceinline__ ColumnCopy(const Walk& walk, const char* source, const SiteOf& site_of) {
#pragma unroll
    for (int i = 0; i < kSites; ++i) {
      const int pixel = first_pixel() + i * kNextPixel;
      Site site = site_of(pixel < Tile::kColumns ? pixel : 0);
      site.valid = site.valid && pixel < Tile::kColumns;
      to_read.place(i, walk, source, site);
      to_read.at[i] += first_part() * kVector * walk.channel;
    }
  }
  // Channels [c, c + kSlab) of the tap aimed at; asynchronously, or into registers.
  __device__ __forceinline__ void fetch(const Walk& walk, int c, float* slab) {
    const int left = walk.channels - c - first_part() * kVector;
    if constexpr (L == Layout::kPlanes) {
      float* const to = slab + first_part() * kPitch + first_pixel();
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        const bool real = to_read.inside[0] && i * kNextPart < left;
        const char* from = to_read.at[0] + i * kNextPart * walk.channel;
        if constexpr (kAsynchronous)
          cp_async_4(to + i * kNextPart * kPitch, from, real);
        else
          plane[i] = real ? *reinterpret_cast<const T*>(from) : T{};
      }
    } else {
#pragma unroll
      for (int i = 0; i < kMine; ++i)
        words[i] = to_read.inside[i] && left > 0 ? load_16<Words4>(to_read.at[i]) : Words4{};
    }
  }
  // What fetch() left in registers, to shared memory.
  __device__ __forceinline__ void commit(float* slab) {
    float* const to = slab + first_part() * kVector * kPitch + first_pixel();
    if constexpr (L == Layout::kPlanes && !kAsynchronous) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) to[i * kNextPart * kPitch] = load_float(&plane[i]);
    }
    if constexpr (L == Layout::kChannels) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        if (kPieces % Tile::kThreads && first_pixel() + i * kNextPixel >= Tile::kColumns) break;
        const T* channel = reinterpret_cast<const T*>(&words[i]);
#pragma unroll
        for (int v = 0; v < kVector; ++v) to[v * kPitch + i * kNextPixel] = load_float(channel + v);
      }
    }
  }
};

// The weights of a slab: rows of kLanes floats.
template <typename Tile>
__device__ __forceinline__ void fetch_lanes(const char* weights, int pitch, float* slab) {
  constexpr int kRow = Tile::kLanes / 4, kPieces = kSlab * kRow;
#pragma unroll
  for (int i = 0; i < (kPieces + Tile::kThreads - 1) / Tile::kThreads; ++i) {
    const int piece = threadIdx.x + i * Tile::kThreads;
    if (kPieces % Tile::kThreads && piece >= kPieces) break;
    cp_async_16(slab + piece * 4, weights + (piece / kRow * pitch + piece % kRow * 4) * 4, true);
  }
}

// Shared floats: a slab of both sides, the columns behind the lanes; twice that in all.
template <typename Tile>
constexpr int kColumnsAt = kSlab * Tile::kLanes;
template <typename Tile>
constexpr int kSlabFloats = kSlab * (Tile::kLanes + Tile::kColumns + 4);

// The sum of S over each pixel's window: thread t adds up pixel t % kColumns, some rows of every slab.
template <typename Tile>
struct ColumnSums {
  static constexpr int kGroups = Tile::kThreads / Tile::kColumns, kRows = kSlab / kGroups;
  static_assert(Tile::kThreads % Tile::kColumns == 0 && kSlab % kGroups == 0, "all threads, all rows");
  float share = 0;

  __device__ __forceinline__ void add(const float* columns, int pitch) {
    const float* from = columns + threadIdx.x / Tile::kColumns * kRows * pitch + threadIdx.x % Tile::kColumns;
#pragma unroll
    for (int k = 0; k < kRows; ++k) share += from[k * pitch];
  }
  // sums[kColumns], for everybody; `shares` holds kThreads floats that nobody else uses any more
  __device__ __forceinline__ void gather(float* shares, float* sums) {
    __syncthreads();
    shares[threadIdx.x] = share;
    __syncthreads();
    for (int i = threadIdx.x; i < Tile::kColumns; i += Tile::kThreads) {
      float sum = shares[i];
      for (int group = 1; group < kGroups; ++group) sum += shares[group * Tile::kColumns + i];
      sums[i] = sum;
    }
    __syncthreads();
  }
};

// Runs the whole sum.  With Sums, `sums` gets the sums of S too.
template <typename Tile, typename T, Layout L, bool Sums, typename SiteOf, typename Term>
__device__ __forceinline__ void sum_over_taps(const Walk& walk, const char* source, const SiteOf& site_of,
                                              const char* weights, int pitch, float* s_slabs,
                                              float (&acc)[Tile::kThreadLanes][Tile::kThreadColumns],
                                              ColumnSums<Tile>& sums, const Term& term) {
  using Copy = ColumnCopy<Tile, T, L>;
  Copy copy(walk, source, site_of);
  int tap_i = 0, tap_j = 0, c = 0, left = walk.slabs;
  copy.to_read.aim(walk, 0, 0);
  copy.fetch(walk, 0, s_slabs + kColumnsAt<Tile>);
  fetch_lanes<Tile>(weights, pitch, s_slabs);
  cp_async_commit();
  for (int at = 0;; at = kSlabFloats<Tile> - at) {
    float *const s_now = s_slabs + at, *const s_next = s_slabs + kSlabFloats<Tile> - at;
    copy.commit(s_now + kColumnsAt<Tile>);
    cp_async_wait<0>();
    __syncthreads();
    if (--left) {
      c += kSlab;
      if (c < walk.channels) {
        copy.to_read.advance(walk.next_slab), weights += walk.next_weights;
      } else {
        c = 0;
        if (++tap_j < walk.taps_w)
          copy.to_read.advance(walk.next_tap), weights += walk.next_weights_tap;
        else
          tap_j = 0, ++tap_i, copy.to_read.advance(walk.next_row), weights += walk.next_weights_row;
        copy.to_read.aim(walk, tap_i, tap_j);
      }
      copy.fetch(walk, c, s_next + kColumnsAt<Tile>);
      fetch_lanes<Tile>(weights, pitch, s_next);
      cp_async_commit();
    }
    const Place<Tile> place(kShortOfRegisters && L == Layout::kChannels ? thread_index() : threadIdx.x);
    if (Sums) sums.add(s_now + kColumnsAt<Tile>, Copy::kPitch);
    sum_slab<Tile, Tile::kLanes, Copy::kPitch>(acc, s_now + place.lane, s_now + kColumnsAt<Tile> + place.column, term);
    if (!left) break;
  }
}

}  // namespace cuda
}  // namespace adderops
