// Glue of the cross factor: sum over rows r of w_r x_r y_r^T.
#include <torch/csrc/stable/library.h>

#include "common/new_tensor.h"
#include "kronecker/checks.h"
#include "kronecker/cpu/factor.h"

namespace mfac_kernels {
namespace {

Tensor cross_factor(Tensor x, Tensor y, const std::optional<Tensor>& weights) {
  constexpr const char* op = "cross_factor";
  Patches a = check_matrix(op, "x", x), b = check_matrix(op, "y", y);
  check_cross(op, x, y);
  const std::optional<Tensor> row_weights = check_weights(op, weights, x, a.dtype);
  Tensor sums = new_tensor(x, {a.channels, b.channels}, accumulator_of(a.dtype));
  const Weights w = {row_weights ? row_weights->const_data_ptr() : nullptr, a.positions()};
  cross_products(a, b, w, sums.mutable_data_ptr());
  return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) { m.impl("cross_factor", TORCH_BOX(&cross_factor)); }

}  // namespace mfac_kernels
