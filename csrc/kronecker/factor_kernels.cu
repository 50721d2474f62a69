// Sums of products of the rows of a patch matrix P (R, D), which is never formed: the factor of a linear layer or a convolution.
//
//   C[i, j] = sum_r w[r] P[r, i] P[r, j]      (D, D), its diagonal blocks, or one per group of channels
//   factor <- beta factor + alpha C
//
// Floor: R D^2 float32 multiply-adds in the lower triangle (2 flops each; 60 TFLOP/s on an H200), D^2 floats of the factor read and
// written, x read once. For a 3 x 3 convolution with 256 channels on 32 images of 14 x 14 (D = 2304, R = 6272) that is 0.56 ms of
// arithmetic and 10 us of memory: arithmetic is the bound from D = 64 or so. Expected: 60-65 % of it with tiles of 128, 40 % with tiles of
// 64; of every 9 instructions of the loop 6 are multiply-adds, 2 address a patch and 1 reads shared memory.
//
// What makes it fast: im2col is address arithmetic, done while a tile goes to shared memory. Rows and columns of a tile are decoded into
// tables once per 128 rows and once per tile, so an element costs an addition, three comparisons if the image is padded, and a load that
// neighbouring threads share: along columns if channels are neighbours in memory, else along rows. Loads of the next 8 rows are in flight
// while this one's 8 x 8 products per thread run. Only tiles of the lower triangle exist. Every 512 rows registers are added to the tile's
// sums in the workspace, which keeps the digits of long sums; runs of rows have their own, and are added in order: no atomics.
#include <algorithm>

#include "kronecker/factor_cuda.h"
#include "kronecker/products.cuh"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;    // on an SM, at least: the registers must suffice
constexpr int kDepth = 8;     // rows of P multiplied at a time
constexpr int kSlab = 256;    // rows decoded at a time, one by each thread, and summed in registers
constexpr int kFlagged = 32;  // blocks that look for what is not finite
#if defined(MFAC_KERNELS_SIMT)
constexpr int64_t kManyBlocks = 8;  // small problems take every path
#else
constexpr int64_t kManyBlocks = 528;  // four for each SM of an H200
#endif
static_assert(kSlab == kThreads && kSlab % kDepth == 0);

// ---- products ---------------------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ T element(const Side& side, const T* data, const PatchRow& row, const PatchColumn<T>& column) {
  T value = column.constant;
  if (row.valid && column.has_element && (!side.padded || meets_image(side.patches, row, column))) value = data[row.offset + column.offset];
  return value;
}

// blockIdx.x: tiles, innermost, and blocks of the factor; blockIdx.y: runs of rows. sums (splits, blocks, tiles, kTile, kTile)
template <class T, int kTile, bool kCross>
__global__ void __launch_bounds__(kThreads, kBlocks) products_kernel(const Products p, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  constexpr int kPer = kTile / 16;        // rows, and columns, of the tile that a thread sums
  constexpr int kWide = 16 / sizeof(A);   // of which this many lie together
  constexpr int kStride = kTile + kWide;  // rows are aligned; 8 rows of 4 columns meet every bank once
  constexpr int kLoads = kDepth * kTile / kThreads;
  MFAC_SHARED(A, stage, 2 * 2 * kDepth * kStride);  // (chunk, side, row, column)
  MFAC_SHARED(PatchRow, rows, 2 * kSlab);
  MFAC_SHARED(A, weights, kSlab);
  MFAC_SHARED(PatchColumn<T>, columns, 2 * kTile);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t block = blockIdx.x / p.tiles, index = blockIdx.x % p.tiles;
  const TileIndex tile = kCross ? TileIndex{index / p.tiles_b, index % p.tiles_b} : lower_tile(index);
  const Side& b = kCross ? p.b : p.a;
  const T* const data_a = static_cast<const T*>(p.a.patches.data) + block * p.a.block_offset;
  const T* const data_b = static_cast<const T*>(b.patches.data) + block * b.block_offset;

  const int64_t all_rows = p.a.patches.samples * p.a.patches.axes[0].outputs * p.a.patches.axes[1].outputs * p.a.patches.axes[2].outputs;
  const int64_t slabs = divide_up(all_rows, kSlab);
  const int64_t begin = blockIdx.y * slabs / p.splits * kSlab, end = min((blockIdx.y + 1) * slabs / p.splits * kSlab, all_rows);
  for (int i = thread; i < kTile; i += kThreads) {
    columns[i] = column_of<T>(p.a, block, tile.row * kTile + i);
    columns[kTile + i] = column_of<T>(b, block, tile.column * kTile + i);
  }

  // Where this thread's loads of a tile (kDepth, kTile) lie: the first, and from one to the next
  const int row = p.along_rows ? thread % kDepth : thread / kTile, row_step = p.along_rows ? 0 : kThreads / kTile;
  const int column = p.along_rows ? thread / kDepth : thread % kTile, column_step = p.along_rows ? kThreads / kDepth : 0;
  T values[2][kLoads];
  const auto load = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int r = chunk * kDepth + row + i * row_step, c = column + i * column_step;
      values[0][i] = element(p.a, data_a, rows[r], columns[c]);
      values[1][i] = element(b, data_b, rows[r + (kCross ? kSlab : 0)], columns[kTile + c]);
    }
  };
  const auto store = [&](int chunk) {
    const auto to = stage + chunk % 2 * 2 * kDepth * kStride;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int r = row + i * row_step, c = column + i * column_step;
      to[r * kStride + c] = static_cast<A>(widen(values[0][i])) * weights[chunk * kDepth + r];
      to[(kDepth + r) * kStride + c] = static_cast<A>(widen(values[1][i]));
    }
  };

  // A warp's threads form 4 x 8 of the block's 16 x 16; packs of a thread are 16 packs apart.
  const int ty = lane / 8 + warp / 2 * 4, tx = lane % 8 + warp % 2 * 8;
  A* const tile_sums = sums + (blockIdx.y * int64_t(gridDim.x) + blockIdx.x) * kTile * kTile;
  int64_t first = begin;
  do {
    rows[thread] = patch_row(p.a.patches, first + thread, end);
    weights[thread] = weight_of<A>(p, first + thread, rows[thread]);
    if (kCross) rows[kSlab + thread] = patch_row(p.b.patches, first + thread, end);
    __syncthreads();
    A sum[kPer][kPer] = {};
    const auto chunks = static_cast<int>(divide_up(min(int64_t(kSlab), end - first), kDepth));
    load(0);
    store(0);
    __syncthreads();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool more = chunk + 1 < chunks;
      if (more) load(chunk + 1);
      const auto from = stage + chunk % 2 * 2 * kDepth * kStride;
#pragma unroll 1  // more would not fit the registers; other warps hide the latency
      for (int k = 0; k < kDepth; ++k) {
        Pack<A, kWide> left[kPer / kWide], right[kPer / kWide];
#pragma unroll
        for (int g = 0; g < kPer / kWide; ++g) {
          left[g] = load_pack<A, kWide>(from + (k * kStride + (16 * g + ty) * kWide));
          right[g] = load_pack<A, kWide>(from + ((kDepth + k) * kStride + (16 * g + tx) * kWide));
        }
#pragma unroll
        for (int i = 0; i < kPer; ++i)
#pragma unroll
          for (int j = 0; j < kPer; ++j) sum[i][j] += left[i / kWide].values[i % kWide] * right[j / kWide].values[j % kWide];
      }
      if (more) store(chunk + 1);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      A* const to = tile_sums + ((16 * (i / kWide) + ty) * kWide + i % kWide) * kTile + tx * kWide;
#pragma unroll
      for (int g = 0; g < kPer / kWide; ++g) {
        auto& pack = *reinterpret_cast<Pack<A, kWide>*>(to + 16 * g * kWide);
        Pack<A, kWide> total = {};
        if (first > begin) total = pack;
#pragma unroll
        for (int c = 0; c < kWide; ++c) total.values[c] += sum[i][g * kWide + c];
        pack = total;
      }
    }
    first += kSlab;
  } while (first < end);
}

// ---- finish -----------------------------------------------------------------------------------------------------------------------

struct Finish {
  Factor factor;    // of a cross product: one block
  int64_t columns;  // in a row of a block
  bool cross;
  double beta, alpha, bias_square;  // bias_square: negative if it is a sum like the others
  int tile_bits;                    // tiles have 2^tile_bits rows
  int64_t tiles, tiles_b, splits;
  const int* flags;  // (kFlagged): not null if the sums may be refused
  int32_t* refused;
};

__device__ __forceinline__ int64_t features_of(const Factor& factor, int64_t block) {
  return factor.groups > 1 ? factor.features : min(factor.size, factor.features - block * factor.size);
}
__device__ __forceinline__ int64_t sums_of_run(const Finish& f) { return (f.factor.blocks * f.tiles) << 2 * f.tile_bits; }
// Where the first run has the sum (i, j), i >= j unless it is a cross product, of a block
__device__ __forceinline__ int64_t sum_index(const Finish& f, int64_t block, int64_t i, int64_t j) {
  const int64_t row = i >> f.tile_bits, column = j >> f.tile_bits, mask = (1 << f.tile_bits) - 1;
  const int64_t tile = block * f.tiles + (f.cross ? row * f.tiles_b : count_of_lower(row)) + column;
  return (((tile << f.tile_bits) + (i & mask)) << f.tile_bits) + (j & mask);
}

// flags[blockIdx.x]: is some sum of squares not finite? NaN and Inf anywhere in a column show there.
template <class A>
__global__ void __launch_bounds__(kThreads) flag_kernel(const Finish f, const A* sums, int* flags) {
  const int64_t size = f.factor.size, count = f.factor.blocks * size * f.splits;
  int found = 0;
  for (int64_t e = int64_t(blockIdx.x) * kThreads + threadIdx.x; e < count; e += int64_t(kFlagged) * kThreads) {
    const int64_t i = e % size, block = e / size % f.factor.blocks, run = e / size / f.factor.blocks;
    if (i < features_of(f.factor, block)) found |= !isfinite(sums[run * sums_of_run(f) + sum_index(f, block, i, i)]);
  }
  found = __syncthreads_or(found);
  if (threadIdx.x == 0) flags[blockIdx.x] = found;
}

// Adds the runs, scales, and writes both triangles. blockIdx.x: squares of kSide of the lower triangle, innermost, and blocks of the
// factor. With kLanes > 1 that many threads share the runs of an element.
template <class A, int kSide, int kLanes>
__global__ void __launch_bounds__(kThreads) finish_kernel(const Finish f, const A* sums) {
  constexpr int kStep = kThreads / kLanes;  // elements at a time
  constexpr int kElements = kSide * kSide;
  static_assert(kElements % kStep == 0);
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
  const int64_t squares = f.cross ? down * across : count_of_lower(down);
  const int64_t block = blockIdx.x / squares, index = blockIdx.x % squares;
  const TileIndex square = f.cross ? TileIndex{index / across, index % across} : lower_tile(index);
  const int64_t first_row = square.row * kSide, first_column = square.column * kSide;
  A* const out = static_cast<A*>(f.factor.data) + block * size * f.columns;
  const bool squares_bias = f.bias_square >= 0 && (f.factor.groups > 1 || block == f.factor.blocks - 1);
  // Past a ragged end the factor is zero.
  const int64_t rows_used = f.cross ? size : features_of(f.factor, block), columns_used = f.cross ? f.columns : rows_used;
  const auto has_sum = [&](int64_t i, int64_t j) { return i < rows_used && j < columns_used && (f.cross || j <= i); };
  const auto place = [](int part, int row, int column) { return (part * kSide + row) * (kSide + 1) + column; };

  const int thread = static_cast<int>(threadIdx.x), part = thread / kStep;
  const int64_t run_length = sums_of_run(f);
  for (int e = thread % kStep; e < kElements; e += kStep) {
    const int64_t i = first_row + e / kSide, j = first_column + e % kSide;
    double sum = 0;
    if (has_sum(i, j)) {
      const A* from = sums + sum_index(f, block, i, j);
#pragma unroll 4
      for (int64_t run = part; run < f.splits; run += kLanes) sum += static_cast<double>(from[run * run_length]);
    }
    parts[place(part, e / kSide, e % kSide)] = sum;
  }
  __syncthreads();
  for (int e = thread; e < kElements; e += kThreads) {
    const int64_t i = first_row + e / kSide, j = first_column + e % kSide;
    if (i >= size || j >= f.columns || (!f.cross && j > i)) continue;
    double sum = 0;
    for (int l = 0; l < kLanes; ++l) sum += parts[place(l, e / kSide, e % kSide)];
    if (squares_bias && i == j && i == rows_used - 1) sum = f.bias_square;
    A& entry = out[i * f.columns + j];
    if (f.beta != 0 && has_sum(i, j))
      sum = f.alpha * sum + f.beta * static_cast<double>(entry);
    else
      sum *= f.alpha;
    entry = static_cast<A>(sum);
    parts[place(0, e / kSide, e % kSide)] = sum;
  }
  if (f.cross) return;
  __syncthreads();
  for (int e = thread; e < kElements; e += kThreads) {  // the mirror image, along its rows
    const int64_t i = first_row + e % kSide, j = first_column + e / kSide;
    if (i < size && j < i) out[j * f.columns + i] = static_cast<A>(parts[place(0, e % kSide, e / kSide)]);
  }
}

// ---- launch -----------------------------------------------------------------------------------------------------------------------

constexpr int64_t kRowsOfRun = 512;                     // at least
constexpr int64_t kFlagBytes = kFlagged * sizeof(int);  // at the start of the workspace; a multiple of 16

// The tiles of one block, times the runs of rows whose sums are added in order.
struct FactorCut {
  int tile;
  int64_t tiles, splits, bytes;  // bytes: of the workspace
};

FactorCut cut_of(DType dtype, int64_t rows, int64_t blocks, int64_t size, int64_t columns, bool cross) {
  FactorCut cut = {};
  cut.tile = dtype == DType::f64 || std::max(size, columns) <= 64 ? 64 : 128;
  const int64_t down = divide_up(size, cut.tile), across = divide_up(columns, cut.tile);
  cut.tiles = cross ? down * across : count_of_lower(down);
  const int64_t tiles = std::max<int64_t>(1, cut.tiles * blocks);
  cut.splits = std::clamp<int64_t>(kManyBlocks / tiles, 1, std::max<int64_t>(1, rows / kRowsOfRun));
  const int64_t item = dtype == DType::f64 ? sizeof(double) : sizeof(float);
  cut.bytes = kFlagBytes + tiles * cut.splits * cut.tile * cut.tile * item;
  return cut;
}

FactorCut factor_cut(const Patches& rows, const Factor& factor) {
  return cut_of(rows.dtype, rows.rows(), factor.blocks, factor.size, factor.size, false);
}
FactorCut cross_cut(const Patches& x, const Patches& y) { return cut_of(x.dtype, x.rows(), 1, x.channels, y.channels, true); }

Side side_of(const Patches& patches, double bias, const Factor& factor) {
  const int64_t bias_feature = factor.bias ? factor.features - 1 : -1;
  Side side = {patches, false, factor.size, factor.features, bias_feature, bias, factor.size, 0};
  for (const Axis& axis : patches.axes)
    side.padded |= axis.padding > 0 || (axis.outputs - 1) * axis.stride + (axis.kernel - 1) * axis.dilation >= axis.size;
  if (factor.groups > 1) {  // each block has the same features, of other channels
    side.block_features = 0;
    side.block_offset = patches.channels * patches.channel_step;
  }
  return side;
}

// A matrix seen as the only block of a factor
Factor block_of(const Patches& rows, void* data) {
  return {data, rows.dtype == DType::f64 ? DType::f64 : DType::f32, 1, 1, rows.channels, rows.channels, false};
}

template <class T, bool kCross>
cudaError_t launch_products(const Products& p, const FactorCut& cut, int64_t blocks, void* sums, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(cut.tiles * blocks), static_cast<unsigned>(cut.splits));
  auto* to = static_cast<Accumulator<T>*>(sums);
  if constexpr (!std::is_same_v<T, double>)
    if (cut.tile == 128) return launch(products_kernel<T, 128, kCross>, grid, dim3(kThreads), 0, stream, p, to);
  return launch(products_kernel<T, 64, kCross>, grid, dim3(kThreads), 0, stream, p, to);
}

template <class A>
cudaError_t launch_finish(Finish f, void* sums, int* flags, cudaStream_t stream) {
  const A* from = static_cast<const A*>(sums);
  if (f.refused) {
    const cudaError_t error = launch(flag_kernel<A>, dim3(kFlagged), dim3(kThreads), 0, stream, f, from, flags);
    if (error != cudaSuccess) return error;
    f.flags = flags;
  }
  const auto squares = [&](int side) {
    const int64_t down = divide_up(f.factor.size, side);
    return dim3(static_cast<unsigned>(f.factor.blocks * (f.cross ? down * divide_up(f.columns, side) : count_of_lower(down))));
  };
  constexpr int kManySplits = 4;
  return f.splits < kManySplits ? launch(finish_kernel<A, 32, 1>, squares(32), dim3(kThreads), 0, stream, f, from)
                                : launch(finish_kernel<A, 8, 4>, squares(8), dim3(kThreads), 0, stream, f, from);
}

cudaError_t sum_products(const Products& p, const FactorCut& cut, Finish f, void* workspace, cudaStream_t stream) {
  f.cross = p.cross;
  f.tile_bits = cut.tile == 128 ? 7 : 6;
  f.tiles = p.tiles;
  f.tiles_b = p.tiles_b;
  f.splits = p.splits;
  int* const flags = static_cast<int*>(workspace);
  void* const sums = static_cast<char*>(workspace) + kFlagBytes;
  const auto run = [&](auto element) {
    using T = decltype(element);
    const cudaError_t error = p.cross ? launch_products<T, true>(p, cut, f.factor.blocks, sums, stream)
                                      : launch_products<T, false>(p, cut, f.factor.blocks, sums, stream);
    return error != cudaSuccess ? error : launch_finish<Accumulator<T>>(f, sums, flags, stream);
  };
  switch (p.a.patches.dtype) {
    case DType::f32: return run(float());
    case DType::f64: return run(double());
    case DType::bf16: return run(bf16());
    default: return run(fp16());
  }
}

}  // namespace

int64_t factor_workspace(const FactorRows& rows, const Factor& factor) { return factor_cut(rows.patches, factor).bytes; }
int64_t cross_workspace(const Patches& x, const Patches& y) { return cross_cut(x, y).bytes; }

cudaError_t factor_accumulate(const FactorRows& rows, const Factor& factor, double beta, double alpha, int32_t* refused, void* workspace,
                              cudaStream_t stream) {
  if (factor.features == 0) return cudaSuccess;
  const FactorCut cut = factor_cut(rows.patches, factor);
  Products p = {};
  p.a = side_of(rows.patches, rows.bias, factor);
  p.along_rows = rows.patches.channel_step != 1;
  p.tiles = cut.tiles;
  p.splits = cut.splits;
  p.weights = rows.weights;
  p.by_visits = rows.by_visits;
  std::copy_n(rows.visited, Patches::kAxes, p.visited);
  Finish f = {};
  f.factor = factor;
  f.columns = factor.size;
  f.beta = beta;
  f.alpha = alpha;
  f.bias_square = factor.bias ? rows.bias_square : -1;
  f.refused = refused;
  return sum_products(p, cut, f, workspace, stream);
}

cudaError_t cross_products(const Patches& x, const Patches& y, const void* weights, void* out, void* workspace, cudaStream_t stream) {
  if (x.channels == 0 || y.channels == 0) return cudaSuccess;
  const FactorCut cut = cross_cut(x, y);
  const Factor left = block_of(x, out), right = block_of(y, out);
  Products p = {};
  p.a = side_of(x, 0, left);
  p.b = side_of(y, 0, right);
  p.cross = true;
  p.along_rows = x.channel_step != 1;
  p.tiles = cut.tiles;
  p.tiles_b = divide_up(y.channels, cut.tile);
  p.splits = cut.splits;
  p.weights = weights;
  Finish f = {};
  f.factor = left;
  f.columns = y.channels;
  f.alpha = 1;
  f.bias_square = -1;
  return sum_products(p, cut, f, workspace, stream);
}

}  // namespace mfac_kernels
