// The loss terms of L_mid and their gradients on any device (ops.h says what a device supplies).
#pragma once
#include "args/match.h"
#include "moments.h"

namespace adderops {

// Every entry of the lists is a group of layers with the same numbers of channels; args/match.h has the letters.
template <class Device>
std::vector<Tensor> match_rows(const std::vector<Tensor>& mixed_a, const std::vector<Tensor>& mixed_c,
                               const std::vector<Tensor>& w_a, const std::vector<Tensor>& w_c, double eps) {
  const char* op = "_match_rows";
  const size_t groups = mixed_a.size();
  REQUIRE(groups > 0, op, ": mixed_a: expected at least one group, got none");
  REQUIRE(mixed_c.size() == groups && w_a.size() == groups && w_c.size() == groups, op,
          ": mixed_c, w_a, w_c: expected ", groups, " groups, as of mixed_a, got ", mixed_c.size(), ", ", w_a.size(),
          ", ", w_c.size());
  std::vector<Tensor> operands;  // dense
  std::vector<MatchArgs> list;
  int64_t layers = 0, rows = 0;
  for (size_t i = 0; i < groups; ++i) {
    MatchArgs args{};
    for (const auto& [name, tensor] : {std::pair{"w_a", &w_a[i]}, std::pair{"w_c", &w_c[i]}})
      REQUIRE(tensor->dim() == 3 && tensor->numel() > 0, op, ": ", item(name, i),
              ": expected shape (layers, rows, C) without zeros, got ", shape_of(*tensor));
    args.layers = w_a[i].size(0), args.rows = w_a[i].size(1), args.C_a = w_a[i].size(2), args.C_c = w_c[i].size(2);
    args.eps = static_cast<float>(eps);
    layers = sum(layers, args.layers), rows = sum(rows, product(args.layers, args.rows));
    REQUIRE(rows < int64_t(1) << 31 && args.C_a < int64_t(1) << 30 && args.C_c < int64_t(1) << 30, op, ": ",
            item("w_a", i), ": expected fewer than 2^31 rows in all groups, and 2^30 channels, got shape ",
            shape_of(w_a[i]));
    const int64_t D = sum(args.C_a, args.C_c);
    const auto data = [&](const char* name, const Tensor& tensor, int64_t columns) {
      const std::string at = item(name, i);
      REQUIRE(tensor.scalar_type() == ScalarType::Float, op, ": ", at, ": expected dtype float32, got ",
              dtype_of(tensor));
      check_shape(op, at.c_str(), tensor, mixed_a[0], {args.layers, args.rows, columns});
      operands.push_back(dense(op, at.c_str(), tensor));
      return static_cast<const float*>(operands.back().data_ptr());
    };
    args.mixed_a = data("mixed_a", mixed_a[i], D), args.mixed_c = data("mixed_c", mixed_c[i], D);
    args.w_a = data("w_a", w_a[i], args.C_a), args.w_c = data("w_c", w_c[i], args.C_c);
    list.push_back(args);
  }
  std::vector<Tensor> out;
  const auto result = [&](const std::vector<int64_t>& shape) {
    out.push_back(empty(op, mixed_a[0], shape, ScalarType::Float));
    return static_cast<float*>(out.back().data_ptr());
  };
  float *terms = result({layers}), *var_c = result({layers});
  for (MatchArgs& args : list) {
    args.terms = terms, args.var_c = var_c;
    terms += args.layers, var_c += args.layers;
    args.mix = result({args.layers, args.rows, args.C_a + args.C_c});
    args.grad_w_a = result({args.layers, args.rows, args.C_a});
    args.grad_w_c = result({args.layers, args.rows, args.C_c});
  }
  Device::run(op, mixed_a[0], &Device::Kernels::match, list_of(list));
  return out;
}

}  // namespace adderops
