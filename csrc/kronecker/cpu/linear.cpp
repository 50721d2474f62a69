// Glue of the factor of a linear layer.
#include <torch/csrc/stable/library.h>

#include "kronecker/checks.h"
#include "kronecker/cpu/factor.h"

namespace mfac_kernels {
namespace {

// In float64: it stands for a column of ones, whose sums must not depend on the order either.
double sum_of(const Tensor& weights) {
  const auto add = [n = weights.numel()]<class S>(const S* values) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += values[i];
    return sum;
  };
  const void* data = weights.const_data_ptr();
  return weights.scalar_type() == ScalarType::Double ? add(static_cast<const double*>(data)) : add(static_cast<const float*>(data));
}

void linear_factor_(const Tensor& factor, Tensor x, const std::optional<Tensor>& weights, bool bias, double beta, double alpha,
                    const std::optional<Tensor>& refused, bool /*allow_tf32*/) {
  constexpr const char* op = "linear_factor_";
  check_scales(op, beta, alpha);
  FactorUpdate update;
  update.patches = check_matrix(op, "x", x);
  const std::optional<Tensor> row_weights = check_weights(op, weights, x, update.patches.dtype);
  update.weights = {row_weights ? row_weights->const_data_ptr() : nullptr, update.patches.positions()};
  update.factor = check_factor(op, factor, update.patches.dtype, 1, update.patches.channels, bias);
  update.refused = check_refused(op, refused);
  update.beta = beta;
  update.alpha = alpha;
  update.bias_squares = row_weights ? sum_of(*row_weights) : static_cast<double>(update.patches.rows());
  update_factor(update);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) { m.impl("linear_factor_", TORCH_BOX(&linear_factor_)); }

}  // namespace mfac_kernels
