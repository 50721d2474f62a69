// Primal blocks of a Fisher matrix on the device: P_b = G_b^T G_b / count for each block of b columns of gradients G (m, d), in float32, or
// in float64 for float64 gradients; the lower triangles of (blocks, b, b), and what of the upper ones lies in
// their tiles. What makes inverses of them is the batched Cholesky kernels.
//
// Floor: m (b + 1) d flops, m d elements of G read, b d written. On an H200 (60 TFLOP/s of float32 multiply-adds and of float64 tensor
// cores alike, 4.3 TB/s copied) an element of a float32 G is read in 0.93 ps and multiplied in b / 60 ps, or 64 / 60 where a tile has 32
// columns: bound by memory and arithmetic alike up to b = 32, by arithmetic above. Expected: 60 % of either bound for b <= 32, 70-80 % for
// b >= 256.
//
// Narrow blocks share a tile of 32 columns, so that rows of G are read whole; only what lies in a block is stored. Sums are m long and in
// the type of the result, whose inverse is no more accurate than that.
#include <algorithm>

#include "mfac/cuda/product_tile.cuh"
#include "mfac/cuda/static_kernels.h"

namespace mfac_kernels {
namespace {

struct ProductArguments {
  DeviceRows g;
  int64_t block_size, together, groups;  // blocks that share a tile
  double scale;
  void* products;
};

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads) block_product_kernel(const ProductArguments a) {
  using S = typename Tile::S;
  MFAC_SHARED(S, stages, kStageElements<Tile>);
  using Lower = LowerTiles<Tile>;
  const int64_t group_width = a.block_size * a.together, tiles = Lower::count(group_width);
  for (int64_t task = blockIdx.x; task < a.groups * tiles; task += gridDim.x) {
    const int64_t first = task / tiles * group_width, width = min(group_width, a.g.dim - first);
    const auto [row, column] = Lower::at(task % tiles);
    if (row >= width || column >= width) continue;
    const auto columns_from = [&](int64_t c) {
      return Operand<T, Layout::columns>{static_cast<const T*>(a.g.data) + first + c, a.g.stride, width - c, a.g.rows, 0};
    };
    S sum[Tile::kSums] = {};
    multiply<Tile>(columns_from(row), columns_from(column), column >= row ? static_cast<int>(column - row) : -1, stages, sum,
                   [](int64_t) {});
#pragma unroll
    for (int s = 0; s < Tile::kSums; ++s) {
      const int64_t r = row + Tile::row(s), c = column + Tile::column(s % Tile::kOwnColumns), block = r / a.block_size;
      if (r < width && c < width && c >= block * a.block_size && c < (block + 1) * a.block_size)
        static_cast<S*>(a.products)[(first + r) * a.block_size + c - block * a.block_size] = static_cast<S>(sum[s] * a.scale);
    }
  }
}

}  // namespace

cudaError_t block_products(const DeviceRows& g, int64_t block_size, double count, void* products, cudaStream_t stream) {
  if (g.dim == 0) return cudaSuccess;
  const int64_t together = std::max<int64_t>(1, 32 / block_size), group_width = std::min(block_size, g.dim) * together;
  return for_type(g.dtype, [&](auto element) {
    using T = decltype(element);
    return for_size(group_width, [&]<int kSize> {
      using Tile = ProductTile<std::conditional_t<std::is_same_v<T, double>, double, float>, kSize>;
      const int64_t groups = divide_up(g.dim, block_size * together);
      const ProductArguments arguments = {g, block_size, together, groups, 1 / count, products};
      return launch(block_product_kernel<T, Tile>, dim3(grid_of(groups * LowerTiles<Tile>::count(block_size * together))),
                    dim3(Tile::kThreads), 0, stream, arguments);
    });
  });
}

}  // namespace mfac_kernels
