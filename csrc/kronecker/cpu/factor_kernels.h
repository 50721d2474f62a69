// The CPU kernels of Kronecker factors, without torch. factor.cpp splits the work over threads. See factor_impl.h, patches_impl.h.
#pragma once
#include <cstdint>

#include "kronecker/patches.h"

namespace mfac_kernels {

// At most this many columns of a patch matrix meet as many others in one task, whose sums and packed operands then stay in L2.
constexpr int64_t kBlockColumns = 320;

// Columns [first, first + count) of a patch matrix, count <= kBlockColumns.
struct Columns {
  const Patches* patches;
  int64_t first, count;
};

// Weight of row (n, q): values[n * step + q], float32, or float64 for float64 patches; null: 1.
struct Weights {
  const void* values;
  int64_t step;
};

// Where the sums of a pair of blocks of columns go: (row, column) of a matrix.
struct Target {
  void* data;
  int64_t stride, row, column;
  bool mirror;  // also at (column, row)
  double beta, alpha;
};

// Matrices of sums are made of tiles, in an order of columns that store() undoes; float32, or float64 for float64 patches.
struct FactorKernels {
  int64_t (*sums_size)(int64_t a, int64_t b);  // in elements, for blocks of a and b columns
  int64_t (*work_bytes)(const Columns& a, const Columns& b);
  // sums = sum over rows [first, first + rows) of w a^T b; b null: of w a^T a, of which the upper triangle is valid.
  // column_sums, if not null: sum of w a, in float64, in the order of a's columns. work: work_bytes(a, b), aligned to 64.
  void (*accumulate)(const Columns& a, const Columns* b, const Weights&, int64_t first, int64_t rows, void* sums, double* column_sums,
                     void* work);
  // sums[0] += sums[1] + ...: `count` matrices of `size` elements. Returns whether all results are finite.
  bool (*reduce)(void* sums, int64_t count, int64_t size);
  // target = beta target + alpha sums; beta = 0: target is not read.
  void (*store)(const Columns& a, const Columns* b, const void* sums, const Target&);
};
const FactorKernels& factor_kernels(DType);

// The same for many groups of few columns at once, as depthwise convolutions have them.
constexpr int64_t kNarrowColumns = 32;
struct NarrowKernels {
  int64_t groups;  // at a time, at most
  int64_t (*work_bytes)(const Patches& group);
  // sums (groups, n, n): sum over rows of w row row^T, n = columns of a group, at most kNarrowColumns, in the order of the patch matrix;
  // float32, or float64 for float64 patches. `group` is the first, the others follow at a distance of group_step elements. column_sums
  // (groups, n), if not null: sum of w row. work: work_bytes(group), aligned to 64.
  void (*accumulate)(const Patches& group, int64_t group_step, int64_t groups, const Weights&, int64_t first, int64_t rows, void* sums,
                     double* column_sums, void* work);
};
const NarrowKernels& narrow_kernels(DType);

// sums[sample, c, o] = the sum over positions of column (c, o), for one sample; float32, or float64 for float64 patches.
using PatchSums = void (*)(const Patches&, int64_t sample, void* sums);
PatchSums patch_sums(DType);

}  // namespace mfac_kernels
