// The diagonal of F^-1 by coordinates, on the device: y_j = (1 - sum_i (T G)_ij^2) / damping, with T (m, m) lower triangular and G (m, d).
//
// Floor: m (m + 1) d flops, m d elements of G read, d written. On an H200 m = 1024, d = 25.6 M takes 0.45 s at 60 TFLOP/s, of float32
// multiply-adds and of float64 tensor cores alike: bound by arithmetic from m = 32 on. Expected: 70-80 % of it for m >= 512 (tiles of T on
// its diagonal are multiplied whole: m + 128 in place of m + 1).
//
// T G exists only in registers, a tile of it at a time, squared as soon as it is complete. A block has 64 columns of G and all rows of T,
// or some of them where there are fewer blocks than a GPU has room for; the longest rows first. Squares of a thread's rows are summed in
// the type of the product, everything else in float64. No atomics: sums of parts lie in a workspace and are added in order.
#include <algorithm>

#include "mfac/cuda/product_tile.cuh"
#include "mfac/cuda/static_kernels.h"

namespace mfac_kernels {
namespace {

constexpr int64_t kManyTasks = 528;  // four for each SM of an H200
constexpr int kThreads = 256;

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;
constexpr int kTileRows = ProductTile<double, 128>::kRows, kTileColumns = ProductTile<double, 128>::kColumns;

struct DiagonalArguments {
  DeviceRows g;
  const double* transform;
  int64_t splits;
  double* partial;  // (splits, d)
};

// partial[split, j] = the sum of squares over the rows of T that belong to the split: tiles of them from the last but `split` on, downwards
template <class T>
__global__ void __launch_bounds__(kThreads) column_squares_kernel(const DiagonalArguments a) {
  using S = Compute<T>;
  using Tile = ProductTile<S, 128>;
  static_assert(Tile::kThreads == kThreads && Tile::kRows == kTileRows && Tile::kColumns == kTileColumns);
  MFAC_SHARED(S, stages, kStageElements<Tile>);
  MFAC_SHARED(double, sums, Tile::kWarpsDown* Tile::kColumns);
  const int64_t m = a.g.rows, d = a.g.dim, strips = divide_up(d, Tile::kColumns);
  for (int64_t task = blockIdx.x; task < strips * a.splits; task += gridDim.x) {
    const int64_t split = task / strips, column = task % strips * Tile::kColumns;
    double squares[Tile::kOwnColumns] = {};
    for (int64_t tile = divide_up(m, Tile::kRows) - 1 - split; tile >= 0; tile -= a.splits) {
      const int64_t row = tile * Tile::kRows, depth = min(m, row + Tile::kRows);
      const Operand<double, Layout::rows, Shape::lower> transform = {a.transform + row * m, m, m - row, depth, row};
      const Operand<T, Layout::columns> gradients = {static_cast<const T*>(a.g.data) + column, a.g.stride, d - column, depth, 0};
      S sum[Tile::kSums] = {};
      multiply<Tile>(transform, gradients, -1, stages, sum, [](int64_t) {});
#pragma unroll
      for (int c = 0; c < Tile::kOwnColumns; ++c) {
        S square = 0;
#pragma unroll
        for (int s = c; s < Tile::kSums; s += Tile::kOwnColumns) square += sum[s] * sum[s];
        squares[c] += square;
      }
    }
    __syncthreads();  // until the last sums have been read
#pragma unroll
    for (int c = 0; c < Tile::kOwnColumns; ++c) {
      for (int bit = Tile::kColumnLanes; bit < kWarpSize; bit *= 2) squares[c] += __shfl_xor_sync(kAllLanes, squares[c], bit);
      if (lane_of_thread() < Tile::kColumnLanes) sums[Tile::warp_down() * Tile::kColumns + Tile::column(c)] = squares[c];
    }
    __syncthreads();
    if (threadIdx.x < Tile::kColumns && column + threadIdx.x < d) {
      double sum = 0;
      for (int w = 0; w < Tile::kWarpsDown; ++w) sum += sums[w * Tile::kColumns + static_cast<int>(threadIdx.x)];
      a.partial[split * d + column + threadIdx.x] = sum;
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) finish_kernel(const double* partial, int64_t splits, int64_t d, double damping, S* diagonal) {
  for (int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x; j < d; j += int64_t(gridDim.x) * kThreads) {
    double sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += partial[s * d + j];
    diagonal[j] = static_cast<S>((1 - sum) / damping);
  }
}

}  // namespace

int64_t inverse_diagonal_splits(const DeviceRows& g) {
  const int64_t strips = std::max<int64_t>(1, divide_up(g.dim, kTileColumns));
  return std::clamp<int64_t>(kManyTasks / strips, 1, std::max<int64_t>(1, divide_up(g.rows, kTileRows)));
}

cudaError_t inverse_diagonal(const DeviceRows& g, const double* transform, double damping, double* partial, void* diagonal,
                             cudaStream_t stream) {
  if (g.dim == 0) return cudaSuccess;
  const int64_t splits = inverse_diagonal_splits(g);
  return for_type(g.dtype, [&](auto element) {
    using T = decltype(element);
    const DiagonalArguments arguments = {g, transform, splits, partial};
    const cudaError_t error =
        launch(column_squares_kernel<T>, dim3(grid_of(divide_up(g.dim, kTileColumns) * splits)), dim3(kThreads), 0, stream, arguments);
    if (error != cudaSuccess) return error;
    return launch(finish_kernel<Compute<T>>, dim3(grid_of(divide_up(g.dim, kThreads))), dim3(kThreads), 0, stream, partial, splits, g.dim,
                  damping, static_cast<Compute<T>*>(diagonal));
  });
}

}  // namespace mfac_kernels
