// Glue of the factors of linear layers.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "kronecker/checks.h"
#include "kronecker/cpu/factor.h"

namespace mfac_kernels {
namespace {

// Rows [begin, end) of a matrix whose rows lie one step apart
LinearRows rows_between(const LinearRows& rows, int64_t begin, int64_t end) {
  LinearRows part = rows;
  Axis& axis = part.patches.axes[Patches::kAxes - 1];
  axis.size = axis.outputs = end - begin;
  const auto behind = [begin](const void* data, int64_t bytes) { return static_cast<const char*>(data) + begin * bytes; };
  part.patches.data = behind(rows.patches.data, axis.step * element_size(rows.patches.dtype));
  if (rows.weights) part.weights = behind(rows.weights, rows.patches.dtype == DType::f64 ? 8 : 4);
  return part;
}

// The sum of the weights, in float64: it stands for a column of ones, whose sums must not depend on the order either.
double total_weight(const LinearRows& rows) {
  const int64_t n = rows.patches.rows();
  if (!rows.weights) return static_cast<double>(n);
  const auto add = [n]<class S>(const S* values) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += values[i];
    return sum;
  };
  return rows.patches.dtype == DType::f64 ? add(static_cast<const double*>(rows.weights)) : add(static_cast<const float*>(rows.weights));
}

FactorUpdate update_of(const LinearRows& rows, const Factor& factor, double beta, double alpha, int32_t* refused) {
  FactorUpdate update;
  update.patches = rows.patches;
  update.weights = {rows.weights, rows.patches.positions()};
  update.factor = factor;
  update.beta = beta;
  update.alpha = alpha;
  update.bias_squares = total_weight(rows);
  update.refused = refused;
  return update;
}

std::vector<int64_t> values_of(const char* op, const Tensor& offsets, int64_t rows) {
  std::vector<int64_t> values;
  const auto read = [&](const auto* at) {
    for (int64_t i = 0, least = 0; i < offsets.numel(); ++i) {
      const int64_t value = at[i];
      check(value >= least && value <= rows, op, ": offsets: expected ", least, " to ", rows, " at index ", i, ", got ", value);
      values.push_back(least = value);
    }
  };
  if (offsets.scalar_type() == ScalarType::Int)
    read(static_cast<const int32_t*>(offsets.const_data_ptr()));
  else
    read(static_cast<const int64_t*>(offsets.const_data_ptr()));
  return values;
}

void linear_factor_(const Tensor& factor, Tensor x, const std::optional<Tensor>& weights, bool bias, double beta, double alpha,
                    const std::optional<Tensor>& refused, bool /*allow_tf32*/, const std::optional<Tensor>& offsets,
                    const std::optional<Tensor>& betas, const std::optional<Tensor>& alphas) {
  constexpr const char* op = "linear_factor_";
  const Patches patches = check_matrix(op, "x", x);
  const std::optional<Tensor> row_weights = check_weights(op, weights, x, patches.dtype);
  const LinearRows rows = {patches, row_weights ? row_weights->const_data_ptr() : nullptr};
  std::vector<int64_t> ends;  // of the groups, a 0 in front
  if (offsets) ends = values_of(op, check_offsets(op, *offsets, x), patches.rows());
  const int64_t count = offsets ? static_cast<int64_t>(ends.size()) - 1 : 1;
  const Factor out = offsets ? check_factors(op, factor, patches.dtype, count, patches.channels, bias)
                             : check_factor(op, factor, patches.dtype, 1, patches.channels, bias);
  const Scale before = check_scale(op, "beta", beta, betas, count), added = check_scale(op, "alpha", alpha, alphas, count);
  int32_t* const flags = check_refused(op, refused, count);

  std::vector<FactorUpdate> updates;
  for (int64_t g = 0; g < count; ++g) {
    Factor one = out;
    if (offsets) one.groups = one.blocks = 1;
    one.data = static_cast<char*>(out.data) + g * out.size * out.size * element_size(out.dtype);
    updates.push_back(
        update_of(offsets ? rows_between(rows, ends[g], ends[g + 1]) : rows, one, before.of(g), added.of(g), flags ? flags + g : nullptr));
  }
  update_factors(updates);
}

void grouped_linear_factor_(std::vector<Tensor> factors, std::vector<Tensor> x, std::vector<std::optional<Tensor>> weights,
                            std::vector<bool> bias, double beta, double alpha, std::optional<Tensor> refused, bool /*allow_tf32*/,
                            std::optional<Tensor> betas, std::optional<Tensor> alphas) {
  constexpr const char* op = "grouped_linear_factor_";
  const std::vector<LinearPair> pairs = check_pairs(op, factors, x, weights, bias);
  const auto count = static_cast<int64_t>(pairs.size());
  const Scale before = check_scale(op, "beta", beta, betas, count), added = check_scale(op, "alpha", alpha, alphas, count);
  int32_t* const flags = check_refused(op, refused, count);
  std::vector<FactorUpdate> updates;
  for (int64_t i = 0; i < count; ++i)
    updates.push_back(update_of(pairs[i].rows, pairs[i].factor, before.of(i), added.of(i), flags ? flags + i : nullptr));
  update_factors(updates);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("linear_factor_", TORCH_BOX(&linear_factor_));
  m.impl("grouped_linear_factor_", TORCH_BOX(&grouped_linear_factor_));
}

}  // namespace mfac_kernels
