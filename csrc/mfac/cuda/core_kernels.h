// The m x m core on the device, without torch; every pointer is a device pointer. Storage: core_passes.cuh. See core_kernels.cu.
#pragma once
#include "common/cuda/launch.h"

namespace mfac_kernels {

constexpr int64_t kCoreWork = 7;  // vectors of m

// gram, factor (m, m), state (2), dots (m) -> coefficients (m).  work: kCoreWork m + 1
cudaError_t core_insert(double* gram, double* factor, int64_t* state, const double* dots, int64_t m, double shift, bool per_gradient,
                        double* work, double* coefficients, cudaStream_t);

// x (vectors, m) = K^-1 b.  work: 2 m vectors
cudaError_t core_solve(const double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient, const double* b,
                       double* work, double* x, int64_t vectors, cudaStream_t);

// factor from gram.  work: kCoreWork m + 1
cudaError_t core_refactor(const double* gram, double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient,
                          double* work, cudaStream_t);

}  // namespace mfac_kernels
