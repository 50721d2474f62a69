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

// A block to be inverted or factored. Of `block` the lower triangle is read, all of it before anything is written: out may be its memory.
struct Job {
  Matrix block, out;  // (n, n)
  double damping;
  int32_t* info;  // set to 0; or the order of the leading minor that is not positive; or -1: the block or its damping is not finite
};

// Calls body(i, context) for all i < count, on several threads. A kernel that is given none stays on its own.
using Team = void (*)(int64_t count, void (*body)(int64_t i, const void* context), const void* context);

// The interleaved kernels serve n up to kInterleaved.
constexpr int64_t kInterleaved = 128, kMaxLanes = 16;

// Kernels that compute in float32 or in float64. What they write is NaN if a block fails. work: `..._work(n)` bytes, aligned to 64.
struct CholeskyKernels {
  int64_t lanes;

  // out = (block + damping I)^-1, both triangles, exactly symmetric
  int64_t (*inverse_work)(int64_t n);
  void (*inverse)(const Job&, int64_t n, void* work, Team);

  // out = L of L L^T = block + damping I; zero above the diagonal
  int64_t (*factor_work)(int64_t n);
  void (*factor)(const Job&, int64_t n, void* work, Team);

  // The same for `lanes` blocks at once; where there are fewer, jobs may be repeated.
  int64_t (*lanes_work)(int64_t n);
  void (*inverse_lanes)(const Job*, int64_t n, void* work);
  void (*factor_lanes)(const Job*, int64_t n, void* work);

  // x (n, columns) <- (L L^T)^-1 x
  int64_t (*solve_work)(int64_t n);
  void (*solve)(const Matrix& factor, int64_t n, const Matrix& x, int64_t columns, void* work);
};
const CholeskyKernels& cholesky_kernels(DType);  // float32 or float64

}  // namespace mfac_kernels
