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
  int32_t* info;  // set to 0; or the order of the leading minor that is not positive (0, of a triangle); or -1: not finite, or its damping
};

// Calls body(i, context) for all i < count, on several threads. A kernel that is given none stays on its own.
using Team = void (*)(int64_t count, void (*body)(int64_t i, const void* context), const void* context);

// The interleaved kernels serve n up to kInterleaved.
constexpr int64_t kInterleaved = 128, kMaxLanes = 16;

// What becomes of a block, or of `lanes` blocks at once; where there are fewer, jobs may be repeated. work: `work(job, n)` bytes, or
// `lanes_work(n)` for the lanes, aligned to 64.
struct BlockKernel {
  int64_t (*work)(const Job&, int64_t n);
  void (*run)(const Job&, int64_t n, void* work, Team);
  void (*run_lanes)(const Job*, int64_t n, void* work);
};

// Kernels that compute in float32 or in float64. What they write is NaN if a block fails.
struct CholeskyKernels {
  int64_t lanes;
  int64_t (*lanes_work)(int64_t n);

  BlockKernel inverse;             // out = (block + damping I)^-1, both triangles, exactly symmetric
  BlockKernel factor;              // out = L of L L^T = block + damping I; zero above the diagonal
  BlockKernel inverse_factor;      // out = L^-1 of the same; zero above the diagonal
  BlockKernel triangular_inverse;  // out = the inverse of the block's lower triangle; zero above the diagonal; damping is 0

  // x (n, columns) <- (L L^T)^-1 x
  int64_t (*solve_work)(int64_t n);
  void (*solve)(const Matrix& factor, int64_t n, const Matrix& x, int64_t columns, void* work);

  // How many of `count` blocks of one size are computed at once: all of them alike, so that equal blocks have equal inverses, bit for bit.
  // Few are faster one by one, and large ones are worth a group only where all threads get groups.
  int64_t group_size(int64_t n, int64_t count) const {
    const int64_t fewest = n <= 16 ? 1 : n <= 32 ? lanes * 3 / 8 : n <= 64 ? lanes * 5 / 8 : 8 * lanes;
    return n <= kInterleaved && count >= fewest ? lanes : 1;
  }
};
const CholeskyKernels& cholesky_kernels(DType);  // float32 or float64

}  // namespace mfac_kernels
