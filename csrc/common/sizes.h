// Arithmetic of sizes, on the host and in kernels
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MFAC_HOST_DEVICE __host__ __device__
#else
#define MFAC_HOST_DEVICE
#endif

namespace mfac_kernels {

// a / b, rounded up; a, b >= 0, and b may be as large as an int64_t is
MFAC_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return a > 0 ? (a - 1) / b + 1 : 0; }

}  // namespace mfac_kernels
