// Glue of the Gram matrices: checks, allocation, and the split of the work over threads. The split depends on the shapes alone, so
// results are the same bit for bit whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>

#include "common/cpu/tasks.h"
#include "common/new_tensor.h"
#include "mfac/cpu/passes.h"
#include "mfac/cpu/static_kernels.h"

namespace mfac_kernels {
namespace {

// How S = G_k G_k^T, for each block k of columns, is cut into tasks: pairs of row blocks, and segments of a block's columns.
struct GramTasks {
  int64_t blocks, row_blocks, rows, pairs, segments, count;

  GramTasks(const Rows& g, int64_t block_size)
      : blocks(block_count(g.dim, block_size)),
        row_blocks(std::max<int64_t>(1, divide_up(g.rows, kGramRows))),
        rows(divide_up(divide_up(g.rows, row_blocks), 16) * 16),
        pairs(row_blocks * (row_blocks + 1) / 2),
        segments(1) {
    constexpr int64_t kEnough = 32, kMinColumns = 4096;
    while (2 * segments * pairs * blocks <= kEnough && 2 * segments * kMinColumns <= std::min(block_size, g.dim)) segments *= 2;
    count = blocks * segments * pairs;
  }
};

// sum[i, j] = sum_s partial[s, i, j] for j <= i, and its mirror image. sum and partial[0] may be one.
void reduce_symmetric(const double* partial, int64_t segments, int64_t m, double* sum) {
  constexpr int64_t kTile = 16;  // a tile and its mirror image stay in L1
  const int64_t tiles = divide_up(m, kTile);
  parallel_for(0, tiles * tiles, 64, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t row = t / tiles * kTile, column = t % tiles * kTile;
      if (column > row) continue;
      for (int64_t i = row; i < std::min(m, row + kTile); ++i)
        for (int64_t j = column; j < std::min(i + 1, column + kTile); ++j) {
          double value = partial[i * m + j];
          for (int64_t s = 1; s < segments; ++s) value += partial[(s * m + i) * m + j];
          sum[i * m + j] = sum[j * m + i] = value;
        }
    }
  });
}

}  // namespace

void gram_blocks(const Rows& g, int64_t block_size, bool double_precision, double* out) {
  const int64_t m = g.rows;
  const StaticKernels& kernels = static_kernels(g.dtype);
  const auto gram_block = double_precision ? kernels.gram_block_in_double : kernels.gram_block;
  const GramTasks tasks(g, block_size);
  const auto partial = std::make_unique_for_overwrite<double[]>(tasks.segments > 1 ? tasks.blocks * tasks.segments * m * m : 0);
  double* sums = tasks.segments > 1 ? partial.get() : out;
  for_each_task(tasks.count, [&](int64_t t) {
    const int64_t block = t / (tasks.segments * tasks.pairs), segment = t / tasks.pairs % tasks.segments;
    int64_t i = 0, j = t % tasks.pairs;  // the pair's row blocks, j <= i
    while (j > i) j -= ++i;
    const int64_t first = block * block_size, width = std::min(block_size, g.dim - first);
    const int64_t from = first + width * segment / tasks.segments, to = first + width * (segment + 1) / tasks.segments;
    const char *a = g.at(i * tasks.rows, from), *b = j < i ? g.at(j * tasks.rows, from) : nullptr;
    const int64_t a_rows = std::min(tasks.rows, m - i * tasks.rows), b_rows = std::min(tasks.rows, m - j * tasks.rows);
    double* sum = sums + (block * tasks.segments + segment) * m * m + i * tasks.rows * m + j * tasks.rows;
    gram_block(a, a_rows, b, b_rows, g.stride, to - from, sum, m, scratch(kGramWork));
  });
  for (int64_t b = 0; b < tasks.blocks; ++b) reduce_symmetric(sums + b * tasks.segments * m * m, tasks.segments, m, out + b * m * m);
}

namespace {

Tensor gram(const Tensor& g, bool double_precision) {
  const Rows rows = check_gradients("gram", g);
  Tensor result = new_tensor(g, {rows.rows, rows.rows}, ScalarType::Double);
  auto* const out = static_cast<double*>(result.mutable_data_ptr());
  if (rows.dim == 0)
    std::fill_n(out, rows.rows * rows.rows, 0.0);
  else
    gram_blocks(rows, rows.dim, double_precision, out);
  return result;
}

Tensor block_gram(const Tensor& g, int64_t block_size, bool double_precision) {
  const Rows rows = check_gradients("block_gram", g);
  const int64_t width = block_width("block_gram", block_size, rows.dim);
  Tensor result = new_tensor(g, {block_count(rows.dim, width), rows.rows, rows.rows}, ScalarType::Double);
  gram_blocks(rows, width, double_precision, static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("block_gram", TORCH_BOX(&block_gram));
}

}  // namespace mfac_kernels
