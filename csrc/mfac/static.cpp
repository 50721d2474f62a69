// Glue of the ops on a fixed set of gradients: checks, allocation, and the split of the work over threads. The split depends on the
// shapes alone, so results are the same bit for bit whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>

#include "common/checks.h"
#include "common/tasks.h"
#include "mfac/static.h"

namespace mfac_kernels {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Gradients {
  const char* data;
  DType dtype;
  int64_t m, d, stride, item;

  Gradients(const char* op, const Tensor& g) {
    check_rows(op, "g", g);
    dtype = dtype_of(op, "g", g);
    data = static_cast<const char*>(g.const_data_ptr());
    m = g.size(0);
    d = g.size(1);
    stride = g.stride(0);
    item = static_cast<int64_t>(g.element_size());
  }
  const char* at(int64_t row, int64_t column) const { return data + (row * stride + column) * item; }
  const StaticKernels& kernels() const { return static_kernels(dtype); }
  ScalarType accumulator() const { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }
};

// How S = G_k G_k^T, for each block k of columns, is cut into tasks: pairs of row blocks, and segments of a block's columns.
struct GramTasks {
  int64_t blocks, row_blocks, rows, pairs, segments, count;

  GramTasks(const Gradients& g, int64_t block_size)
      : blocks(divide_up(g.d, block_size)),
        row_blocks(std::max<int64_t>(1, divide_up(g.m, kGramRows))),
        rows(divide_up(divide_up(g.m, row_blocks), 16) * 16),
        pairs(row_blocks * (row_blocks + 1) / 2),
        segments(1) {
    constexpr int64_t kEnough = 32, kMinColumns = 4096;
    while (2 * segments * pairs * blocks <= kEnough && 2 * segments * kMinColumns <= std::min(block_size, g.d)) segments *= 2;
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

Tensor gram_of_blocks(const Tensor& tensor, const Gradients& g, int64_t block_size) {
  const int64_t m = g.m;
  const GramTasks tasks(g, block_size);
  Tensor result = torch::stable::new_empty(tensor, {tasks.blocks, m, m}, ScalarType::Double);
  double* out = static_cast<double*>(result.mutable_data_ptr());
  const auto partial = std::make_unique_for_overwrite<double[]>(tasks.segments > 1 ? tasks.blocks * tasks.segments * m * m : 0);
  double* sums = tasks.segments > 1 ? partial.get() : out;
  for_each_task(tasks.count, [&](int64_t t) {
    const int64_t block = t / (tasks.segments * tasks.pairs), segment = t / tasks.pairs % tasks.segments;
    int64_t i = 0, j = t % tasks.pairs;  // the pair's row blocks, j <= i
    while (j > i) j -= ++i;
    const int64_t first = block * block_size, width = std::min(block_size, g.d - first);
    const int64_t from = first + width * segment / tasks.segments, to = first + width * (segment + 1) / tasks.segments;
    const char *a = g.at(i * tasks.rows, from), *b = j < i ? g.at(j * tasks.rows, from) : nullptr;
    const int64_t a_rows = std::min(tasks.rows, m - i * tasks.rows), b_rows = std::min(tasks.rows, m - j * tasks.rows);
    double* sum = sums + (block * tasks.segments + segment) * m * m + i * tasks.rows * m + j * tasks.rows;
    g.kernels().gram_block(a, a_rows, b, b_rows, g.stride, to - from, sum, m, scratch(kGramWork));
  });
  for (int64_t b = 0; b < tasks.blocks; ++b) reduce_symmetric(sums + b * tasks.segments * m * m, tasks.segments, m, out + b * m * m);
  return result;
}

Tensor gram(const Tensor& g) {
  const Gradients rows("gram", g);
  if (rows.d == 0) return torch::stable::new_zeros(g, {rows.m, rows.m}, ScalarType::Double);
  return torch::stable::select(gram_of_blocks(g, rows, rows.d), 0, 0);
}

Tensor block_gram(const Tensor& g, int64_t block_size) {
  const Gradients rows("block_gram", g);
  check(block_size > 0, "block_gram: block_size: expected at least 1, got ", block_size);
  return gram_of_blocks(g, rows, block_size);
}

Tensor inverse_diagonal(const Tensor& g, const Tensor& transform, double damping) {
  constexpr const char* op = "inverse_diagonal";
  const Gradients rows(op, g);
  check_state(op, "transform", transform, ScalarType::Double, {rows.m, rows.m});
  check(damping > 0 && std::isfinite(damping), op, ": damping: expected a positive finite number, got ", damping);
  Tensor diagonal = torch::stable::new_empty(g, {rows.d}, rows.accumulator());
  auto* out = static_cast<char*>(diagonal.mutable_data_ptr());
  const auto item = static_cast<int64_t>(diagonal.element_size());
  const auto& kernels = rows.kernels();
  const auto packed = std::make_unique_for_overwrite<char[]>(kernels.packed_transform_bytes(rows.m));
  kernels.pack_transform(static_cast<const double*>(transform.const_data_ptr()), rows.m, packed.get());
  constexpr int64_t kColumns = 512;  // per task
  for_each_task(divide_up(rows.d, kColumns), [&](int64_t task) {
    const int64_t first = task * kColumns, n = std::min(kColumns, rows.d - first);
    kernels.inverse_diagonal(rows.at(0, first), rows.stride, rows.m, n, packed.get(), damping, out + first * item,
                             scratch(kernels.inverse_diagonal_work(rows.m)));
  });
  return diagonal;
}

std::tuple<Tensor, Tensor> block_inverse(const Tensor& g, int64_t block_size, double damping, double count) {
  constexpr const char* op = "block_inverse";
  const Gradients rows(op, g);
  check(block_size > 0, op, ": block_size: expected at least 1, got ", block_size);
  check(count > 0 && std::isfinite(count), op, ": count: expected a positive finite number, got ", count);
  const int64_t blocks = divide_up(rows.d, block_size);
  Tensor inverse = torch::stable::new_empty(g, {blocks, block_size, block_size}, rows.accumulator());
  Tensor info = torch::stable::new_empty(g, {blocks}, ScalarType::Int);
  auto* out = static_cast<char*>(inverse.mutable_data_ptr());
  auto* codes = static_cast<int32_t*>(info.mutable_data_ptr());
  const auto block_bytes = block_size * block_size * static_cast<int64_t>(inverse.element_size());
  const int64_t run = std::max<int64_t>(1, 512 / block_size);  // neighbours stay with one thread, which prefetches the next
  for_each_task(divide_up(blocks, run), [&](int64_t task) {
    for (int64_t b = task * run; b < std::min(blocks, (task + 1) * run); ++b) {
      const int64_t first = b * block_size, width = std::min(block_size, rows.d - first);
      const int64_t ahead = std::min({rows.d - first - width, ((task + 1) * run - b - 1) * block_size, block_size});
      if (width < block_size) std::memset(out + b * block_bytes, 0, block_bytes);
      codes[b] = rows.kernels().block_inverse(rows.at(0, first), rows.stride, rows.m, width, ahead, damping, count, out + b * block_bytes,
                                              block_size, scratch(rows.kernels().block_inverse_work(width)));
    }
  });
  return {inverse, info};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("block_gram", TORCH_BOX(&block_gram));
  m.impl("inverse_diagonal", TORCH_BOX(&inverse_diagonal));
  m.impl("block_inverse", TORCH_BOX(&block_inverse));
}

}  // namespace mfac_kernels
