// What the ops of Kronecker factors expect, on every device.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "kronecker/patches.h"

namespace mfac_kernels {

// The type of sums of products of x.
inline ScalarType accumulator_of(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// A number or, in its place, a tensor of one value for all of `count` factors or one for each. What a tensor holds is not looked at.
inline Scale check_scale(const char* op, const char* name, double number, const std::optional<Tensor>& values = std::nullopt,
                         int64_t count = 1) {
  check(std::isfinite(number), op, ": ", name, ": expected a finite number, got ", number);
  if (!values) return {number};
  check(values->scalar_type() == ScalarType::Double, op, ": ", name, ": expected Double, got ",
        torch::headeronly::toString(values->scalar_type()));
  check(values->numel() == 1 || values->numel() == count, op, ": ", name, ": expected 1 or ", count, " values, got ", values->numel());
  check(values->is_contiguous(), op, ": ", name, ": expected a contiguous tensor");
  return {number, static_cast<const double*>(values->const_data_ptr()), values->numel() == 1 ? 0 : 1};
}
inline void check_scales(const char* op, double beta, double alpha) {
  check_scale(op, "beta", beta);
  check_scale(op, "alpha", alpha);
}

// A flag for each factor
inline int32_t* check_refused(const char* op, const std::optional<Tensor>& refused, int64_t count = 1) {
  if (!refused) return nullptr;
  check_state(op, "refused", *refused, ScalarType::Int, {count});
  return static_cast<int32_t*>(refused->mutable_data_ptr());
}

// A whole factor for each of `groups` groups of `columns` columns and a bias
inline Factor check_factors(const char* op, const Tensor& factor, DType x, int64_t groups, int64_t columns, bool bias,
                            const char* name = "factor") {
  const int64_t features = columns + bias;
  check_state(op, name, factor, accumulator_of(x), {groups, features, features});
  return {factor.mutable_data_ptr(), x == DType::f64 ? DType::f64 : DType::f32, groups, groups, features, features, bias};
}

// The factor of `groups` groups of `columns` columns and a bias each.
inline Factor check_factor(const char* op, const Tensor& factor, DType x, int64_t groups, int64_t columns, bool bias,
                           const char* name = "factor") {
  if (groups > 1) return check_factors(op, factor, x, groups, columns, bias, name);
  const ScalarType dtype = accumulator_of(x);
  const int64_t features = columns + bias;
  if (factor.dim() == 3) {
    const int64_t size = factor.size(1), blocks = size > 0 ? divide_up(features, size) : 0;
    check(size > 0, op, ": ", name, ": expected blocks of at least one row, got shape ", shape(factor));
    check_state(op, name, factor, dtype, {blocks, size, size});
  } else {
    check_state(op, name, factor, dtype, {features, features});
  }
  const bool dense = factor.dim() == 2;
  return {factor.mutable_data_ptr(),
          x == DType::f64 ? DType::f64 : DType::f32,
          groups,
          dense ? 1 : factor.size(0),
          dense ? features : factor.size(1),
          features,
          bias};
}

// offsets (groups + 1): group g has the rows [offsets[g], offsets[g + 1]) of x (T, D). Returns them contiguous; only their device knows
// the values.
inline Tensor check_offsets(const char* op, const Tensor& offsets, const Tensor& x) {
  check(offsets.scalar_type() == ScalarType::Int || offsets.scalar_type() == ScalarType::Long, op,
        ": offsets: expected int32 or int64, got ", torch::headeronly::toString(offsets.scalar_type()));
  check(offsets.dim() == 1 && offsets.size(0) > 0, op, ": offsets: expected shape (groups + 1,), got ", shape(offsets));
  check(x.dim() == 2, op, ": x: expected 2 dimensions, as there are offsets, got shape ", shape(x));
  return torch::stable::contiguous(offsets);
}

// The rows of x (..., D), its leading dimensions merged where strides allow. x is replaced by a contiguous copy if more than four remain.
inline Patches check_matrix(const char* op, const char* name, Tensor& x) {
  check(x.dim() > 0, op, ": ", name, ": expected at least 1 dimension, got shape ", shape(x));
  Patches rows;
  rows.dtype = dtype_of(op, name, x);
  const auto merge = [&rows](const Tensor& t) {  // innermost first, into axes[2], axes[1], axes[0], samples
    int64_t sizes[Patches::kAxes + 1] = {1, 1, 1, 1}, steps[Patches::kAxes + 1] = {};
    int filled = 0;
    for (int64_t i = t.dim() - 2; i >= 0; --i) {
      if (t.size(i) == 1) continue;
      if (filled > 0 && t.stride(i) == sizes[filled - 1] * steps[filled - 1]) {
        sizes[filled - 1] *= t.size(i);
        continue;
      }
      if (filled > Patches::kAxes) return false;
      sizes[filled] = t.size(i);
      steps[filled++] = t.stride(i);
    }
    for (int a = 0; a < Patches::kAxes; ++a) {
      Axis& axis = rows.axes[Patches::kAxes - 1 - a];
      axis.size = axis.outputs = sizes[a];
      axis.step = steps[a];
    }
    rows.samples = sizes[Patches::kAxes];
    rows.sample_step = steps[Patches::kAxes];
    return true;
  };
  if (!merge(x)) {
    x = torch::stable::contiguous(x);
    merge(x);
  }
  rows.data = x.const_data_ptr();
  rows.channels = x.size(x.dim() - 1);
  rows.channel_step = x.stride(x.dim() - 1);
  return rows;
}

inline bool same_leading_shape(const Tensor& a, int64_t dims, const Tensor& b) {
  bool same = a.dim() >= dims && b.dim() >= dims;
  for (int64_t i = 0; same && i < dims; ++i) same = a.size(i) == b.size(i);
  return same;
}

// y (..., D_y) with the rows of x (..., D_x)
inline void check_cross(const char* op, const Tensor& x, const Tensor& y) {
  check(y.scalar_type() == x.scalar_type(), op, ": y: expected ", torch::headeronly::toString(x.scalar_type()), ", as x has, got ",
        torch::headeronly::toString(y.scalar_type()));
  check(y.dim() == x.dim() && same_leading_shape(y, y.dim() - 1, x), op, ": y: expected the leading shape of x, got ", shape(y),
        " for x of shape ", shape(x));
}

// One weight per row of x (..., D), in the order of the rows; of the factor's type. Returns them contiguous.
inline std::optional<Tensor> check_weights(const char* op, const std::optional<Tensor>& weights, const Tensor& x, DType dtype,
                                           const char* name = "weights") {
  if (!weights) return std::nullopt;
  const ScalarType expected = accumulator_of(dtype);
  check(weights->scalar_type() == expected, op, ": ", name, ": expected ", torch::headeronly::toString(expected), ", got ",
        torch::headeronly::toString(weights->scalar_type()));
  check(weights->dim() == x.dim() - 1 && same_leading_shape(*weights, weights->dim(), x), op, ": ", name,
        ": expected the leading shape of x, got ", shape(*weights), " for x of shape ", shape(x));
  return torch::stable::contiguous(*weights);
}

// What is added to a factor: rows, and their weights or null
struct LinearRows {
  Patches patches;
  const void* weights;
};

// Pairs of a factor and rows; x and weights are replaced by what the pairs point to.
struct LinearPair {
  LinearRows rows;
  Factor factor;
};
inline std::vector<LinearPair> check_pairs(const char* op, const std::vector<Tensor>& factors, std::vector<Tensor>& x,
                                           std::vector<std::optional<Tensor>>& weights, const std::vector<bool>& bias) {
  const auto check_length = [&](const char* name, size_t length) {
    check(length == factors.size(), op, ": ", name, ": expected ", factors.size(), ", as factors has, got ", length);
  };
  check_length("x", x.size());
  check_length("weights", weights.size());
  check_length("bias", bias.size());
  std::vector<LinearPair> pairs;
  std::vector<size_t> order;
  for (size_t i = 0; i < factors.size(); ++i) {
    const auto named = [i](const char* list) { return std::string(list) + '[' + std::to_string(i) + ']'; };
    LinearPair pair = {};
    pair.rows.patches = check_matrix(op, named("x").c_str(), x[i]);
    weights[i] = check_weights(op, weights[i], x[i], pair.rows.patches.dtype, named("weights").c_str());
    if (weights[i]) pair.rows.weights = weights[i]->const_data_ptr();
    pair.factor = check_factor(op, factors[i], pair.rows.patches.dtype, 1, pair.rows.patches.channels, bias[i], named("factors").c_str());
    pairs.push_back(pair);
    if (factors[i].numel() > 0) order.push_back(i);
  }
  // All are written at the same time.
  const auto begin = [&](size_t i) { return static_cast<const char*>(pairs[i].factor.data); };
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return begin(a) < begin(b); });
  for (size_t i = 1; i < order.size(); ++i)
    check(begin(order[i - 1]) + factors[order[i - 1]].numel() * factors[order[i - 1]].element_size() <= begin(order[i]), op, ": factors[",
          std::max(order[i - 1], order[i]), "]: expected memory of its own, got some of factors[", std::min(order[i - 1], order[i]), ']');
  return pairs;
}

// So that an int64_t holds what is made of two numbers of a geometry
constexpr int64_t kMostOfGeometry = std::numeric_limits<int32_t>::max();

inline void check_list(const char* op, const char* name, const std::vector<int64_t>& list, int64_t count, int64_t least) {
  check(static_cast<int64_t>(list.size()) == count, op, ": ", name, ": expected ", count, " numbers, got ", list.size());
  for (int64_t value : list) {
    check(value >= least, op, ": ", name, ": expected at least ", least, ", got ", value);
    check(value <= kMostOfGeometry, op, ": ", name, ": expected at most ", kMostOfGeometry, ", got ", value);
  }
}

// The product of positive numbers; named in the error that more than `most` is
inline int64_t check_product(const char* op, const char* name, const std::vector<int64_t>& list, int64_t most, const char* what) {
  int64_t product = 1;
  for (int64_t value : list) {
    check(value <= most / product, op, ": ", name, ": expected at most ", most, what);
    product *= value;
  }
  return product;
}

// The patches of x (N, C, spatial...).
inline Patches check_conv(const char* op, const Tensor& x, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                          const std::vector<int64_t>& padding_before, const std::vector<int64_t>& padding_after,
                          const std::vector<int64_t>& dilation, int64_t groups) {
  check(x.dim() >= 3 && x.dim() <= 2 + Patches::kAxes, op, ": x: expected 3 to 5 dimensions, got shape ", shape(x));
  Patches patches;
  patches.dtype = dtype_of(op, "x", x);
  const int64_t spatial = x.dim() - 2;
  check_list(op, "kernel_size", kernel_size, spatial, 1);
  check_list(op, "stride", stride, spatial, 1);
  check_list(op, "padding_before", padding_before, spatial, 0);
  check_list(op, "padding_after", padding_after, spatial, 0);
  check_list(op, "dilation", dilation, spatial, 1);
  patches.data = x.const_data_ptr();
  patches.samples = x.size(0);
  patches.channels = x.size(1);
  patches.sample_step = x.stride(0);
  patches.channel_step = x.stride(1);
  std::vector<int64_t> outputs;
  check(groups > 0 && patches.channels % groups == 0, op, ": groups: expected a divisor of ", patches.channels, " channels, got ", groups);
  for (int64_t i = 0; i < spatial; ++i) {
    Axis& axis = patches.axes[Patches::kAxes - spatial + i];
    axis = {x.size(2 + i), 1, kernel_size[i], stride[i], padding_before[i], dilation[i], x.stride(2 + i)};
    const int64_t padded = axis.size + padding_before[i] + padding_after[i];
    const int64_t reach = axis.dilation * (axis.kernel - 1) + 1;
    check(padded >= reach, op, ": kernel_size: expected a kernel that fits into the padded input, got one of extent ", reach, " for ",
          padded, " in dimension ", 2 + i);
    axis.outputs = (padded - reach) / axis.stride + 1;
    outputs.push_back(axis.outputs);
  }
  check_product(op, "kernel_size", kernel_size, kMostOfGeometry, " offsets");
  if (patches.samples > 0) outputs.push_back(patches.samples);
  check_product(op, "padding_before", outputs, std::numeric_limits<int64_t>::max(), " patches");
  return patches;
}

// counts (n), float32 or float64; indices of any shape, int32 or int64. Returns them contiguous.
inline Tensor check_embedding(const char* op, const Tensor& counts, const Tensor& indices) {
  check(counts.scalar_type() == ScalarType::Float || counts.scalar_type() == ScalarType::Double, op,
        ": counts: expected float32 or float64, got ", torch::headeronly::toString(counts.scalar_type()));
  check(counts.dim() == 1, op, ": counts: expected 1 dimension, got shape ", shape(counts));
  check(counts.is_contiguous(), op, ": counts: expected a contiguous tensor");
  check(indices.scalar_type() == ScalarType::Int || indices.scalar_type() == ScalarType::Long, op,
        ": indices: expected int32 or int64, got ", torch::headeronly::toString(indices.scalar_type()));
  return torch::stable::contiguous(indices);
}

}  // namespace mfac_kernels
