// How the passes cut output lanes (filters; channels of the input in grad_x) and the terms of a sum.
#pragma once
#include "../isa.h"
#include "region.h"

namespace adderops {
namespace cpu {
namespace {

// The lanes of a group in vectors, the vectors in panels of at most `most`, and the panels in `parts` tasks per band;
// all evenly sized.
struct Panels {
  int64_t vectors, count, parts;
};
// `units`: bands times groups.  A unit is divided where there would be too few tasks for several threads.
inline Panels make_panels(int64_t channels, int64_t most, int64_t units) {
  const int64_t vectors = ceil_div(channels, kW), count = ceil_div(vectors, most);
  return {vectors, count, larger(1, smaller(count, ceil_div(16, units)))};
}
// The first vector of panel i, and the first panel of part i.
inline int64_t panel_begin(const Panels& p, int64_t i) { return p.vectors * i / p.count; }
inline int64_t part_begin(const Panels& p, int64_t i) { return p.count * i / p.parts; }

// A task computes panels [begin, end) of one unit: of one band and one group.
struct PanelTask {
  int64_t unit, group, begin, end;
  Region band;
};
inline PanelTask panel_task(const Bands& b, int64_t groups, const Panels& p, int64_t task) {
  const int64_t unit = task / p.parts, part = task % p.parts;
  return {unit, unit % groups, part_begin(p, part), part_begin(p, part + 1), band_at(b, unit / groups)};
}

// Tasks that divide a unit share one copy of its input, made in the stage before, this many channels per task.
constexpr int64_t kCopyChannels = 64;

// A run of terms whose inputs are contiguous, from `offset` floats behind a pixel's base on.  The packed weights hold
// the terms in the same order.  Segments with the same `slab` are summed together, while their weights stay in L1.
struct Segment {
  int64_t offset, length, slab;
};

// Appends the segments of taps at offset[0], offset[1], ... (each `channels` long, ascending), joined where they
// touch and cut so that no slab exceeds `depth`; returns how many segments.
inline int64_t make_segments(const int64_t* offset, int64_t taps, int64_t channels, int64_t depth, Segment* out) {
  int64_t count = 0, slab = 0, filled = 0;
  for (int64_t t = 0; t < taps;) {
    int64_t joined = 1;
    while (t + joined < taps && offset[t + joined] == offset[t] + joined * channels) ++joined;
    const int64_t run = joined * channels, parts = ceil_div(run, depth), step = round_up(ceil_div(run, parts), 4);
    for (int64_t begin = 0; begin < run; begin += step) {
      const int64_t length = smaller(step, run - begin);
      if (filled && filled + length > depth) ++slab, filled = 0;
      filled += length;
      out[count++] = {offset[t] + begin, length, slab};
    }
    t += joined;
  }
  return count;
}

// The most segments that make_segments makes.
inline int64_t segment_bound(int64_t taps, int64_t channels, int64_t depth) {
  return product(taps, channels / depth + 2);
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
