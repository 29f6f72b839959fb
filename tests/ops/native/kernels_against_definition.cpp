// Runs every kernel set that this machine has against plain loops, of definition.h and here, without torch: proof that
// the kernels need none, and a way to execute them for another architecture under an emulator. Integer-valued data make
// every sum exact, so the results must be equal bit for bit.  Tasks run last to first, the definition's first to last:
// they are independent, so that must not show; nor may anything behind an output change.  Exit status 0: all equal.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

using namespace adderops;

namespace {

struct Random {
  uint64_t state;
  int64_t below(int64_t n) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int64_t>((state >> 33) % static_cast<uint64_t>(n));
  }
};

constexpr int64_t kGuard = 64;  // elements behind a tensor, which stay as they are

struct Tensor {
  std::vector<float> data;
  Operand operand;
  Tensor(const int64_t (&size)[4], bool channels_last) : data(size[0] * size[1] * size[2] * size[3] + kGuard) {
    const int64_t a = size[1], h = size[2], w = size[3];
    if (channels_last)
      operand = {data.data(), {h * w * a, 1, w * a, a}};
    else
      operand = {data.data(), {a * h * w, h * w, w, 1}};
  }
  void fill(Random* random) {
    for (float& v : data) v = static_cast<float>(random->below(33) - 16) / 4;
  }
};

template <typename Args>
void run(cpu::Pass<Args> pass, const Args& args, bool last_first = true) {
  const cpu::Plan<Args> plan = pass(args);
  // sizes that aligned_alloc accepts, and never zero
  char* shared = static_cast<char*>(std::aligned_alloc(64, (plan.shared_bytes / 64 + 1) * 64));
  char* worker = static_cast<char*>(std::aligned_alloc(64, (plan.worker_bytes / 64 + 1) * 64));
  for (const auto& stage : plan.stages)
    for (int64_t i = 0; i < stage.tasks; ++i)
      stage.run(plan, args, last_first ? stage.tasks - 1 - i : i, shared, worker);
  std::free(shared);
  std::free(worker);
}

bool check(const char* isa, const char* name, cpu::Pass<Conv2dArgs> pass, cpu::Pass<Conv2dArgs> definition,
           Conv2dArgs args, const Tensor& like) {
  Tensor got = like, expected = like;
  got.operand.data = got.data.data(), expected.operand.data = expected.data.data();
  args.out = got.operand;
  run(pass, args);
  args.out = expected.operand;
  run(definition, args, false);
  for (size_t i = 0; i < got.data.size(); ++i)
    if (!(got.data[i] == expected.data[i])) {
      const Conv2dProblem& p = args.problem;
      std::printf("%s %s: element %zu: %g, expected %g (N %d, C_in %d, %dx%d, C_out %d, kernel %dx%d, groups %d)\n",
                  isa, name, i, got.data[i], expected.data[i], int(p.N), int(p.C_in), int(p.H), int(p.W), int(p.C_out),
                  int(p.KH), int(p.KW), int(p.groups));
      return false;
    }
  return true;
}

// Moments of two layers of the shape of x, their gradient and mean |x|, against loops in double.  Exact without
// exponential, the means but for their division; with it within what its polynomial and the rounding of a sum of a few
// hundred numbers allow.
bool check_moments(const cpu::Kernels& kernels, const Conv2dProblem& p, const Tensor& student, const Tensor& teacher,
                   const std::vector<float>& grad, bool exponential) {
  const int64_t C = p.C_in, D = 2 * C, pixels = p.N * p.H * p.W;
  Tensor out = student;
  out.operand.data = out.data.data();
  std::vector<float> moments(D * D + D);
  const float *second = moments.data(), *mean = second + D * D;
  float scales[] = {1.f, -.5f}, mean_abs = 0;
  const MomentsArgs args{p.N,
                         {C, C},
                         p.H,
                         p.W,
                         {ElementType::kFloat32, ElementType::kFloat32},
                         {student.operand, teacher.operand},
                         {scales, scales + 1},
                         {.25f, 1.f},
                         exponential,
                         moments.data(),
                         grad.data(),
                         out.operand};
  run(kernels.moments, args);
  if (!exponential) scales[0] = static_cast<float>(pixels);  // divided by them, it is 1
  run(kernels.moments_gradient, args);
  run(kernels.mean_abs, MeanAbsArgs{p.N, C, p.H, p.W, ElementType::kFloat32, student.operand, &mean_abs});

  std::vector<double> z(pixels * D);
  double expected_abs = 0;
  auto at = [](const Tensor& t, int64_t n, int64_t c, int64_t h, int64_t w) {
    const int64_t* s = t.operand.stride;
    return static_cast<double>(t.data[n * s[0] + c * s[1] + h * s[2] + w * s[3]]);
  };
  bool right = true;
  auto expect = [&](double got, double expected, double bound) { right &= std::abs(got - expected) <= bound; };
  int64_t q = 0;
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t w = 0; w < p.W; ++w, ++q)
        for (int64_t c = 0; c < C; ++c) {
          const double a = at(student, n, c, h, w), b = -.5 * at(teacher, n, c, h, w);
          expected_abs += std::abs(a);
          z[q * D + c] = (exponential ? std::exp(a) : a) - .25;
          z[q * D + C + c] = (exponential ? std::exp(b) : b) - 1.;
        }
  expect(mean_abs, static_cast<float>(expected_abs / static_cast<double>(pixels * C)), 0);
  const float inverse = 1.f / static_cast<float>(pixels);
  for (int64_t j = 0; j < D; ++j)
    for (int64_t k = 0; k < D; ++k) {
      double sum = 0, size = 0, first = 0;
      for (q = 0; q < pixels; ++q) {
        sum += z[q * D + j] * z[q * D + k], first += z[q * D + j];
        size += (std::abs(z[q * D + j]) + 1) * (std::abs(z[q * D + k]) + 1);
      }
      const double bound = exponential ? 4e-6 * size / pixels : 0;
      expect(second[j * D + k], exponential ? sum / pixels : static_cast<float>(sum) * inverse, bound);
      if (k == 0) expect(mean[j], exponential ? first / pixels : static_cast<float>(first) * inverse, bound);
    }
  q = 0;
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t w = 0; w < p.W; ++w, ++q)
        for (int64_t c = 0; c < C; ++c) {
          double sum = grad[D * D + c], size = std::abs(sum);
          for (int64_t j = 0; j < D; ++j) {
            const double weight = grad[j * D + c] + grad[c * D + j];
            const double y = z[q * D + j], feature = exponential || j >= C ? y : (y + .25) * pixels - .25;
            sum += weight * feature, size += std::abs(weight) * (std::abs(feature) + 1);
          }
          const double slope = exponential ? z[q * D + c] + .25 : pixels;
          expect(at(out, n, c, h, w) * pixels, sum * slope, exponential ? 4e-6 * size * (slope + 1) : 0);
        }
  if (!right)
    std::printf("%s moments: N %d, C %d, %dx%d, exponential %d\n", kernels.name, int(p.N), int(C), int(p.H), int(p.W),
                exponential);
  return right;
}

// Random bytes, and the epilogue of each kind; the sums and every rounding must be the same.
bool check_int8(const cpu::Kernels& kernels, const Conv2dProblem& p, Random* random) {
  auto bytes = [&](int64_t count) {
    std::vector<uint8_t> data(count);
    for (uint8_t& v : data) v = static_cast<uint8_t>(random->below(256));
    return data;
  };
  const int64_t size = p.N * p.OH * p.OW * p.C_out;
  const std::vector<uint8_t> x = bytes(p.N * p.H * p.W * p.C_in);
  std::vector<float> residual(size);  // its bytes serve as uint8 too
  for (float& v : residual) v = static_cast<float>(random->below(256));
  const std::vector<uint8_t> w = bytes(p.C_out * p.KH * p.KW * (p.C_in / p.groups));
  std::vector<float> scale(p.C_out), offset(p.C_out);
  const float terms = static_cast<float>(p.KH * p.KW * (p.C_in / p.groups));
  for (float& v : scale) v = static_cast<float>(1 + random->below(64)) / (32.f * terms);
  for (float& v : offset) v = static_cast<float>(random->below(400));
  bool right = true;
  for (Int8Output output : {Int8Output::kSums, Int8Output::kFloat32, Int8Output::kUInt8}) {
    const size_t element = output == Int8Output::kUInt8 ? 1 : 4;
    std::vector<char> got(size * element + kGuard, 1), expected = got;
    std::fill_n(expected.begin(), size * element, 2);
    Int8Args args{p,
                  x.data(),
                  w.data(),
                  got.data(),
                  random->below(2) ? residual.data() : nullptr,
                  scale.data(),
                  offset.data(),
                  random->below(2) == 1,
                  .375f,
                  static_cast<float>(random->below(40)),
                  static_cast<float>(random->below(2) ? 255 : 100),
                  static_cast<uint8_t>(random->below(256)),
                  output};
    run(kernels.int8, args);
    args.y = expected.data();
    run(cpu::kDefinitionKernels.int8, args, false);
    right &= got == expected;
  }
  if (!right)
    std::printf("%s int8: N %d, C_in %d, %dx%d, C_out %d, kernel %dx%d, stride %dx%d, groups %d\n", kernels.name,
                int(p.N), int(p.C_in), int(p.H), int(p.W), int(p.C_out), int(p.KH), int(p.KW), int(p.stride_h),
                int(p.stride_w), int(p.groups));
  return right;
}

// Floats to bytes against loops: multiples of 1/4 times 2, so that ties are among them.
bool check_quantize(const cpu::Kernels& kernels, const Conv2dProblem& p, const Tensor& x, Random* random) {
  std::vector<uint8_t> got(p.N * p.C_in * p.H * p.W + kGuard, 1), expected;
  const int64_t zero_point = random->below(16), quant_max = random->below(2) ? 255 : 15, *stride = x.operand.stride;
  run(kernels.quantize, QuantizeArgs{p.N, p.C_in, p.H, p.W, ElementType::kFloat32, x.operand, got.data(), 2.f,
                                     int32_t(zero_point), int32_t(quant_max)});
  for (int64_t n = 0; n < p.N; ++n)
    for (int64_t h = 0; h < p.H; ++h)
      for (int64_t w = 0; w < p.W; ++w)
        for (int64_t c = 0; c < p.C_in; ++c) {
          const float v = x.data[n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3]];
          const double y = std::nearbyint(v * 2.) + zero_point;
          expected.push_back(static_cast<uint8_t>(std::min(std::max(y, 0.), double(quant_max))));
        }
  expected.resize(got.size(), 1);
  if (got != expected)
    std::printf("%s quantize: N %d, C %d, %dx%d\n", kernels.name, int(p.N), int(p.C_in), int(p.H), int(p.W));
  return got == expected;
}

// Neurons against the definition: 1 to 9 steps, thresholds of each channel, and a state.
bool check_neurons(const cpu::Kernels& kernels, const Conv2dProblem& p, Random* random) {
  const int64_t T = 1 + random->below(9), neurons = p.N * p.C_in * p.H * p.W;
  std::vector<float> x(T * neurons), threshold(p.C_in), initial(neurons);
  for (std::vector<float>* values : {&x, &threshold, &initial})
    for (float& value : *values) value = float(random->below(13) - 4) / 4;
  IntegrateAndFireArgs args{T, {p.N, p.C_in, p.H * p.W}, ElementType::kFloat32, x.data(), neurons};
  args.threshold = {threshold.data(), {0, 1, 0}};
  args.initial = {initial.data(), {p.C_in * p.H * p.W, p.H * p.W, 1}};
  args.decay = 0.5, args.gain = args.fire = 1, args.subtract = random->below(2), args.scaled = random->below(2);
  const auto results = [&](cpu::Pass<IntegrateAndFireArgs> pass) {
    std::vector<float> spikes(T * neurons + kGuard, 7), counts(neurons + kGuard, 7), membrane(neurons + kGuard, 7);
    args.spikes = spikes.data(), args.counts = counts.data(), args.membrane = membrane.data();
    run(pass, args);
    spikes.insert(spikes.end(), counts.begin(), counts.end());
    spikes.insert(spikes.end(), membrane.begin(), membrane.end());
    return spikes;
  };
  const bool right = results(kernels.integrate_and_fire) == results(cpu::kDefinitionKernels.integrate_and_fire);
  if (!right) std::printf("%s integrate_and_fire: T %d, %d neurons\n", kernels.name, int(T), int(neurons));
  return right;
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  int count = 0, failed = 0;
  const cpu::Kernels* const* all = cpu::available_kernels(&count);
  Random random{1};
  for (int i = 0; i < cases; ++i) {
    Conv2dProblem p{};
    p.groups = random.below(3) ? 1 : 1 + random.below(3);
    p.C_in = p.groups * (1 + random.below(40)), p.C_out = p.groups * (1 + random.below(40));
    if (i % 8 == 0) p.groups = p.C_in, p.C_out = p.C_in * (1 + random.below(2));
    p.N = 1 + random.below(3), p.H = 5 + random.below(8), p.W = 5 + random.below(12);
    p.KH = 1 + random.below(4), p.KW = 1 + random.below(4);
    p.stride_h = 1 + random.below(3), p.stride_w = 1 + random.below(3);
    p.dilation_h = p.dilation_w = 1;
    p.pad_top = random.below(3), p.pad_left = random.below(3);
    p.OH = (p.H + 2 * p.pad_top - p.KH) / p.stride_h + 1, p.OW = (p.W + 2 * p.pad_left - p.KW) / p.stride_w + 1;

    Tensor x({p.N, p.C_in, p.H, p.W}, random.below(2)), w({p.C_out, p.C_in / p.groups, p.KH, p.KW}, random.below(2));
    Tensor y({p.N, p.C_out, p.OH, p.OW}, random.below(2)), bias({1, p.C_out, 1, 1}, false);
    Tensor teacher({p.N, p.C_in, p.H, p.W}, random.below(2)), grad({1, 2 * p.C_in + 1, 2 * p.C_in, 1}, false);
    for (Tensor* t : {&x, &w, &y, &bias, &teacher, &grad}) t->fill(&random);
    Conv2dArgs forward{p, ElementType::kFloat32, x.operand, w.operand, {}, {}, bias.data.data()};
    Conv2dArgs backward{p, ElementType::kFloat32, x.operand, w.operand, y.operand, {}, nullptr};
    for (int k = 0; k < count; ++k) {
      const cpu::Kernels &kernels = *all[k], &definition = cpu::kDefinitionKernels;
      failed += !check(kernels.name, "forward", kernels.forward, definition.forward, forward, y);
      failed += !check(kernels.name, "grad_x", kernels.grad_x, definition.grad_x, backward, x);
      failed += !check(kernels.name, "grad_w", kernels.grad_w, definition.grad_w, backward, w);
      failed += !check_moments(kernels, p, x, teacher, grad.data, i % 2);
      failed += !check_int8(kernels, p, &random);
      failed += !check_quantize(kernels, p, x, &random);
      failed += !check_neurons(kernels, p, &random);
    }
  }
  for (int k = 0; k < count; ++k) std::printf("%s ", all[k]->name);
  std::printf(": %d cases, %d failed\n", cases, failed);
  return failed != 0;
}
