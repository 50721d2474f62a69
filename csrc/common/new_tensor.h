// Memory for results. torch::stable::new_empty looks its op up by name and boxes its arguments, which takes longer than a small kernel.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/checks.h"

namespace mfac_kernels {

// Contiguous, without values, on the device of `like`
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  uint64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = static_cast<int64_t>(step);  // wraps where torch will refuse the size
    step *= static_cast<uint64_t>(std::max<int64_t>(1, sizes[d]));
  }
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  const auto type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made = nullptr;
  const auto error =
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, device_type, device_index, &made);
  check(error == AOTI_TORCH_SUCCESS, "not enough memory for the result");
  return Tensor(made);
}

}  // namespace mfac_kernels
