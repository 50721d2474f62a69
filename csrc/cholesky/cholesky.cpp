// Glue of the ops on symmetric positive definite blocks: checks, and the blocks of all batches dealt to threads, the costliest first.
// A block is computed by one thread, so results are the same bit for bit whatever the number of threads.
#include "cholesky/cholesky.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cholesky/checks.h"
#include "common/tasks.h"

namespace mfac_kernels {
namespace {

Matrix matrix(const Batch& batch, int64_t b) { return {batch.at(b), batch.dtype, batch.row_stride, batch.column_stride}; }

// Blocks [begin, end) of a batch
struct Task {
  size_t batch;
  int64_t begin, end;
  double cost;
};

// Batches of `count(i)` blocks of `cost(i)` each in tasks that are worth their dispatch, the costliest first.
template <class Count, class Cost>
std::vector<Task> tasks_of(size_t batches, const Count& count, const Cost& cost) {
  constexpr double kBundle = 4e6;  // flops
  std::vector<Task> tasks;
  for (size_t i = 0; i < batches; ++i) {
    const int64_t run = std::max<int64_t>(1, static_cast<int64_t>(kBundle / (1 + cost(i))));
    for (int64_t b = 0; b < count(i); b += run) {
      const int64_t end = std::min(count(i), b + run);
      tasks.push_back({i, b, end, static_cast<double>(end - b) * cost(i)});
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

double cube(int64_t n) { return static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n); }

// kernel(kernels, block, n, damping, out) -> code, for every block
template <class Kernel>
Tensor for_each_block(const char* op, const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping,
                      const std::optional<Tensor>& only, const Kernel& kernel) {
  const std::vector<DampedBatch> batches = check_damped_batches(op, out, blocks, damping, only);
  check(!blocks.empty(), op, ": blocks: expected at least one tensor");
  Tensor info = torch::stable::new_empty(blocks[0], {block_count(batches)}, ScalarType::Int);
  auto* codes = static_cast<int32_t*>(info.mutable_data_ptr());
  const auto* chosen = only ? static_cast<const int32_t*>(only->const_data_ptr()) : nullptr;
  const auto tasks =
      tasks_of(batches.size(), [&](size_t i) { return batches[i].blocks.count; }, [&](size_t i) { return cube(batches[i].blocks.rows); });
  for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    const Task& task = tasks[t];
    const DampedBatch& batch = batches[task.batch];
    for (int64_t b = task.begin; b < task.end; ++b) {
      int32_t& code = codes[batch.first + b];
      code = chosen && !chosen[batch.first + b] ? 0
                                                : kernel(cholesky_kernels(batch.out.dtype), matrix(batch.blocks, b), batch.blocks.rows,
                                                         batch.damping[b * batch.damping_stride], matrix(batch.out, b));
    }
  });
  return info;
}

Tensor cholesky_inverse_(std::vector<Tensor> out, std::vector<Tensor> blocks, std::vector<Tensor> damping, std::optional<Tensor> only) {
  return for_each_block("cholesky_inverse_", out, blocks, damping, only,
                        [](const CholeskyKernels& kernels, const Matrix& block, int64_t n, double shift, const Matrix& to) {
                          return kernels.inverse(block, n, shift, to, scratch(kernels.inverse_work(n)));
                        });
}

Tensor cholesky_factor_(std::vector<Tensor> out, std::vector<Tensor> blocks, std::vector<Tensor> damping, std::optional<Tensor> only) {
  return for_each_block("cholesky_factor_", out, blocks, damping, only,
                        [](const CholeskyKernels& kernels, const Matrix& block, int64_t n, double shift, const Matrix& to) {
                          return kernels.factor(block, n, shift, to, scratch(kernels.factor_work(n)));
                        });
}

void cholesky_solve_(std::vector<Tensor> x, std::vector<Tensor> factors) {
  const std::vector<SolveBatch> batches = check_solve_batches("cholesky_solve_", x, factors);
  const auto tasks = tasks_of(
      batches.size(), [&](size_t i) { return batches[i].x.count; },
      [&](size_t i) {
        return 2 * cube(batches[i].x.rows) / static_cast<double>(std::max<int64_t>(1, batches[i].x.rows)) *
               static_cast<double>(batches[i].x.columns);
      });
  for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    const Task& task = tasks[t];
    const SolveBatch& batch = batches[task.batch];
    const CholeskyKernels& kernels = cholesky_kernels(batch.x.dtype);
    for (int64_t b = task.begin; b < task.end; ++b)
      kernels.solve(matrix(batch.factors, b), batch.x.rows, matrix(batch.x, b), batch.x.columns, scratch(kernels.solve_work(batch.x.rows)));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("cholesky_inverse_", TORCH_BOX(&cholesky_inverse_));
  m.impl("cholesky_factor_", TORCH_BOX(&cholesky_factor_));
  m.impl("cholesky_solve_", TORCH_BOX(&cholesky_solve_));
}

}  // namespace mfac_kernels
