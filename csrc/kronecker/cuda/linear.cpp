// Glue of the factor of a linear layer on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "kronecker/checks.h"
#include "kronecker/cuda/factor_kernels.h"

namespace mfac_kernels {
namespace {

void linear_factor_cuda(const Tensor& factor, Tensor x, const std::optional<Tensor>& weights, bool bias, double beta, double alpha,
                        const std::optional<Tensor>& refused, bool allow_tf32) {
  constexpr const char* op = "linear_factor_";
  check_scales(op, beta, alpha);
  const DeviceOf device(op, factor);
  device.check_same("x", x);
  FactorRows rows;
  rows.allow_tf32 = allow_tf32;
  rows.patches = check_matrix(op, "x", x);
  const std::optional<Tensor> row_weights = check_weights(op, weights, x, rows.patches.dtype);
  if (row_weights) {
    device.check_same("weights", *row_weights);
    rows.weights = row_weights->const_data_ptr();
  }
  const Factor out = check_factor(op, factor, rows.patches.dtype, 1, rows.patches.channels, bias);
  int32_t* const flag = check_refused(op, refused);
  if (refused) device.check_same("refused", *refused);
  const Tensor workspace = uninitialised(factor, {factor_workspace(rows, out)}, ScalarType::Byte);
  device.check_launched(factor_accumulate(rows, out, beta, alpha, flag, workspace.data_ptr(), device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) { m.impl("linear_factor_", TORCH_BOX(&linear_factor_cuda)); }

}  // namespace mfac_kernels
