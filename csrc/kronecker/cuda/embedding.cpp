// Glue of the factor of an embedding on the device: checks, allocation, launch.
#include <torch/csrc/stable/library.h>

#include "common/cuda/glue.h"
#include "kronecker/checks.h"
#include "kronecker/cuda/embedding_kernels.h"

namespace mfac_kernels {
namespace {

void embedding_factor_cuda(const Tensor& counts, const Tensor& indices, std::optional<int64_t> padding_idx, double beta, double alpha) {
  constexpr const char* op = "embedding_factor_";
  check_scales(op, beta, alpha);
  const DeviceOf device(op, counts);
  device.check_same("indices", indices);
  const Tensor list = check_embedding(op, counts, indices);
  const int64_t bins = counts.size(0);
  const Tensor found = torch::stable::new_zeros(counts, {bins}, ScalarType::Long);
  auto* const at = static_cast<unsigned long long*>(found.data_ptr());
  device.check_launched(count_indices(list.const_data_ptr(), list.scalar_type() == ScalarType::Int, list.numel(), bins,
                                      padding_idx.value_or(kNone), at, device.stream()));
  device.check_launched(accumulate_counts(at, bins, beta, alpha, dtype_of(op, "counts", counts), counts.data_ptr(), device.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, MFAC_DEVICE_KEY, m) { m.impl("embedding_factor_", TORCH_BOX(&embedding_factor_cuda)); }

}  // namespace mfac_kernels
