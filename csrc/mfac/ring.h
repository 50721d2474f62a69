// Where the ring of a window stands, for the host and for kernels: the next gradient goes to slot seen % m, over the oldest one once every
// slot is filled.
#pragma once
#include <cstdint>

#include "common/sizes.h"

namespace mfac_kernels {

// Positions count from the oldest gradient; a position below 2 m - oldest is given.
struct Slots {
  int64_t m, oldest;
  MFAC_HOST_DEVICE constexpr int64_t operator()(int64_t position) const {
    const int64_t slot = oldest + position;
    return slot < m ? slot : slot - m;
  }
};

// K = shift I + S over the `filled` slots from the oldest; empty slots are zero gradients.
struct Ring {
  Slots slots;
  int64_t filled;
  double shift;
};

// per_gradient: the shift given is multiplied by the number of gradients held.
MFAC_HOST_DEVICE constexpr Ring ring_of(int64_t m, int64_t seen, double shift, bool per_gradient) {
  const int64_t filled = seen < m ? seen : m;
  return {{m, seen > m ? seen % m : 0}, filled, per_gradient ? shift * static_cast<double>(filled > 1 ? filled : 1) : shift};
}

}  // namespace mfac_kernels
