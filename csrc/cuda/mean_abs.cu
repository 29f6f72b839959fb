// Host side of the mean |x|: which tensors are without gaps, which are in a launch.
#include "launch_lists.cuh"
#include "mean_abs.cuh"

namespace adderops {
namespace cuda {
namespace {

// Do the elements lie in `count` neighbouring places, in any order of the dimensions?
bool is_dense(const MeanAbsArgs& args, int64_t count) {
  const int64_t size[4] = {args.N, args.C, args.H, args.W};
  int64_t last = 0;  // place of the last element
  for (int i = 0; i < 4; ++i) last = sum(last, product(size[i] - 1, args.x.stride[i]));
  // distinct places: in the order of the strides, each dimension begins where the smaller ones end
  int64_t expected = 1;
  for (int found = 0; found < 4; ++found) {
    int next = -1;
    for (int i = 0; i < 4; ++i)
      if (size[i] > 1 && args.x.stride[i] == expected) next = i;
    if (next < 0) break;
    expected = product(expected, size[next]);
  }
  return expected == count && last == count - 1;
}

// Calls launch(a list, its blocks, its partial sums, its results).
template <typename Launch>
void for_lists(const List<MeanAbsArgs>& all, Arena* arena, const Launch& launch) {
  MeanAbsList list;
  for (int64_t begin = 0; begin < all.count; begin += kMeanAbsTensors) {
    int64_t blocks = 0;
    list.count = (int)(all.count - begin < kMeanAbsTensors ? all.count - begin : kMeanAbsTensors);
    for (int i = 0; i < list.count; ++i) {
      const MeanAbsArgs& args = all.items[begin + i];
      const int64_t bytes = element_bytes(args.type), count = product(args.N, args.C, args.H, args.W);
      const int64_t* const stride = args.x.stride;
      MeanAbsTensor& x = list.tensors[i];
      x = {static_cast<const char*>(args.x.data),
           stride[0] * bytes,
           stride[1] * bytes,
           stride[2] * bytes,
           stride[3] * bytes,
           count,
           args.C,
           args.H,
           args.W,
           args.type,
           false,
           false,
           (int)blocks,
           (int)ceil_div(count, kMeanAbsChunk)};
      x.dense = is_dense(args, count);
      x.vectors = x.dense && reinterpret_cast<uintptr_t>(args.x.data) % 16 == 0;
      blocks += x.blocks;
    }
    launch(list, blocks, arena->take<float>(blocks), all.items[begin].out);
  }
}

int64_t workspace(const List<MeanAbsArgs>& all, const Device&, const Choice&) {
  Arena arena{nullptr, 0};
  for_lists(all, &arena, [](const MeanAbsList&, int64_t, float*, float*) {});
  return arena.used;
}

cudaError_t run(const List<MeanAbsArgs>& all, const Device&, const Choice&, void* workspace, cudaStream_t stream) {
  Arena arena{static_cast<char*>(workspace), 0};
  for_lists(all, &arena, [&](const MeanAbsList& list, int64_t blocks, float* partial, float* out) {
    LAUNCH((mean_abs_kernel), dim3((unsigned)blocks), dim3(kMeanAbsThreads), stream, list, partial);
    LAUNCH((mean_abs_finish_kernel), dim3((unsigned)list.count), dim3(kMeanAbsThreads), stream, list, partial, out);
  });
  return cudaGetLastError();
}

}  // namespace

extern const Pass<List<MeanAbsArgs>> kMeanAbs = {workspace, run, 0};

}  // namespace cuda
}  // namespace adderops
