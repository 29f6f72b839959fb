// Floats of any strides to bytes, channels last:
//
//   y = round(min(max(x * inverse_scale, -zero_point), quant_max - zero_point)) + zero_point
//
//   x        (N, C, H, W), any strides and float type
//   y        (N, H, W, C), contiguous
//   floats   the rows of one task as float32, channels last
//
//   stage 0: task = rows of one image -> floats -> kW bytes at a time
//
//   rows [h, h + rows) of image n                    x (any layout)
//     [ pixel: C floats ][ pixel: C floats ] ...     floats (rows.h)
//     [ kW lanes ][ kW lanes ] ...                   mul, max, min, convert, add, pack: 6 instructions per kW bytes
//
// The last kW lanes of a task are loaded and stored in part.
#pragma once
#include "plan.h"
#include "rows.h"

namespace adderops {
namespace cpu {
namespace {

constexpr int64_t kQuantizeFloats = 8 * 1024;  // per task

struct QuantizeShape {
  int64_t rows, tasks;  // of a task; of an image
  struct Shared : Layout {
  } shared;
  struct Worker : Layout {
    Part<float> floats;
  } worker;
};

inline QuantizeShape quantize_shape(const QuantizeArgs& args) {
  QuantizeShape f{};
  f.rows = smaller(args.H, larger(1, kQuantizeFloats / product(args.W, args.C)));
  f.tasks = ceil_div(args.H, f.rows);
  f.worker.add(&f.worker.floats, product(f.rows, args.W, args.C) + kW);
  return f;
}

inline void quantize_task(const QuantizeArgs& args, const QuantizeShape& f, int64_t task, char*, char* worker) {
  float* const floats = f.worker.floats.in(worker);
  const int64_t n = task / f.tasks, h = task % f.tasks * f.rows, rows = smaller(f.rows, args.H - h);
  load_rows(args.type, args.x, args.H, args.W, {n, 1, h, rows, 0, args.W}, 0, args.C, floats, args.C);
  const int64_t count = rows * args.W * args.C;
  uint8_t* const y = args.y + (n * args.H + h) * args.W * args.C;
  const int32_t zero_point = args.zero_point;
  const vf scale = splat(args.inverse_scale), least = splat(float(-zero_point));
  const vf most = splat(float(args.quant_max - zero_point));
  for (int64_t i = 0; i < count; i += kW) {
    const vf z = larger(least, load_lanes<vf>(floats + i, count - i) * scale);
    store_lanes(y + i, low_bytes(rounded(smaller(z, most)) + zero_point), count - i);
  }
}

inline Plan<QuantizeArgs> quantize_plan(const QuantizeArgs& args) {
  const QuantizeShape f = quantize_shape(args);
  return make_plan<QuantizeArgs, QuantizeShape, quantize_task>(f, product(args.N, f.tasks));
}

}  // namespace
}  // namespace cpu
}  // namespace adderops
