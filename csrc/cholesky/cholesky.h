// The kernels of symmetric positive definite blocks, without torch. cholesky.cpp splits the work over threads.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace mfac_kernels {

// A matrix of any strides, in elements
struct Matrix {
  void* data;
  DType dtype;
  int64_t row_stride, column_stride;
};

// Kernels that compute in float32 or in float64. Returned: 0, or the order of the leading minor that is not positive, or -1 when the
// block or its damping is not finite; out is then NaN. Of `block` the lower triangle is read, before anything is written: out may be the
// same memory. work: `..._work(n)` bytes, aligned to 64.
struct CholeskyKernels {
  // out (n, n) = (block + damping I)^-1, both triangles, exactly symmetric
  int64_t (*inverse_work)(int64_t n);
  int32_t (*inverse)(const Matrix& block, int64_t n, double damping, const Matrix& out, void* work);

  // out (n, n) = L of L L^T = block + damping I; zero above the diagonal
  int64_t (*factor_work)(int64_t n);
  int32_t (*factor)(const Matrix& block, int64_t n, double damping, const Matrix& out, void* work);

  // x (n, columns) <- (L L^T)^-1 x
  int64_t (*solve_work)(int64_t n);
  void (*solve)(const Matrix& factor, int64_t n, const Matrix& x, int64_t columns, void* work);
};
const CholeskyKernels& cholesky_kernels(DType);  // float32 or float64

}  // namespace mfac_kernels
