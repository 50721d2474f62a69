// Glue of the ops on symmetric positive definite blocks: checks, and the blocks of all batches dealt to threads, the costliest first.
// Every sum is one thread's, in an order that depends on sizes alone: results are the same bit for bit whatever the number of threads.
#include "cholesky/cpu/cholesky_kernels.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cholesky/checks.h"
#include "common/cpu/tasks.h"
#include "common/new_tensor.h"

namespace mfac_kernels {
namespace {

Matrix matrix(const Batch& batch, int64_t b) { return {batch.at(b), batch.dtype, batch.row_stride, batch.column_stride}; }

Matrix transposed(const Matrix& x) { return {x.data, x.dtype, x.column_stride, x.row_stride}; }

// J x J of a matrix (n, n), n > 0, with J the reversal of indices
Matrix reversed(const Matrix& x, int64_t n) {
  const int64_t last = (n - 1) * (x.row_stride + x.column_stride);
  return {static_cast<char*>(x.data) + last * element_size(x.dtype), x.dtype, -x.row_stride, -x.column_stride};
}

// A piece of work for one thread: items [begin, end) of a list
struct Task {
  size_t list;
  int64_t begin, end;
  double cost;
};

// Lists of `count(i)` items of `cost(i)` flops each in tasks that are worth their dispatch, the costliest first.
template <class Count, class Cost>
std::vector<Task> tasks_of(size_t lists, const Count& count, const Cost& cost) {
  constexpr double kBundle = 1e6;
  std::vector<Task> tasks;
  for (size_t i = 0; i < lists; ++i) {
    const int64_t run = std::max<int64_t>(1, static_cast<int64_t>(kBundle / (1 + cost(i))));
    for (int64_t b = 0; b < count(i); b += run) {
      const int64_t end = std::min(count(i), b + run);
      tasks.push_back({i, b, end, static_cast<double>(end - b) * cost(i)});
    }
  }
  if (tasks.size() > 1)  // a sort of one allocates
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  return tasks;
}

void all_threads(int64_t count, void (*body)(int64_t i, const void* context), const void* context) {
  for_each_task(count, [&](int64_t i) { body(i, context); });
}

double cube(int64_t n) { return static_cast<double>(n) * static_cast<double>(n) * static_cast<double>(n); }

// The blocks of all batches that have one size and one type of result
struct SizeClass {
  int64_t n;
  DType dtype;
  std::vector<const DampedBatch*> batches;
  std::vector<int64_t> firsts;  // of each batch, among the blocks of this class
  int64_t count = 0;

  // The first one's batch, then its place there
  std::pair<size_t, int64_t> find(int64_t block) const {
    const auto batch = static_cast<size_t>(std::upper_bound(firsts.begin(), firsts.end(), block) - firsts.begin() - 1);
    return {batch, block - firsts[batch]};
  }
};

std::vector<SizeClass> size_classes(const std::vector<DampedBatch>& batches) {
  std::vector<SizeClass> classes;
  for (const DampedBatch& batch : batches) {
    if (batch.blocks.count == 0) continue;
    auto same = std::find_if(classes.begin(), classes.end(),
                             [&](const SizeClass& c) { return c.n == batch.blocks.rows && c.dtype == batch.out.dtype; });
    if (same == classes.end()) same = classes.insert(classes.end(), SizeClass{batch.blocks.rows, batch.out.dtype, {}, {}});
    same->batches.push_back(&batch);
    same->firsts.push_back(same->count);
    same->count += batch.blocks.count;
  }
  return classes;
}

int64_t group_size(const SizeClass& of) { return cholesky_kernels(of.dtype).group_size(of.n, of.count); }

// Large blocks, and those that are few, are computed one after the other, each by all threads.
bool by_all_threads(const SizeClass& of) { return of.n >= 2048 || (of.n >= 512 && of.count < 8); }

Job job_as_it_is(const Job& job, int64_t) { return job; }

// Every block of every batch, after view(job, n), and its code.
template <class View>
void run_blocks(const std::vector<DampedBatch>& batches, const int32_t* chosen, BlockKernel CholeskyKernels::* chosen_kernel,
                const View& view, int32_t* codes) {
  const std::vector<SizeClass> classes = size_classes(batches);
  const auto run = [&](const SizeClass& of, int64_t begin, int64_t end, Team team) {  // groups [begin, end) of a class
    const CholeskyKernels& kernels = cholesky_kernels(of.dtype);
    const BlockKernel& kernel = kernels.*chosen_kernel;
    const int64_t lanes = group_size(of), last = std::min(of.count, end * lanes);
    auto [batch, b] = of.find(begin * lanes);
    for (int64_t first = begin * lanes; first < last; first += lanes) {
      const int64_t group = std::min(lanes, last - first);
      Job jobs[kMaxLanes];
      int64_t count = 0;
      for (int64_t i = 0; i < group; ++i, ++b) {
        while (b == of.batches[batch]->blocks.count) ++batch, b = 0;
        const DampedBatch& from = *of.batches[batch];
        codes[from.first + b] = 0;
        if (!chosen || chosen[from.first + b])
          jobs[count++] = view({matrix(from.blocks, b), matrix(from.out, b), from.damping ? from.damping[b * from.damping_stride] : 0,
                                &codes[from.first + b]},
                               of.n);
      }
      if (count == 0) continue;
      if (lanes > 1) {
        std::fill(jobs + count, jobs + kMaxLanes, jobs[0]);
        kernel.run_lanes(jobs, of.n, scratch(kernels.lanes_work(of.n)));
      } else {
        for (int64_t i = 0; i < count; ++i) kernel.run(jobs[i], of.n, scratch(kernel.work(jobs[i], of.n)), team);
      }
    }
  };
  for (const SizeClass& of : classes)
    if (by_all_threads(of)) run(of, 0, of.count, all_threads);
  const auto tasks = tasks_of(
      classes.size(),
      [&](size_t i) { return by_all_threads(classes[i]) ? 0 : (classes[i].count + group_size(classes[i]) - 1) / group_size(classes[i]); },
      [&](size_t i) { return cube(classes[i].n) * static_cast<double>(group_size(classes[i])); });
  for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t t) { run(classes[tasks[t].list], tasks[t].begin, tasks[t].end, nullptr); });
}

// The same of a list of batches; returns the codes.
template <class View>
Tensor run_lists(const char* op, const std::vector<DampedBatch>& batches, const std::vector<Tensor>& blocks,
                 const std::optional<Tensor>& only, BlockKernel CholeskyKernels::* kernel, const View& view) {
  check(!blocks.empty(), op, ": blocks: expected at least one tensor");
  Tensor info = new_tensor(blocks[0], {block_count(batches)}, ScalarType::Int);
  const auto* chosen = only ? static_cast<const int32_t*>(only->const_data_ptr()) : nullptr;
  run_blocks(batches, chosen, kernel, view, static_cast<int32_t*>(info.mutable_data_ptr()));
  return info;
}

Tensor cholesky_inverse_(const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping,
                         const std::optional<Tensor>& only) {
  constexpr const char* op = "cholesky_inverse_";
  return run_lists(op, check_damped_batches(op, out, blocks, damping, only), blocks, only, &CholeskyKernels::inverse, job_as_it_is);
}

Tensor cholesky_factor_(const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping,
                        const std::optional<Tensor>& only) {
  constexpr const char* op = "cholesky_factor_";
  return run_lists(op, check_damped_batches(op, out, blocks, damping, only), blocks, only, &CholeskyKernels::factor, job_as_it_is);
}

// One batch with one damping into new memory: result and codes.
std::tuple<Tensor, Tensor> of_one_batch(const char* op, const Tensor& blocks, double damping, BlockKernel CholeskyKernels::* kernel) {
  const Tensor result = new_result(op, blocks);
  const auto sizes = blocks.sizes();
  const Tensor info = new_tensor(blocks, {sizes.begin(), sizes.end() - 2}, ScalarType::Int);
  const std::vector<DampedBatch> batches = {
      {Batch(result, dtype_of(op, "result", result)), Batch(blocks, dtype_of(op, "blocks", blocks)), &damping, 0, 0}};
  run_blocks(batches, nullptr, kernel, job_as_it_is, static_cast<int32_t*>(info.mutable_data_ptr()));
  return {result, info};
}

std::tuple<Tensor, Tensor> cholesky_inverse_ex(const Tensor& blocks, double damping) {
  return of_one_batch("cholesky_inverse_ex", blocks, damping, &CholeskyKernels::inverse);
}

std::tuple<Tensor, Tensor> cholesky_factor_ex(const Tensor& blocks, double damping) {
  return of_one_batch("cholesky_factor_ex", blocks, damping, &CholeskyKernels::factor);
}

// With J H J = L L^T, H^-1 = U^T U for U = J L^-1 J. The lower triangle of J H J is that of H, transposed and reversed.
Tensor cholesky_inverse_factor_(const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, const std::vector<Tensor>& damping,
                                bool upper, const std::optional<Tensor>& only) {
  constexpr const char* op = "cholesky_inverse_factor_";
  return run_lists(op, check_damped_batches(op, out, blocks, damping, only), blocks, only, &CholeskyKernels::inverse_factor,
                   [upper](const Job& job, int64_t n) {
                     if (!upper || n == 0) return job;
                     return Job{reversed(transposed(job.block), n), reversed(job.out, n), job.damping, job.info};
                   });
}

Tensor triangular_inverse_(const std::vector<Tensor>& out, const std::vector<Tensor>& blocks, bool upper) {
  constexpr const char* op = "triangular_inverse_";
  return run_lists(op, check_triangular_batches(op, out, blocks), blocks, std::nullopt, &CholeskyKernels::triangular_inverse,
                   [upper](const Job& job, int64_t n) {
                     if (!upper || n == 0) return job;
                     return Job{reversed(job.block, n), reversed(job.out, n), job.damping, job.info};
                   });
}

void cholesky_solve_(const std::vector<Tensor>& x, const std::vector<Tensor>& factors) {
  constexpr int64_t kColumns = 256;  // of right-hand sides in a task: what packing the factor is worth
  const std::vector<SolveBatch> batches = check_solve_batches("cholesky_solve_", x, factors);
  const auto pieces = [&](size_t i) { return (batches[i].x.columns + kColumns - 1) / kColumns; };
  const auto tasks = tasks_of(
      batches.size(), [&](size_t i) { return batches[i].x.count * pieces(i); },
      [&](size_t i) {
        const double n = static_cast<double>(batches[i].x.rows);
        return 2 * n * n * static_cast<double>(std::min(kColumns, batches[i].x.columns));
      });
  for_each_task(static_cast<int64_t>(tasks.size()), [&](int64_t t) {
    const SolveBatch& batch = batches[tasks[t].list];
    const int64_t n = batch.x.rows, split = pieces(tasks[t].list);
    const CholeskyKernels& kernels = cholesky_kernels(batch.x.dtype);
    for (int64_t i = tasks[t].begin; i < tasks[t].end; ++i) {
      const int64_t first = i % split * kColumns;
      Matrix columns = matrix(batch.x, i / split);
      columns.data = static_cast<char*>(columns.data) + first * columns.column_stride * batch.x.item;
      kernels.solve(matrix(batch.factors, i / split), n, columns, std::min(kColumns, batch.x.columns - first),
                    scratch(kernels.solve_work(n)));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mfac_kernels, CPU, m) {
  m.impl("cholesky_inverse_ex", TORCH_BOX(&cholesky_inverse_ex));
  m.impl("cholesky_factor_ex", TORCH_BOX(&cholesky_factor_ex));
  m.impl("cholesky_inverse_", TORCH_BOX(&cholesky_inverse_));
  m.impl("cholesky_factor_", TORCH_BOX(&cholesky_factor_));
  m.impl("cholesky_inverse_factor_", TORCH_BOX(&cholesky_inverse_factor_));
  m.impl("triangular_inverse_", TORCH_BOX(&triangular_inverse_));
  m.impl("cholesky_solve_", TORCH_BOX(&cholesky_solve_));
}

}  // namespace mfac_kernels
