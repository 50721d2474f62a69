// Which kernel sums products, how these are cut, and what shares a launch: factors one by one, several at once, and ragged groups of rows,
// whose offsets the device alone knows.
//
// Each group is cut as it would be alone: a table of its runs comes first, with places for as many as there may be.
#include <algorithm>
#include <span>
#include <tuple>
#include <vector>

#include "kronecker/cuda/factor_kernels.h"
#include "kronecker/cuda/products.cuh"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 256;

constexpr int64_t kRowsOfRun = 512;  // at least
#if defined(MFAC_KERNELS_SIMT)
constexpr int64_t kManyBlocks = 8;  // small problems take every path
#else
constexpr int64_t kManyBlocks = 528;  // four for each SM of an H200
#endif
int64_t most_runs(int64_t tiles) { return std::max<int64_t>(1, kManyBlocks / std::max<int64_t>(1, tiles)); }

// Runs of a group of `rows` rows, at most `most`; and where its first one stands, if the group begins at row `begin`: behind those of the
// groups before it, whatever their sizes.
__host__ __device__ constexpr int64_t run_count(int64_t most, int64_t rows) {
  const int64_t runs = rows < kRowsOfRun ? 1 : rows / kRowsOfRun;
  return runs < most ? runs : most;
}
__host__ __device__ constexpr int64_t first_run(int64_t most, int64_t group, int64_t begin) {
  const int64_t most_before = group * most, runs_before = group + begin / kRowsOfRun;
  return most_before < runs_before ? most_before : runs_before;
}

// blockIdx.x: groups. firsts (groups): the first run of each; runs (places): what stands at each place
template <class Index>
__global__ void __launch_bounds__(kThreads)
    runs_kernel(const Index* offsets, int64_t rows, int64_t most, int64_t places, int64_t* firsts, Run* runs) {
  const int64_t group = blockIdx.x, from = offsets[group], to = offsets[group + 1];
  MFAC_DEVICE_CHECK(0 <= from && from <= to && to <= rows, "linear_factor_: offsets: descending or out of range");
  const auto row_at = [rows](int64_t offset) { return max(int64_t(0), min(offset, rows)); };
  const int64_t begin = row_at(from), end = max(begin, row_at(to)), count = run_count(most, end - begin);
  const int64_t first = first_run(most, group, begin);
  const int64_t next = group + 1 < gridDim.x ? first_run(most, group + 1, row_at(to)) : places;
  if (threadIdx.x == 0) firsts[group] = first;
  for (int64_t i = threadIdx.x; i < next - first; i += kThreads) runs[first + i] = i < count ? Run{begin, end, i, count} : Run{};
}

// Blocks of `rows_wide` by `columns_wide` sums
Cut cut_of(int tile_bits, bool cross, int64_t rows, int64_t blocks, int64_t rows_wide, int64_t columns_wide) {
  const int64_t down = divide_up(rows_wide, 1 << tile_bits), across = divide_up(columns_wide, 1 << tile_bits);
  const int64_t tiles = cross ? down * across : count_of_lower(down);
  return {tile_bits, cross, blocks, tiles, across, run_count(most_runs(tiles * blocks), rows)};
}
int tile_bits_of(DType dtype, int64_t width) { return dtype == DType::f64 || width <= 64 ? 6 : 7; }

Side side_of(const Patches& patches, const Factor& factor) {
  Side side = {};
  side.patches = patches;
  side.size = factor.size;
  side.features = factor.features;
  side.bias_feature = factor.bias ? factor.features - 1 : -1;
  for (const Axis& axis : patches.axes)
    side.padded |= axis.padding > 0 || (axis.outputs - 1) * axis.stride + (axis.kernel - 1) * axis.dilation >= axis.size;
  if (factor.groups > 1)  // each block has the same features, of other channels
    side.block_offset = patches.channels * patches.channel_step;
  else
    side.block_features = factor.size;
  return side;
}

// Tensor cores take rows of 16 bytes: channels that are neighbours in memory, and aligned wherever a patch or a block begins. Products of
// 16-bit rows with weights would be rounded.
bool fits_tensor_cores(const FactorRows& rows, const Factor& factor) {
  const Patches& p = rows.patches;
  const int64_t vector = 16 / element_size(p.dtype);
  const bool exact = p.dtype == DType::f32 ? rows.allow_tf32 : p.dtype != DType::f64 && !rows.weights && !rows.by_visits;
  bool aligned = p.channels > 0 && p.channel_step == 1 && reinterpret_cast<uintptr_t>(p.data) % 16 == 0 &&
                 (p.samples == 1 || p.sample_step % vector == 0);
  for (const Axis& axis : p.axes) aligned = aligned && (axis.size == 1 || axis.step % vector == 0);
  const bool whole_groups = factor.blocks == factor.groups && (factor.groups == 1 || p.channels % vector == 0);
  return exact && aligned && (whole_groups || (p.offsets() == 1 && factor.size % vector == 0));
}

// Of the rows of a factor: how they are cut, and the order of columns
struct Plan {
  Cut cut;
  int64_t padded_channels;  // see Side
};
Plan plan_of(const FactorRows& rows, const Factor& factor, bool by_offsets = false) {
  const Patches& p = rows.patches;
  if (!fits_tensor_cores(rows, factor))
    return {cut_of(tile_bits_of(p.dtype, factor.size), false, p.rows(), factor.blocks, factor.size, factor.size),
            by_offsets ? p.channels : 0};
  const int64_t vector = 16 / element_size(p.dtype);
  const int64_t padded = divide_up(std::min(p.channels, factor.size), vector) * vector,
                width = p.offsets() * padded + (factor.bias ? 1 : 0);
  return {cut_of(7, false, p.rows(), factor.blocks, width, width), padded};
}
Cut plan_of(const Patches& x, const Patches& y) {
  return cut_of(tile_bits_of(x.dtype, std::max(x.channels, y.channels)), true, x.rows(), 1, x.channels, y.channels);
}

Products products_of(const FactorRows& rows, const Factor& factor, const Plan& plan) {
  Products p = {};
  p.a = side_of(rows.patches, factor);
  p.a.bias = rows.bias;
  p.a.padded_channels = plan.padded_channels;
  p.cut = plan.cut;
  p.rows = rows.patches.rows();
  p.along_rows = rows.patches.channel_step != 1;
  p.weights = rows.weights;
  p.by_visits = rows.by_visits;
  std::copy_n(rows.visited, Patches::kAxes, p.visited);
  p.on_tensor_cores = fits_tensor_cores(rows, factor);
  return p;
}

// A matrix seen as the only block of a factor
Factor block_of(const Patches& rows, void* data) {
  return {data, rows.dtype == DType::f64 ? DType::f64 : DType::f32, 1, 1, rows.channels, rows.channels, false};
}

// What the kernels do for a factor
struct Task {
  Products products = {};
  Finish finish = {};
  const FactorRows* ragged = nullptr;  // if there are offsets: where they stand

  explicit Task(const FactorJob& job, bool by_offsets = false) {
    const FactorRows& rows = job.rows;
    Factor one = job.factor;  // of a group
    if (rows.offsets) one.groups = one.blocks = 1;
    products = products_of(rows, one, plan_of(rows, one, by_offsets));
    finish.factor = job.factor;
    finish.columns = one.size;
    finish.beta = job.beta;
    finish.alpha = job.alpha;
    finish.bias_square = rows.bias_square;
    finish.refused = job.refused;
    int64_t runs = products.cut.splits;
    if (rows.offsets) {
      ragged = &rows;
      runs = run_count(most(), products.rows);
      products.cut.splits = first_run(most(), job.factor.groups, products.rows);
    }
    describe(runs);
  }
  // Of a cross product
  Task(const Patches& x, const Patches& y, const void* weights, void* out) {
    products.a = side_of(x, block_of(x, out));
    products.b = side_of(y, block_of(y, out));
    products.cut = plan_of(x, y);
    products.rows = x.rows();
    products.along_rows = x.channel_step != 1;
    products.weights = weights;
    finish.factor = block_of(x, out);
    finish.columns = y.channels;
    finish.beta = {0};
    finish.bias_square = -1;
    describe(products.cut.splits);
  }

  // Tasks of one kind can share their launches.
  auto kind() const { return std::tuple(products.a.patches.dtype, products.on_tensor_cores, products.cut.tile_bits, finish.many_runs); }

  // Takes what it needs of the workspace, if there is one: flags, firsts, runs and sums. Returns the bytes, a multiple of 16.
  int64_t place(char* workspace) {
    int64_t used = 0;
    const auto take = [&]<class T>(T*& at, int64_t bytes) {
      at = workspace ? reinterpret_cast<T*>(workspace + used) : nullptr;
      used += divide_up(bytes, 16) * 16;
    };
    const int64_t groups = ragged ? finish.factor.groups : 1, splits = products.cut.splits;
    take(finish.flags, groups * kFlagged * static_cast<int64_t>(sizeof(int)));
    if (ragged) {
      take(finish.firsts, groups * static_cast<int64_t>(sizeof(int64_t)));
      take(finish.runs, splits * static_cast<int64_t>(sizeof(Run)));
      products.runs = finish.runs;
    }
    take(products.sums, splits * products.cut.sums_of_run() * (finish.factor.dtype == DType::f64 ? 8 : 4));
    finish.sums = products.sums;
    return used;
  }

  cudaError_t launch_runs(cudaStream_t stream) const {
    const dim3 grid(static_cast<unsigned>(finish.factor.groups));
    const auto run = [&]<class Index>(const Index* offsets) {
      return launch(runs_kernel<Index>, grid, dim3(kThreads), 0, stream, offsets, products.rows, most(), products.cut.splits, finish.firsts,
                    finish.runs);
    };
    return ragged->narrow_offsets ? run(static_cast<const int32_t*>(ragged->offsets)) : run(static_cast<const int64_t*>(ragged->offsets));
  }
  cudaError_t launch_products(cudaStream_t stream) const {
    return products.on_tensor_cores ? tensor_products(products, stream) : fma_products(products, stream);
  }

 private:
  int64_t most() const { return most_runs(products.cut.blocks * products.cut.tiles); }
  void describe(int64_t runs) {
    constexpr int64_t kManyRuns = 4;
    finish.cut = products.cut;
    finish.offsets = products.a.patches.offsets();
    finish.padded_channels = products.a.padded_channels;
    finish.many_runs = runs >= kManyRuns;
  }
};

// Of one kind
cudaError_t launch_together(std::span<const Task> tasks, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  std::vector<Finish> finish;
  for (const Task& task : tasks) {
    if (task.ragged && (error = task.launch_runs(stream)) != cudaSuccess) return error;
    finish.push_back(task.finish);
  }
  if (tasks.size() == 1) {
    error = tasks[0].launch_products(stream);
  } else {
    Together<FactorProducts> products;
    for (const Task& task : tasks) products.add(task.products, task.products.cut.thread_blocks());
    error = tasks[0].products.on_tensor_cores ? tensor_products(products, stream) : fma_products(products, stream);
  }
  if (error != cudaSuccess) return error;
  const auto count = static_cast<int>(finish.size());
  if (finish[0].refused && (error = flag_sums(finish.data(), count, stream)) != cudaSuccess) return error;
  return finish_factors(finish.data(), count, stream);
}

// body(tasks) for all jobs that have a factor, those together that share their launches
template <class Body>
cudaError_t for_each_launch(const FactorJob* jobs, int64_t count, const Body& body) {
  std::vector<Task> tasks;
  for (int64_t i = 0; i < count; ++i)
    if (jobs[i].factor.features > 0 && jobs[i].factor.blocks > 0) tasks.emplace_back(jobs[i]);
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.kind() < b.kind(); });
  for (size_t first = 0, end = 0; first < tasks.size(); first = end) {
    while (end < tasks.size() && end - first < kTogether && tasks[end].kind() == tasks[first].kind()) ++end;
    const cudaError_t error = body(std::span(tasks).subspan(first, end - first));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

int64_t factor_workspace(const FactorJob* jobs, int64_t count) {
  int64_t most = 0;
  for_each_launch(jobs, count, [&](std::span<Task> tasks) {
    int64_t bytes = 0;
    for (Task& task : tasks) bytes += task.place(nullptr);
    most = std::max(most, bytes);
    return cudaSuccess;
  });
  return most;
}

cudaError_t factor_accumulate(const FactorJob* jobs, int64_t count, void* workspace, cudaStream_t stream) {
  return for_each_launch(jobs, count, [&](std::span<Task> tasks) {
    char* at = static_cast<char*>(workspace);
    for (Task& task : tasks) at += task.place(at);
    return launch_together(tasks, stream);
  });
}

int64_t offset_workspace(const FactorRows& rows, const Factor& factor) {
  return Task({rows, factor, {}, {}, nullptr}, true).place(nullptr);
}

cudaError_t offset_products(const FactorRows& rows, const Factor& factor, const uint64_t* chosen, bool flagged, void* workspace,
                            OffsetSums* sums, cudaStream_t stream) {
  Task task({rows, factor, {}, {}, nullptr}, true);
  if (chosen) {
    task.products.chosen = true;
    std::copy_n(chosen, Products::kChoices, task.products.chosen_offsets);
  }
  task.place(static_cast<char*>(workspace));
  *sums = {task.finish.cut, task.finish.padded_channels, task.finish.sums, flagged ? task.finish.flags : nullptr};
  const cudaError_t error = task.launch_products(stream);
  return error == cudaSuccess && flagged ? flag_sums(&task.finish, 1, stream) : error;
}

int64_t cross_workspace(const Patches& x, const Patches& y) { return Task(x, y, nullptr, nullptr).place(nullptr); }

cudaError_t cross_products(const Patches& x, const Patches& y, const void* weights, void* out, void* workspace, cudaStream_t stream) {
  if (x.channels == 0 || y.channels == 0) return cudaSuccess;
  Task task(x, y, weights, out);
  task.place(static_cast<char*>(workspace));
  return launch_together({&task, 1}, stream);
}

}  // namespace mfac_kernels
