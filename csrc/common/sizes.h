// Arithmetic of sizes, on the host and in kernels
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MFAC_HOST_DEVICE __host__ __device__
#else
#define MFAC_HOST_DEVICE
#endif

namespace mfac_kernels {

// a / b, rounded up; a, b >= 0 and of a sum that an int64_t holds
MFAC_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of block_size columns that dim columns make, the last one ragged. block_size may be as large as an int64_t is.
constexpr int64_t block_count(int64_t dim, int64_t block_size) { return block_size < dim ? divide_up(dim, block_size) : dim > 0; }

}  // namespace mfac_kernels
