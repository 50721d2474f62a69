// Glue of the inverse's diagonal on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "mfac/checks.h"
#include "mfac/cuda/static_kernels.h"

namespace mfac_kernels {
namespace {

Tensor inverse_diagonal_cuda(const Tensor& g, const Tensor& transform, double damping) {
  constexpr const char* op = "inverse_diagonal";
  const Rows rows = check_inverse_diagonal(op, g, transform, damping);
  const DeviceRows gradients = rows.on_device();
  const DeviceOf device(op, g);
  device.check_same("transform", transform);
  const Tensor diagonal = uninitialised(g, {rows.dim}, inverse_type(rows.dtype));
  const Tensor partial = uninitialised(g, {inverse_diagonal_splits(gradients) * rows.dim}, ScalarType::Double);
  device.check_launched(inverse_diagonal(gradients, static_cast<const double*>(transform.const_data_ptr()), damping, doubles_of(partial),
                                         diagonal.data_ptr(), device.stream()));
  return diagonal;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) { m.impl("inverse_diagonal", TORCH_BOX(&inverse_diagonal_cuda)); }

}  // namespace mfac_kernels
