// Gram matrices on the device: S_b = G_b G_b^T for each block b of columns of gradients G (m, d), (blocks, m, m) in float64.
//
// Floor: m (m + 1) d flops for one block of all columns; m d elements read. On an H200 (132 SMs, 4.3 TB/s copied, 60 TFLOP/s of float32
// multiply-adds and of float64 tensor cores alike) m = 1024, d = 25.6 M takes 0.45 s of arithmetic in either type and 24 ms of reading
// float32: bound by arithmetic from m = 32 on, by memory below. Expected: 70-80 % of the arithmetic for m >= 256 (tiles on the diagonal
// are computed whole: m + 64 in place of m + 1), 60-70 % of the bandwidth for m <= 32.
//
// Accuracy decides the rest: a Gram matrix is multiplied by up to 1 / damping in what follows. Products are therefore float32 with sums
// added up in float64 every kShortSum columns, or float64 throughout, on tensor cores, which costs the same on sm_80 and 90. The tensor
// cores of narrower types are left alone: they cut sums towards zero, which leaves the squared norms low by 1e-7, ten times the error
// promised, and TF32 has no more than 11 bits to begin with. GPUs with few float64 units (compute capability 8.6, 8.9, 12.0) take the
// float32 form at about its full rate and float64 at 1/64 of it.
//
// Only tiles that meet the lower triangle are computed; one on the diagonal reads its rows once for both operands. Where there are fewer
// tiles than a GPU has room for, columns are cut into segments, whose sums lie in a workspace and are added in order. No atomics.
#include <algorithm>

#include "mfac/cuda/product_tile.cuh"
#include "mfac/cuda/static_kernels.h"

namespace mfac_kernels {
namespace {

constexpr int64_t kManyTasks = 1056;       // eight for each SM of an H200
constexpr int64_t kSegmentColumns = 2048;  // at least
constexpr int kShortSum = 128;  // columns: float32 sums of so many random products are wrong by 2e-7, of d of them by 2e-7 / sqrt(d / 128)

struct GramArguments {
  DeviceRows g;
  int64_t block_size, blocks, segments;
  double* sums;  // (blocks, segments, m, m), of which the lower triangles are written
};

// The totals of a thread: in registers, or, where an SM would have room for one block of 8 warps then, in shared memory, those of
// neighbours side by side.
template <class Tile>
constexpr bool kTotalsInShared = sizeof(typename Tile::S) < sizeof(double) && Tile::kRows == 128;
template <class Tile>
constexpr int kGramBlocks = sizeof(typename Tile::S) < sizeof(double) ? 512 / Tile::kThreads : 1;  // on an SM, at least

template <class Tile>
struct RegisterTotals {
  double values[Tile::kSums];
  __device__ __forceinline__ explicit RegisterTotals(Shared<double>) {}
  __device__ __forceinline__ double& operator[](int i) { return values[i]; }
};
template <class Tile>
struct SharedTotals {
  Shared<double> first;
  __device__ __forceinline__ explicit SharedTotals(Shared<double> totals) : first(totals + static_cast<int>(threadIdx.x)) {}
  __device__ __forceinline__ double& operator[](int i) { return first[i * Tile::kThreads]; }
};
template <class Tile>
using Totals = std::conditional_t<kTotalsInShared<Tile>, SharedTotals<Tile>, RegisterTotals<Tile>>;

template <class T, class S, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, kGramBlocks<Tile>) gram_kernel(const GramArguments a) {
  MFAC_SHARED(S, stages, kStageElements<Tile>);
  MFAC_DYNAMIC_SHARED(double, totals);
  using Lower = LowerTiles<Tile>;
  const int64_t m = a.g.rows, tiles = Lower::count(m);
  for (int64_t task = blockIdx.x; task < a.blocks * a.segments * tiles; task += gridDim.x) {
    const int64_t part = task / tiles, tile = task % tiles, segment = part % a.segments;
    const auto [row, column] = Lower::at(tile);
    if (column >= m) continue;
    const int64_t first = part / a.segments * a.block_size, width = min(a.block_size, a.g.dim - first);
    const int64_t begin = first + width * segment / a.segments, depth = first + width * (segment + 1) / a.segments - begin;
    const auto rows_from = [&](int64_t r) {
      return Operand<T, Layout::rows>{static_cast<const T*>(a.g.data) + r * a.g.stride + begin, a.g.stride, m - r, depth, 0};
    };
    S sum[Tile::kSums] = {};
    Totals<Tile> total(totals);
#pragma unroll
    for (int s = 0; s < Tile::kSums; ++s) total[s] = 0;
    const auto flush = [&] {
#pragma unroll
      for (int s = 0; s < Tile::kSums; ++s) {
        total[s] += sum[s];
        sum[s] = 0;
      }
    };
    multiply<Tile>(rows_from(row), rows_from(column), column >= row ? static_cast<int>(column - row) : -1, stages, sum, [&](int64_t chunk) {
      if constexpr (sizeof(S) < sizeof(double))
        if ((chunk + 1) % (kShortSum / Tile::kDepth) == 0) flush();
    });
    flush();
    double* out = a.sums + part * m * m;
#pragma unroll
    for (int s = 0; s < Tile::kSums; ++s) {
      const int64_t r = row + Tile::row(s), c = column + Tile::column(s % Tile::kOwnColumns);
      if (r < m && c <= r) out[r * m + c] = total[s];
    }
  }
}

// grams[b, i, j] = sum_s partial[b, s, i, j] for j <= i, and its mirror image; tiles of kWarpSize x kWarpSize. grams may be partial.
constexpr int kReduceWarps = 8;
__global__ void __launch_bounds__(kReduceWarps* kWarpSize)
    mirror_kernel(const double* partial, int64_t blocks, int64_t segments, int64_t m, double* grams) {
  MFAC_SHARED(double, tile, kWarpSize*(kWarpSize + 1));
  const int lane = lane_of_thread();
  const int64_t side = divide_up(m, kWarpSize);
  for (int64_t task = blockIdx.x; task < blocks * side * side; task += gridDim.x) {
    const int64_t block = task / (side * side), row = task / side % side * kWarpSize, column = task % side * kWarpSize;
    if (column > row) continue;
    const double* in = partial + block * segments * m * m;
    double* out = grams + block * m * m;
    __syncthreads();  // until the last tile has been read
    for (int r = warp_of_thread(); r < kWarpSize; r += kReduceWarps) {
      const int64_t i = row + r, j = column + lane;
      if (i >= m || j > i) continue;
      double sum = 0;
      for (int64_t s = 0; s < segments; ++s) sum += in[(s * m + i) * m + j];
      out[i * m + j] = sum;
      tile[r * (kWarpSize + 1) + lane] = sum;
    }
    __syncthreads();
    for (int c = warp_of_thread(); c < kWarpSize; c += kReduceWarps) {
      const int64_t i = row + lane, j = column + c;
      if (i < m && j < i) out[j * m + i] = tile[lane * (kWarpSize + 1) + c];
    }
  }
}

}  // namespace

int64_t gram_segments(const DeviceRows& g, int64_t block_size) {
  const int64_t blocks = divide_up(g.dim, block_size), width = std::min(block_size, g.dim);
  if (blocks == 0 || g.rows == 0) return 1;
  const int64_t tiles = for_size(g.rows, [&]<int kSize> { return LowerTiles<ProductTile<double, kSize>>::count(g.rows); });
  return std::clamp<int64_t>(kManyTasks / (blocks * tiles), 1, std::max<int64_t>(1, width / kSegmentColumns));
}

cudaError_t gram(const DeviceRows& g, int64_t block_size, bool double_precision, double* partial, double* grams, cudaStream_t stream) {
  const int64_t blocks = divide_up(g.dim, block_size), segments = gram_segments(g, block_size);
  if (blocks == 0 || g.rows == 0) return cudaSuccess;
  const cudaError_t error = for_type(g.dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch_in = [&]<class S> {
      return for_size(g.rows, [&]<int kSize> {
        using Tile = ProductTile<S, kSize>;
        const GramArguments arguments = {g, block_size, blocks, segments, partial};
        const size_t totals = kTotalsInShared<Tile> ? sizeof(double) * Tile::kThreads * Tile::kSums : 0;
        return launch(gram_kernel<T, S, Tile>, dim3(grid_of(blocks * segments * LowerTiles<Tile>::count(g.rows))), dim3(Tile::kThreads),
                      totals, stream, arguments);
      });
    };
    if constexpr (!std::is_same_v<T, double>)
      if (!double_precision) return launch_in.template operator()<float>();
    return launch_in.template operator()<double>();
  });
  if (error != cudaSuccess) return error;
  const int64_t side = divide_up(g.rows, kWarpSize);
  return launch(mirror_kernel, dim3(grid_of(blocks * side * side)), dim3(kReduceWarps * kWarpSize), 0, stream, partial, blocks, segments,
                g.rows, grams);
}

}  // namespace mfac_kernels
