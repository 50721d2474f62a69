// Glue of the cross factor on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "kronecker/checks.h"
#include "kronecker/cuda/factor_kernels.h"

namespace mfac_kernels {
namespace {

Tensor cross_factor_cuda(Tensor x, Tensor y, const std::optional<Tensor>& weights) {
  constexpr const char* op = "cross_factor";
  const DeviceOf device(op, x);
  device.check_same("y", y);
  const Patches left = check_matrix(op, "x", x), right = check_matrix(op, "y", y);
  check_cross(op, x, y);
  const std::optional<Tensor> row_weights = check_weights(op, weights, x, left.dtype);
  if (row_weights) device.check_same("weights", *row_weights);
  const Tensor result = uninitialised(x, {left.channels, right.channels}, accumulator_of(left.dtype));
  const Tensor workspace = uninitialised(x, {cross_workspace(left, right)}, ScalarType::Byte);
  device.check_launched(cross_products(left, right, row_weights ? row_weights->const_data_ptr() : nullptr, result.data_ptr(),
                                       workspace.data_ptr(), device.stream()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) { m.impl("cross_factor", TORCH_BOX(&cross_factor_cuda)); }

}  // namespace mfac_kernels
