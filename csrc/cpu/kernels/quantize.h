// Floats of any strides to bytes, channels last:
//
//   y = round(min(max(x * inverse_scale, -zero_point), quant_max - zero_point)) + zero_point
//
// task = rows of an image, made float32 and channels last in scratch (rows.h), then bytes.

constexpr int64_t kQuantizeFloats = 8 * 1024;  // of scratch

struct QuantizeShape {
  int64_t rows, tasks;  // of a task; of an image
};
static QuantizeShape quantize_shape(const QuantizeArgs& args) {
  const int64_t rows = smaller(args.H, larger(1, kQuantizeFloats / product(args.W, args.C)));
  return {rows, blocks(args.H, rows)};
}

static void quantize_run(const QuantizeArgs& args, int, int64_t task, char*, char* worker) {
  const QuantizeShape f = quantize_shape(args);
  float* const floats = reinterpret_cast<float*>(worker);
  const int64_t n = task / f.tasks, h = task % f.tasks * f.rows, rows = smaller(f.rows, args.H - h);
  load_rows(args.type, args.x, args.H, args.W, {n, 0, args.C, h, rows, 0, args.W}, floats, args.C);
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

static Plan<QuantizeArgs> quantize_plan(const QuantizeArgs& args) {
  const QuantizeShape f = quantize_shape(args);
  return {0, product(product(f.rows, args.W, args.C) + kW, 4), 1, {product(args.N, f.tasks), 0, 0}, quantize_run};
}
