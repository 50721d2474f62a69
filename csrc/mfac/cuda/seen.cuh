// How many gradients a window has seen, as its counters on the device have it.
#pragma once
#include "common/cuda/launch.h"

namespace mfac_kernels {

__device__ inline int64_t seen_of(const int64_t* state) {
  const int64_t seen = state[0];
  MFAC_DEVICE_CHECK(seen >= 0, "state: expected a count of gradients");
  return seen;
}

}  // namespace mfac_kernels
