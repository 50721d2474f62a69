// The kernels of a fixed set of gradients G (m, d), without torch. gram.cpp and the like split the work over threads. See gram_,
// block_inverse_ and inverse_diagonal_impl.h.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace mfac_kernels {

// The Gram matrix is computed in blocks of at most kGramRows x kGramRows entries, whose staged rows and sums fit L2; both are padded
// to whole tiles of a few entries.
constexpr int64_t kGramRows = 256, kGramStagedRows = kGramRows + 8, kGramSums = kGramRows * kGramRows * 3 / 2;
constexpr int64_t kGramWork = kGramSums * 8 + 2 * kGramStagedRows * 3072;

struct StaticKernels {
  // out[i, j] = a_i . b_j over `columns` columns; a (a_rows, columns), b (b_rows, columns), at most kGramRows rows each. b null: a with
  // itself, and only j <= i is written. work: kGramWork bytes, aligned to 64.
  using GramBlock = void(const void* a, int64_t a_rows, const void* b, int64_t b_rows, int64_t stride, int64_t columns, double* out,
                         int64_t out_stride, void* work);
  GramBlock *gram_block, *gram_block_in_double;  // the products in Compute<T>, or in float64

  // out (n, n) = (damping I + G^T G / count)^-1 for a block G (m, n) of columns. Returns 0, or the order of the leading minor that is
  // not positive, or -1 when the matrix is not finite; out is then NaN. The `ahead` columns after the block are prefetched. work:
  // block_inverse_work(n) bytes, aligned to 64.
  int64_t (*block_inverse_work)(int64_t n);
  int32_t (*block_inverse)(const void* block, int64_t stride, int64_t m, int64_t n, int64_t ahead, double damping, double count, void* out,
                           int64_t out_stride, void* work);

  // out[j] = (1 - sum_i (T G)_ij^2) / damping for a block G (m, n) of columns, T (m, m) lower triangular, given as packed by
  // pack_transform. work: inverse_diagonal_work(m) bytes, aligned to 64.
  int64_t (*packed_transform_bytes)(int64_t m);
  void (*pack_transform)(const double* transform, int64_t m, void* packed);
  int64_t (*inverse_diagonal_work)(int64_t m);
  void (*inverse_diagonal)(const void* columns, int64_t stride, int64_t m, int64_t n, const void* packed, double damping, void* out,
                           void* work);
};
const StaticKernels& static_kernels(DType);

}  // namespace mfac_kernels
