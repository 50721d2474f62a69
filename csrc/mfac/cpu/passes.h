// The passes over rows on the CPU, split over threads: what ops on tensors and the C interface share.
#pragma once
#include <optional>

#include "mfac/checks.h"

namespace mfac_kernels {

// out (blocks, m, m) = g_b g_b^T for each block of columns, of which there is one at least
void gram_blocks(const Rows& g, int64_t block_size, bool double_precision, double* out);

// out (blocks, k, m) = x_b g_b^T
void window_dots(const Rows& g, const Rows& x, int64_t block_size, double* out);

// out (k, d) = alpha x + beta coefficients_b g_b; coefficients (blocks, k, m)
void window_combine(const Rows& g, const double* coefficients, int64_t block_size, double beta, const std::optional<Rows>& x, double alpha,
                    const Rows& out);

}  // namespace mfac_kernels
