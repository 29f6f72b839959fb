// Host side of the terms of L_mid: which groups are in a launch.
#include "launch.cuh"
#include "match.cuh"

namespace adderops {
namespace cuda {
namespace {

// Calls launch(a list, room for the results of its rows).
template <typename Launch>
void for_lists(const List<MatchArgs>& all, Arena* arena, const Launch& launch) {
  MatchList list;
  for (int64_t begin = 0; begin < all.count; begin += kMatchGroups) {
    list.count = (int)(all.count - begin < kMatchGroups ? all.count - begin : kMatchGroups);
    list.rows = list.layers = 0, list.eps = all.items[begin].eps;
    for (int i = 0; i < list.count; ++i) {
      const MatchArgs& args = all.items[begin + i];
      list.groups[i] = {args.mixed_a,  args.mixed_c,  args.w_a,   args.w_c,   args.mix,
                        args.grad_w_a, args.grad_w_c, args.terms, args.var_c, (int)args.rows,
                        (int)args.C_a, (int)args.C_c, list.rows,  list.layers};
      list.rows += (int)(args.layers * args.rows), list.layers += (int)args.layers;
    }
    launch(list, arena->take<RowResult>(list.rows));
  }
}

int64_t workspace(const List<MatchArgs>& all, const Device&, const Choice&) {
  Arena arena{nullptr, 0};
  for_lists(all, &arena, [](const MatchList&, RowResult*) {});
  return arena.used;
}

cudaError_t run(const List<MatchArgs>& all, const Device& device, const Choice&, void* workspace, cudaStream_t stream) {
  constexpr int kWarps = kMatchThreads / 32;
  Arena arena{static_cast<char*>(workspace), 0};
  for_lists(all, &arena, [&](const MatchList& list, RowResult* rows) {
    const int64_t blocks = ceil_div(list.rows, kWarps), most = 64ll * device.multiprocessors;
    LAUNCH((match_kernel), dim3((unsigned)(blocks < most ? blocks : most)), dim3(kMatchThreads), stream, list, rows);
    LAUNCH((match_finish_kernel), dim3((unsigned)ceil_div(list.layers, kWarps)), dim3(kMatchThreads), stream, list,
           rows);
  });
  return cudaGetLastError();
}

}  // namespace

extern const Pass<List<MatchArgs>> kMatch = {workspace, run, 0};

}  // namespace cuda
}  // namespace adderops
