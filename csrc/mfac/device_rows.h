// A matrix with contiguous rows, as kernels take it: sizes are in elements, data is a device pointer.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace mfac_kernels {

struct DeviceRows {
  void* data;
  DType dtype;
  int64_t rows, dim, stride;
};

}  // namespace mfac_kernels
