// factor <- beta factor + alpha C, once the sums of products C are there: how runs of rows are added, scaled and mirrored.
//
// Floor: the sums, half of the factor's size for each run of rows, and half of the factor read, all of it written: 10 us for D = 2304 on an
// H200 with one run. Expected: 80 % of the copy bandwidth where the factor is large; where it is small, the latency of a launch.
//
// Squares of the lower triangle are finished by one block each, which writes their mirror image through shared memory, along its rows. Runs
// are few where the factor is large; where there are many, four threads share an element's. Sums are looked up in the order of columns that
// they were made in, which is not that of the features (products.cuh). Whether they are finite is seen on the diagonal, before anything is
// written.
#include "kronecker/cuda/products.cuh"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // on an SM, at least

// Where the sums of a block of the factor are
struct BlockSums {
  int64_t first, count;  // runs
  int64_t block;         // of a run
};
__device__ __forceinline__ BlockSums sums_of(const Finish& f, int64_t block) {
  if (!f.firsts) return {0, f.cut.splits, block};
  const int64_t first = f.firsts[block];
  return {first, f.runs[first].count, 0};
}

__device__ __forceinline__ int64_t features_of(const Factor& factor, int64_t block) {
  return factor.groups > 1 ? factor.features : min(factor.size, factor.features - block * factor.size);
}
__device__ __forceinline__ bool has_bias(const Factor& factor, int64_t block) {
  return factor.bias && (factor.groups > 1 || block == factor.blocks - 1);
}
__device__ __forceinline__ int64_t column_of_feature(const Finish& f, int64_t feature, bool is_bias) {
  if (f.padded_channels == 0) return feature;
  const auto i = static_cast<uint32_t>(feature), offsets = static_cast<uint32_t>(f.offsets);
  return is_bias ? f.offsets * f.padded_channels : i % offsets * f.padded_channels + i / offsets;
}

// flags: is some sum of squares not finite? NaN and Inf anywhere in a column show there. blockIdx.x: kFlagged thread blocks, innermost,
// ragged groups, and factors.
template <class A>
__global__ void __launch_bounds__(kThreads) flag_kernel(const Together<Finish> all) {
  const Place place = place_of_block(all);
  const Finish& f = all.items[place.item];
  const int64_t group = place.index / kFlagged, part = place.index % kFlagged;
  const int64_t first_block = f.firsts ? group : 0, blocks = f.firsts ? 1 : f.factor.blocks, size = f.factor.size;
  const BlockSums runs = sums_of(f, first_block);
  int found = !isfinite(f.beta.of(group)) || !isfinite(f.alpha.of(group));
  for (int64_t e = part * kThreads + threadIdx.x; e < blocks * size * runs.count; e += int64_t(kFlagged) * kThreads) {
    const int64_t i = e % size, block = e / size % blocks, run = runs.first + e / size / blocks;
    const int64_t features = features_of(f.factor, first_block + block);
    if (i >= features) continue;
    const int64_t column = column_of_feature(f, i, i == features - 1 && has_bias(f.factor, first_block + block));
    found |= !isfinite(static_cast<const A*>(f.sums)[run * f.cut.sums_of_run() + sum_index(f.cut, block, column, column)]);
  }
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) f.flags[place.index] = found;
}

// Adds the runs, scales, and writes both triangles. blockIdx.x: squares of kSide of the lower triangle, innermost, blocks of a factor, and
// factors. With kLanes > 1 that many threads share the runs of an element, which makes no difference to fewer runs.
template <class A, int kSide, int kLanes>
__global__ void __launch_bounds__(kThreads, kBlocks) finish_kernel(const Together<Finish> all) {
  constexpr int kStep = kThreads / kLanes;  // elements at a time
  static_assert(kStep % kSide == 0 && kSide * kSide % kStep == 0);
  MFAC_SHARED(double, parts, kLanes * kSide * (kSide + 1));
  const Place factor = place_of_block(all);
  const Finish& f = all.items[factor.item];
  const int64_t size = f.factor.size, down = divide_up(size, kSide), across = divide_up(f.columns, kSide);
  const int64_t squares = f.cut.cross ? down * across : count_of_lower(down);
  const int64_t block = factor.index / squares, index = factor.index % squares, group = f.firsts ? block : 0;
  if (f.refused) {
    int found = threadIdx.x < kFlagged ? f.flags[group * kFlagged + threadIdx.x] : 0;
    found = __syncthreads_or(found);
    if (found) {
      if (index == 0 && threadIdx.x == 0) f.refused[group] = 1;
      return;
    }
  }
  const TileIndex square = f.cut.cross ? TileIndex{index / across, index % across} : lower_tile(index);
  const int64_t first_row = square.row * kSide, first_column = square.column * kSide;
  A* const out = static_cast<A*>(f.factor.data) + block * size * f.columns;
  // Past a ragged end the factor is zero.
  const int64_t rows_used = f.cut.cross ? size : features_of(f.factor, block), columns_used = f.cut.cross ? f.columns : rows_used;
  const auto has_sum = [&](int64_t i, int64_t j) { return i < rows_used && j < columns_used && (f.cut.cross || j <= i); };
  const int64_t bias = has_bias(f.factor, block) ? rows_used - 1 : -1;
  const auto place = [](int part, int row, int column) { return (part * kSide + row) * (kSide + 1) + column; };

  const int thread = static_cast<int>(threadIdx.x), part = thread / kStep, column = thread % kSide;
  const BlockSums runs = sums_of(f, block);
  const int64_t run_length = f.cut.sums_of_run(), j = first_column + column;
  const A* const sums = static_cast<const A*>(f.sums) + runs.first * run_length;
  const int64_t sums_column = column_of_feature(f, j, j == bias);
  for (int row = thread % kStep / kSide; row < kSide; row += kStep / kSide) {
    const int64_t i = first_row + row;
    double sum = 0;
    if (has_sum(i, j)) {
      const A* from = sums + sum_index(f.cut, runs.block, column_of_feature(f, i, i == bias), sums_column);
#pragma unroll 4
      for (int64_t run = part; run < runs.count; run += kLanes) sum += static_cast<double>(from[run * run_length]);
    }
    parts[place(part, row, column)] = sum;
  }
  __syncthreads();
  const double beta = f.beta.of(group), alpha = f.alpha.of(group);
  for (int row = thread / kSide; row < kSide; row += kThreads / kSide) {
    const int64_t i = first_row + row;
    if (i >= size || j >= f.columns || (!f.cut.cross && j > i)) continue;
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += parts[place(l, row, column)];
    if (f.bias_square >= 0 && i == bias && j == bias) sum = f.bias_square;
    sum *= alpha;
    A& entry = out[i * f.columns + j];
    if (beta != 0 && has_sum(i, j)) sum += beta * static_cast<double>(entry);
    entry = static_cast<A>(sum);
    parts[place(0, row, column)] = sum;
  }
  if (f.cut.cross) return;
  __syncthreads();
  for (int row = thread / kSide; row < kSide; row += kThreads / kSide) {  // the mirror image, along its rows
    const int64_t from = first_row + column, to = first_column + row;
    if (from < size && to < from) out[to * f.columns + from] = static_cast<A>(parts[place(0, column, row)]);
  }
}

template <class A>
cudaError_t launch_finish(const Together<Finish>& all, bool many_runs, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(all.thread_blocks));
  return many_runs ? launch(finish_kernel<A, 8, 4>, grid, dim3(kThreads), 0, stream, all)
                   : launch(finish_kernel<A, 32, 1>, grid, dim3(kThreads), 0, stream, all);
}

}  // namespace

cudaError_t flag_sums(const Finish* items, int count, cudaStream_t stream) {
  Together<Finish> all;
  for (int i = 0; i < count; ++i) all.add(items[i], kFlagged * (items[i].firsts ? items[i].factor.groups : 1));
  const dim3 grid(static_cast<unsigned>(all.thread_blocks));
  return items[0].factor.dtype == DType::f64 ? launch(flag_kernel<double>, grid, dim3(kThreads), 0, stream, all)
                                             : launch(flag_kernel<float>, grid, dim3(kThreads), 0, stream, all);
}

cudaError_t finish_factors(const Finish* items, int count, cudaStream_t stream) {
  const bool many_runs = items[0].many_runs;
  Together<Finish> all;
  for (int i = 0; i < count; ++i) {
    const int64_t side = many_runs ? 8 : 32, down = divide_up(items[i].factor.size, side), across = divide_up(items[i].columns, side);
    all.add(items[i], items[i].factor.blocks * (items[i].cut.cross ? down * across : count_of_lower(down)));
  }
  return items[0].factor.dtype == DType::f64 ? launch_finish<double>(all, many_runs, stream) : launch_finish<float>(all, many_runs, stream);
}

}  // namespace mfac_kernels
