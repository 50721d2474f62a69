// Batches of symmetric positive definite blocks on the device, without torch. Strides are in elements; every pointer is a device pointer.
#pragma once
#include "common/cuda/launch.h"
#include "common/types.h"

namespace mfac_kernels {

struct BlockStrides {
  int64_t batch, row, column;
};

// Blocks A (count, n, n), of which the lower triangle is read, and what becomes of A + damping I. Block b has its damping at
// damping[b * damping_stride], its code at info[b * index_stride] and, if `only` is not null, is skipped where only[b * index_stride] is
// 0: its code is then 0. out may be the memory of in. Codes: 0; k, the leading minor of order k is not positive (of a triangle: is 0); -1,
// not finite. The result of a block with another code than 0 is NaN. Strides may be negative.
struct DeviceBlocks {
  const void* in;
  void* out;
  const double* damping;
  const int32_t* only;
  int32_t* info;
  BlockStrides in_strides, out_strides;
  int64_t index_stride, damping_stride, count;
  int32_t n;
  DType in_dtype;
};

// Of A + damping I = L L^T the inverse, L or L^-1; or the inverse of A's lower triangle. What is triangular has zeros above the diagonal.
enum class CholeskyResult { inverse, factor, inverse_factor, triangular_inverse };
template <CholeskyResult result>
constexpr bool kIsTriangular = result != CholeskyResult::inverse;
// Whether rows of the result are finished as they are eliminated: they are those of L^-1, and only rows below them change.
template <CholeskyResult result>
constexpr bool kIsFactorInverse = result == CholeskyResult::inverse_factor || result == CholeskyResult::triangular_inverse;

// dtype: that of every out, float32 or float64. work: cholesky_work bytes, aligned to 16.
int64_t cholesky_work(DType dtype, const DeviceBlocks* batches, int64_t batch_count);
cudaError_t cholesky_blocks(CholeskyResult, DType dtype, const DeviceBlocks* batches, int64_t batch_count, void* work, cudaStream_t);

// Right-hand sides x (count, n, columns), each overwritten by (L L^T)^-1 x; L (count, n, n) lower triangular, n > 0.
struct DeviceSolve {
  const void* factors;
  void* x;
  BlockStrides factor_strides, x_strides;
  int64_t count, columns;
  int32_t n;
};

cudaError_t cholesky_solve(DType dtype, const DeviceSolve* batches, int64_t batch_count, cudaStream_t);

}  // namespace mfac_kernels
