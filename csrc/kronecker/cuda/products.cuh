// What the kernels that sum products share (fma_kernels.cu, tensor_kernels.cu) and the one that finishes them (factor_kernels.cu): how
// products are cut into tiles, and what the rows and columns of a tile are.
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
  dim3 grid() const { return dim3(static_cast<unsigned>(blocks * tiles), static_cast<unsigned>(splits)); }
};

// sums (splits, blocks, tiles, tile, tile) = sums over runs of rows of w a b^T, b = a unless it is a cross product
struct Products {
  Side a, b;
  Cut cut;
  int64_t rows;
  bool along_rows;  // neighbouring rows, not columns, are neighbours in memory
  const void* weights;
  bool by_visits;
  Axis visited[Patches::kAxes];
  bool on_tensor_cores;
  // Of columns by offsets: only the blocks of offsets (o, o2) are asked for whose bit o2 of chosen_offsets[o] is set, o >= o2.
  static constexpr int kChoices = 64;
  bool chosen;
  uint64_t chosen_offsets[kChoices];
};
cudaError_t fma_products(const Products& p, void* sums, cudaStream_t stream);
cudaError_t tensor_products(const Products& p, void* sums, cudaStream_t stream);

constexpr int kFlagged = 32;  // blocks that look for what is not finite

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

// Does some pair of kernel offsets in the tile concern us? Those of the diagonal do: they show whether the batch is finite.
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
__device__ __forceinline__ A weight_of(const Products& p, int64_t index, const PatchRow& row) {
  if (!row.valid) return 0;
  if (p.weights) return static_cast<const A*>(p.weights)[index];
  if (!p.by_visits) return 1;
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
