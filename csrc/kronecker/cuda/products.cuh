// What the kernels that sum products share (fma_kernels.cu, tensor_kernels.cu) and those that finish them (finish_kernels.cu): how products
// are cut into tiles, and what the rows and columns of a tile are.
#pragma once
#include <type_traits>

#include "common/cuda/convert.cuh"
#include "common/sizes.h"
#include "kronecker/cuda/factor_kernels.h"
#include "kronecker/cuda/patches.cuh"

namespace mfac_kernels {

template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One side of the product: the columns of a block, and how they follow from the features of the factor.
struct Side {
  Patches patches;
  bool padded;   // some patch reaches beyond the image
  int64_t size;  // features of a block
  int64_t features, bias_feature;
  double bias;
  int64_t block_features, block_offset;  // from block to block: first feature, and first element of the group
  // Columns are features, or (padded_channels > 0) come by kernel offsets, each with its channels, and the bias at the end.
  int64_t padded_channels;
};

// Square tiles of each block, those of the lower triangle unless it is a cross product; and runs of rows.
struct Cut {
  int tile_bits;  // tiles have 2^tile_bits rows and columns
  bool cross;
  int64_t blocks, tiles, tiles_across, splits;  // tiles: of a block

  __host__ __device__ int tile() const { return 1 << tile_bits; }
  __host__ __device__ int64_t sums_of_run() const { return (blocks * tiles) << 2 * tile_bits; }
  int64_t thread_blocks() const { return blocks * tiles * splits; }
};

// Part `index` of `count` of the rows [begin, end) of a group; count = 0: of none.
struct Run {
  int64_t begin, end, index, count;

  // In steps of whole slabs: where the run begins, or (index + 1) ends
  __device__ int64_t boundary(int64_t i, int64_t slab) const { return min(begin + i * divide_up(end - begin, slab) / count * slab, end); }
};

// sums (splits, blocks, tiles, tile, tile) = sums over runs of rows of w a a^T
struct FactorProducts {
  Side a;
  Cut cut;
  int64_t rows;
  bool along_rows;  // neighbouring rows, not columns, are neighbours in memory
  bool on_tensor_cores;
  const void* weights;
  const Run* runs;  // (splits): of ragged groups, of which none is cut into blocks; or null
  void* sums;
};

// The same with weights of pixels, of w a b^T if it is a cross product, or of some offsets alone
struct Products : FactorProducts {
  Side b;
  bool by_visits;
  Axis visited[Patches::kAxes];
  // Of columns by offsets: only the blocks of offsets (o, o2) are asked for whose bit o2 of chosen_offsets[o] is set, o >= o2.
  static constexpr int kChoices = 64;
  bool chosen;
  uint64_t chosen_offsets[kChoices];
};

// factor <- beta factor + alpha sums
struct Finish {
  Factor factor;    // of a cross product: one block
  int64_t columns;  // in a row of a block
  Cut cut;
  int64_t offsets, padded_channels;  // how features become columns: see Side
  Scale beta, alpha;
  double bias_square;  // negative if it is a sum like the others
  const void* sums;    // (cut.splits, ...)
  int64_t* firsts;     // of ragged groups, each of which is a block: their first runs; or null
  Run* runs;
  bool many_runs;    // of a block
  int32_t* refused;  // may be null: one for each of ragged groups, or for all blocks
  int* flags;        // (kFlagged) for each of refused
};
constexpr int kFlagged = 32;  // thread blocks that look for what is not finite

// Several factors of one launch: by value, at most 4 KB, so that it needs no copy to the device and can be captured.
constexpr int kTogether = 10;
template <class Item>
struct Together {
  int count = 0;
  int64_t thread_blocks = 0, first[kTogether];  // first: thread block of each
  Item items[kTogether];

  void add(const Item& item, int64_t blocks) {
    first[count] = thread_blocks;
    items[count++] = item;
    thread_blocks += blocks;
  }
};
static_assert(sizeof(Together<FactorProducts>) <= 4096);

// All of one type, and tiles of one size
cudaError_t fma_products(const Products& p, cudaStream_t stream);
cudaError_t fma_products(const Together<FactorProducts>& all, cudaStream_t stream);
cudaError_t tensor_products(const Products& p, cudaStream_t stream);
cudaError_t tensor_products(const Together<FactorProducts>& all, cudaStream_t stream);

// Whether the sums are finite, into flags
cudaError_t flag_sums(const Finish* items, int count, cudaStream_t stream);
// At most kTogether, of one type, with many runs or with few
cudaError_t finish_factors(const Finish* items, int count, cudaStream_t stream);

// What offset_products leaves in its workspace
struct OffsetSums {
  Cut cut;
  int64_t padded_channels;  // columns are o * padded_channels + c, the bias after the last offset
  const void* sums;
  const int* flags;  // (kFlagged), not null if the batch may be refused: 1 where something is not finite
};
// The sums of a convolution's patches by kernel offsets; `chosen`: Products::kChoices masks of the pairs of offsets that are asked for, or
// null
int64_t offset_workspace(const FactorRows& rows, const Factor& factor);
cudaError_t offset_products(const FactorRows& rows, const Factor& factor, const uint64_t* chosen, bool flagged, void* workspace,
                            OffsetSums* sums, cudaStream_t stream);

// Which item a thread block works on, and its index among those that do
struct Place {
  int item;
  int64_t index;
};
__device__ __forceinline__ Place place_of_block(const Products&) { return {0, blockIdx.x}; }
template <class Item>
__device__ __forceinline__ Place place_of_block(const Together<Item>& all) {
  int i = 0;
  while (i + 1 < all.count && blockIdx.x >= all.first[i + 1]) ++i;
  return {i, blockIdx.x - all.first[i]};
}
__device__ __forceinline__ const Products& item_of(const Products& p, int) { return p; }
template <class Item>
__device__ __forceinline__ const Item& item_of(const Together<Item>& all, int item) {
  return all.items[item];
}

struct TileIndex {
  int64_t row, column;
};
// Tiles of a lower triangle are counted row by row.
__host__ __device__ constexpr int64_t count_of_lower(int64_t rows) { return rows * (rows + 1) / 2; }
__device__ __forceinline__ TileIndex lower_tile(int64_t tile) {
  auto row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1) - 1) / 2);
  if (count_of_lower(row) > tile) --row;
  if (count_of_lower(row + 1) <= tile) ++row;
  return {row, tile - count_of_lower(row)};
}

// Where the first run has the sum of two columns of a block
__device__ __forceinline__ int64_t sum_index(const Cut& cut, int64_t block, int64_t i, int64_t j) {
  if (!cut.cross && i < j) {
    const int64_t swapped = i;
    i = j;
    j = swapped;
  }
  const int64_t row = i >> cut.tile_bits, column = j >> cut.tile_bits, mask = cut.tile() - 1;
  const int64_t tile = block * cut.tiles + (cut.cross ? row * cut.tiles_across : count_of_lower(row)) + column;
  return (((tile << cut.tile_bits) + (i & mask)) << cut.tile_bits) + (j & mask);
}

// The run that this thread block sums, and its tile among those of all blocks
struct Work {
  Run run;
  int64_t tile;
};
__device__ __forceinline__ Work work_of(const FactorProducts& p, int64_t thread_block) {
  const int64_t tiles = p.cut.blocks * p.cut.tiles, run = thread_block / tiles;
  return {p.runs ? p.runs[run] : Run{0, p.rows, run, p.cut.splits}, thread_block % tiles};
}

// Does some pair of kernel offsets in the tile concern us? Those of the diagonal do: they show whether the batch is finite.
__device__ __forceinline__ bool is_wanted(const FactorProducts&, const TileIndex&) { return true; }
__device__ __forceinline__ bool is_wanted(const Products& p, const TileIndex& tile) {
  if (!p.chosen || tile.row == tile.column) return true;
  const Axis(&axes)[Patches::kAxes] = p.a.patches.axes;
  const int64_t offsets = axes[0].kernel * axes[1].kernel * axes[2].kernel;
  const auto first = [&](int64_t t) { return (t << p.cut.tile_bits) / p.a.padded_channels; };
  const auto last = [&](int64_t t) { return (((t + 1) << p.cut.tile_bits) - 1) / p.a.padded_channels; };
  if (last(tile.row) >= offsets) return true;  // the bias
  for (int64_t o = first(tile.row); o <= last(tile.row); ++o)
    for (int64_t o2 = first(tile.column); o2 <= last(tile.column); ++o2)
      if (p.chosen_offsets[o] >> o2 & 1) return true;
  return false;
}

__device__ __forceinline__ int visits(const Axis& axis, int64_t pixel) {
  int count = 0;
  for (int64_t o = 0; o < axis.kernel; ++o) {
    const int64_t at = pixel + axis.padding - o * axis.dilation;
    count += at >= 0 && at % axis.stride == 0 && at / axis.stride < axis.outputs;
  }
  return count;
}

template <class A>
__device__ __forceinline__ A weight_of(const FactorProducts& p, int64_t index, const PatchRow& row) {
  if (!row.valid) return 0;
  return p.weights ? static_cast<const A*>(p.weights)[index] : A(1);
}
template <class A>
__device__ __forceinline__ A weight_of(const Products& p, int64_t index, const PatchRow& row) {
  if (!row.valid || p.weights || !p.by_visits) return weight_of<A>(static_cast<const FactorProducts&>(p), index, row);
  A weight = 1;
#pragma unroll
  for (int a = 0; a < Patches::kAxes; ++a) weight *= static_cast<A>(visits(p.visited[a], row.at[a])) / static_cast<A>(p.visited[a].kernel);
  return weight;
}

// Of columns by offsets, without gaps
__device__ __forceinline__ int64_t feature_of_column(const Side& side, int64_t column) {
  const int64_t patch = side.features - (side.bias_feature >= 0 ? 1 : 0);
  return column < patch ? column % side.padded_channels * (patch / side.padded_channels) + column / side.padded_channels : column;
}

template <class T>
__device__ __forceinline__ PatchColumn<T> column_of(const Side& side, int64_t block, int64_t column) {
  if (side.padded_channels > 0) column = feature_of_column(side, column);
  const int64_t feature = block * side.block_features + column;
  if (column < side.size && feature < side.features && feature != side.bias_feature) return patch_column<T>(side.patches, feature);
  PatchColumn<T> constant = {};
  if (column < side.size && feature == side.bias_feature) narrow(side.bias, constant.constant);
  return constant;
}

}  // namespace mfac_kernels
