// The m x m core on the device, without torch; every pointer is a device pointer. Storage as on the CPU: mfac/cpu/window_kernels.h. See
// core_kernels.cu.
#pragma once
#include "common/cuda/launch.h"

namespace mfac_kernels {

// gram, factor (m, m), state (2), dots (m) -> coefficients (m).  work: 2 m
cudaError_t core_insert(double* gram, double* factor, int64_t* state, const double* dots, int64_t m, double shift, bool per_gradient,
                        double* work, double* coefficients, cudaStream_t);

// x (vectors, m) <- K^-1 x
cudaError_t core_solve(const double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient, double* x, int64_t vectors,
                       cudaStream_t);

// factor from gram.  work: 2 m
cudaError_t core_refactor(const double* gram, double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient,
                          double* work, cudaStream_t);

}  // namespace mfac_kernels
