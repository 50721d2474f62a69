// factor <- beta factor + alpha C, once the sums of products C are there: which kernel sums them, how they are cut, and how runs of rows
// are added, scaled and mirrored.
//
// Floor: the sums, half of the factor's size for each run of rows, and half of the factor read, all of it written: 10 us for D = 2304 on an
// H200 with one run. Expected: 80 % of the copy bandwidth where the factor is large; where it is small, the latency of three launches.
//
// Squares of the lower triangle are finished by one block each, which writes their mirror image through shared memory, along its rows. Runs
// are few where the factor is large; where there are many, four threads share an element's. Sums are looked up in the order of columns that
// they were made in, which is not that of the features (products.cuh). Whether they are finite is seen on the diagonal, before anything is
// written.
#include <algorithm>

#include "kronecker/cuda/factor_kernels.h"
#include "kronecker/cuda/products.cuh"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 256;

constexpr int64_t kFlagBytes = kFlagged * sizeof(int);  // at the start of the workspace; a multiple of 16
constexpr int64_t kRowsOfRun = 512;                     // at least
#if defined(MFAC_KERNELS_SIMT)
constexpr int64_t kManyBlocks = 8;  // small problems take every path
#else
constexpr int64_t kManyBlocks = 528;  // four for each SM of an H200
#endif

// ---- finish -----------------------------------------------------------------------------------------------------------------------

struct Finish {
  Factor factor;    // of a cross product: one block
  int64_t columns;  // in a row of a block
  Cut cut;
  int64_t offsets, padded_channels;  // how features become columns: see Side
  double beta, alpha, bias_square;   // bias_square: negative if it is a sum like the others
  const int* flags;                  // (kFlagged): not null if the sums may be refused
  int32_t* refused;
};

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
// flags[blockIdx.x]: is some sum of squares not finite? NaN and Inf anywhere in a column show there.
template <class A>
__global__ void __launch_bounds__(kThreads) flag_kernel(const Finish f, const A* sums, int* flags) {
  const int64_t size = f.factor.size, count = f.factor.blocks * size * f.cut.splits;
  int found = 0;
  for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < count; e += int64_t(kFlagged) * kThreads) {
    const int64_t i = e % size, block = e / size % f.factor.blocks, run = e / size / f.factor.blocks;
    const int64_t features = features_of(f.factor, block);
    if (i >= features) continue;
    const int64_t column = column_of_feature(f, i, i == features - 1 && has_bias(f.factor, block));
    found |= !isfinite(sums[run * f.cut.sums_of_run() + sum_index(f.cut, block, column, column)]);
  }
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) flags[blockIdx.x] = found;
}

// Adds the runs, scales, and writes both triangles. blockIdx.x: squares of kSide of the lower triangle, innermost, and blocks of the
// factor. With kLanes > 1 that many threads share the runs of an element.
template <class A, int kSide, int kLanes>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Finish f, const A* sums) {
  constexpr int kStep = kThreads / kLanes;  // elements at a time
  static_assert(kStep % kSide == 0 && kSide * kSide % kStep == 0);
  MFAC_SHARED(double, parts, kLanes * kSide * (kSide + 1));
  if (f.flags) {
    int found = threadIdx.x < kFlagged ? f.flags[threadIdx.x] : 0;
    found = __syncthreads_or(found);
    if (found) {
      if (blockIdx.x == 0 && threadIdx.x == 0) *f.refused = 1;
      return;
    }
  }
  const int64_t size = f.factor.size, down = divide_up(size, kSide), across = divide_up(f.columns, kSide);
  const int64_t squares = f.cut.cross ? down * across : count_of_lower(down);
  const int64_t block = blockIdx.x / squares, index = blockIdx.x % squares;
  const TileIndex square = f.cut.cross ? TileIndex{index / across, index % across} : lower_tile(index);
  const int64_t first_row = square.row * kSide, first_column = square.column * kSide;
  A* const out = static_cast<A*>(f.factor.data) + block * size * f.columns;
  // Past a ragged end the factor is zero.
  const int64_t rows_used = f.cut.cross ? size : features_of(f.factor, block), columns_used = f.cut.cross ? f.columns : rows_used;
  const auto has_sum = [&](int64_t i, int64_t j) { return i < rows_used && j < columns_used && (f.cut.cross || j <= i); };
  const int64_t bias = has_bias(f.factor, block) ? rows_used - 1 : -1;
  const auto place = [](int part, int row, int column) { return (part * kSide + row) * (kSide + 1) + column; };

  const int thread = static_cast<int>(threadIdx.x), part = thread / kStep, column = thread % kSide;
  const int64_t run_length = f.cut.sums_of_run(), j = first_column + column;
  const int64_t sums_column = column_of_feature(f, j, j == bias);
  for (int row = thread % kStep / kSide; row < kSide; row += kStep / kSide) {
    const int64_t i = first_row + row;
    double sum = 0;
    if (has_sum(i, j)) {
      const A* from = sums + sum_index(f.cut, block, column_of_feature(f, i, i == bias), sums_column);
#pragma unroll 4
      for (int64_t run = part; run < f.cut.splits; run += kLanes) sum += static_cast<double>(from[run * run_length]);
    }
    parts[place(part, row, column)] = sum;
  }
  __syncthreads();
  for (int row = thread / kSide; row < kSide; row += kThreads / kSide) {
    const int64_t i = first_row + row;
    if (i >= size || j >= f.columns || (!f.cut.cross && j > i)) continue;
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += parts[place(l, row, column)];
    if (f.bias_square >= 0 && i == bias && j == bias) sum = f.bias_square;
    sum *= f.alpha;
    A& entry = out[i * f.columns + j];
    if (f.beta != 0 && has_sum(i, j)) sum += f.beta * static_cast<double>(entry);
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

// ---- launch -----------------------------------------------------------------------------------------------------------------------

// Blocks of `rows_wide` by `columns_wide` sums
Cut cut_of(int tile_bits, bool cross, int64_t rows, int64_t blocks, int64_t rows_wide, int64_t columns_wide) {
  const int64_t down = divide_up(rows_wide, 1 << tile_bits), across = divide_up(columns_wide, 1 << tile_bits);
  const int64_t tiles = cross ? down * across : count_of_lower(down);
  const int64_t splits =
      std::clamp<int64_t>(kManyBlocks / std::max<int64_t>(1, tiles * blocks), 1, std::max<int64_t>(1, rows / kRowsOfRun));
  return {tile_bits, cross, blocks, tiles, across, splits};
}
int tile_bits_of(DType dtype, int64_t width) { return dtype == DType::f64 || width <= 64 ? 6 : 7; }

int64_t workspace_of(const Cut& cut, DType dtype) {
  return kFlagBytes + cut.splits * cut.sums_of_run() * static_cast<int64_t>(dtype == DType::f64 ? sizeof(double) : sizeof(float));
}

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

template <class A>
cudaError_t launch_finish(Finish f, const void* sums, int* flags, cudaStream_t stream) {
  const A* from = static_cast<const A*>(sums);
  if (f.refused) {
    const cudaError_t error = launch(flag_kernel<A>, dim3(kFlagged), dim3(kThreads), 0, stream, f, from, flags);
    if (error != cudaSuccess) return error;
    f.flags = flags;
  }
  const auto squares = [&](int side) {
    const int64_t down = divide_up(f.factor.size, side);
    return dim3(static_cast<unsigned>(f.factor.blocks * (f.cut.cross ? down * divide_up(f.columns, side) : count_of_lower(down))));
  };
  constexpr int kManySplits = 4;
  return f.cut.splits < kManySplits ? launch(finish_kernel<A, 32, 1>, squares(32), dim3(kThreads), 0, stream, f, from)
                                    : launch(finish_kernel<A, 8, 4>, squares(8), dim3(kThreads), 0, stream, f, from);
}

cudaError_t sum_products(const Products& p, Finish f, void* workspace, cudaStream_t stream) {
  f.cut = p.cut;
  f.offsets = p.a.patches.offsets();
  f.padded_channels = p.a.padded_channels;
  int* const flags = static_cast<int*>(workspace);
  void* const sums = static_cast<char*>(workspace) + kFlagBytes;
  const cudaError_t error = p.on_tensor_cores ? tensor_products(p, sums, stream) : fma_products(p, sums, stream);
  if (error != cudaSuccess) return error;
  return f.factor.dtype == DType::f64 ? launch_finish<double>(f, sums, flags, stream) : launch_finish<float>(f, sums, flags, stream);
}

}  // namespace

int64_t factor_workspace(const FactorRows& rows, const Factor& factor) {
  return workspace_of(plan_of(rows, factor).cut, rows.patches.dtype);
}
int64_t cross_workspace(const Patches& x, const Patches& y) { return workspace_of(plan_of(x, y), x.dtype); }

cudaError_t factor_accumulate(const FactorRows& rows, const Factor& factor, double beta, double alpha, int32_t* refused, void* workspace,
                              cudaStream_t stream) {
  if (factor.features == 0) return cudaSuccess;
  Finish f = {};
  f.factor = factor;
  f.columns = factor.size;
  f.beta = beta;
  f.alpha = alpha;
  f.bias_square = rows.bias_square;
  f.refused = refused;
  return sum_products(products_of(rows, factor, plan_of(rows, factor)), f, workspace, stream);
}

int64_t offset_workspace(const FactorRows& rows, const Factor& factor) {
  return workspace_of(plan_of(rows, factor, true).cut, rows.patches.dtype);
}

cudaError_t offset_products(const FactorRows& rows, const Factor& factor, const uint64_t* chosen, bool flagged, void* workspace,
                            OffsetSums* sums, cudaStream_t stream) {
  Products p = products_of(rows, factor, plan_of(rows, factor, true));
  if (chosen) {
    p.chosen = true;
    std::copy_n(chosen, Products::kChoices, p.chosen_offsets);
  }
  int* const flags = static_cast<int*>(workspace);
  void* const at = static_cast<char*>(workspace) + kFlagBytes;
  *sums = {p.cut, p.a.padded_channels, at, flagged ? flags : nullptr};
  const cudaError_t error = p.on_tensor_cores ? tensor_products(p, at, stream) : fma_products(p, at, stream);
  if (error != cudaSuccess || !flagged) return error;
  Finish f = {};
  f.factor = factor;
  f.cut = p.cut;
  f.offsets = rows.patches.offsets();
  f.padded_channels = p.a.padded_channels;
  const auto flag = [&]<class A>(const A* from) {
    return launch(flag_kernel<A>, dim3(kFlagged), dim3(kThreads), 0, stream, f, from, flags);
  };
  return factor.dtype == DType::f64 ? flag(static_cast<const double*>(at)) : flag(static_cast<const float*>(at));
}

cudaError_t cross_products(const Patches& x, const Patches& y, const void* weights, void* out, void* workspace, cudaStream_t stream) {
  if (x.channels == 0 || y.channels == 0) return cudaSuccess;
  Products p = {};
  p.a = side_of(x, block_of(x, out));
  p.b = side_of(y, block_of(y, out));
  p.cut = plan_of(x, y);
  p.rows = x.rows();
  p.along_rows = x.channel_step != 1;
  p.weights = weights;
  Finish f = {};
  f.factor = block_of(x, out);
  f.columns = y.channels;
  f.alpha = 1;
  f.bias_square = -1;
  return sum_products(p, f, workspace, stream);
}

}  // namespace mfac_kernels
