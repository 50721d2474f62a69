// x <- (L L^T)^-1 x for batches of factors L (n, n), lower triangular, and right-hand sides x (n, k), in place.
//
// Eight rows of x at a time: what the solved rows contribute, then the triangle on the diagonal; down for L, up for L^T.
//
//   x_K <- L_KK^-1 (x_K - sum over solved rows J of L_KJ x_J)        L^T: L_KJ is L_JK^T
//
// A lane has one column, so that a warp reads rows of x in one piece and meets no other; L is read by tiles of 8 x 8, the same for all
// lanes: 64 multiply-adds for 16 loads of L and 8 of x. Up to n = 64 a warp works alone; above, eight warps share the solved rows of 32
// columns and add their sums in order.
//
// Flops: 2 n^2 k. Bytes: n^2 / 2 elements of L for each 32 columns (L2 serves all but the first), x read and written once and read n / 16
// times from L1 or L2. Estimate, not measured: a third of the multiply-add rate of the device for k n >= 10^5 or so, below that the
// latency of n / 4 dependent steps of 2 us.
#include "cholesky/cuda/batches.cuh"
#include "cholesky/cuda/tile.cuh"

namespace mfac_kernels {
namespace {

constexpr int kAlone = 64;  // the largest n that one warp takes
constexpr int kManyWarps = 8;

__host__ __device__ constexpr int64_t chunks_of(int64_t columns) { return (columns + kWarpSize - 1) / kWarpSize; }

// a <- the tile of L at rows and columns, or of L^T
template <bool kTransposed, class S>
__device__ __forceinline__ void load_factor(const S* factor, const BlockStrides& strides, int n, int row, int column, Tile<S>& a) {
  const int from_row = kTransposed ? column : row, from_column = kTransposed ? row : column;
  Tile<S> tile;
  load_tile(factor + from_row * strides.row + from_column * strides.column, strides.row, strides.column, n - from_row, n - from_column,
            tile);
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int c = 0; c < kTile; ++c) a[r][c] = kTransposed ? tile[c][r] : tile[r][c];
}

// Rows [k, k + 8) of this lane's column of x. Down: rows before them are solved; up: rows after them.
template <bool kUp, int kWarps, class S>
__device__ __forceinline__ void solve_rows(const S* factor, const BlockStrides& strides, int n, int k, S* x, int64_t stride, bool inside,
                                           Shared<S> sums) {
  const int warp = warp_of_thread(), lane = lane_of_thread();
  S sum[kTile] = {};
  const int begin = kUp ? k + kTile : 0, end = kUp ? n : k;
#pragma unroll 1
  for (int j = begin + warp * kTile; j < end; j += kWarps * kTile) {
    Tile<S> l;
    load_factor<kUp>(factor, strides, n, k, j, l);
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      const S y = inside && j + c < n ? x[(j + c) * stride] : S(0);
#pragma unroll
      for (int r = 0; r < kTile; ++r) sum[r] += l[r][c] * y;
    }
  }
  if constexpr (kWarps > 1) {
#pragma unroll
    for (int r = 0; r < kTile; ++r) sums[(warp * kTile + r) * kWarpSize + lane] = sum[r];
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int r = 0; r < kTile; ++r)
        for (int w = 1; w < kWarps; ++w) sum[r] += sums[(w * kTile + r) * kWarpSize + lane];
    }
  }
  if (warp == 0) {
    Tile<S> l;
    load_factor<kUp>(factor, strides, n, k, k, l);
    S y[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r) y[r] = inside && k + r < n ? x[(k + r) * stride] - sum[r] : S(0);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      const int r = kUp ? kTile - 1 - i : i;
      if (k + r >= n) continue;
      y[r] /= l[r][r];
#pragma unroll
      for (int later = 0; later < kTile; ++later)
        if (kUp ? later < r : later > r) y[later] -= l[later][r] * y[r];
      if (inside) x[(k + r) * stride] = y[r];
    }
  }
  if constexpr (kWarps > 1) __syncthreads();
}

template <class S, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize) solve_kernel(const BatchList<DeviceSolve> list) {
  MFAC_SHARED(S, sums, kWarps > 1 ? kWarps * kTile * kWarpSize : 1);
  const int index = batch_of_block(list);
  const DeviceSolve& batch = list.batches[index];
  const int64_t chunks = chunks_of(batch.columns), block = blockIdx.x - list.first[index], b = block / chunks;
  const int64_t column = block % chunks * kWarpSize + lane_of_thread();
  const bool inside = column < batch.columns;
  const S* const factor = static_cast<const S*>(batch.factors) + b * batch.factor_strides.batch;
  S* const x = static_cast<S*>(batch.x) + b * batch.x_strides.batch + (inside ? column * batch.x_strides.column : 0);
  const int last = (batch.n - 1) / kTile * kTile;
  for (int k = 0; k <= last; k += kTile)
    solve_rows<false, kWarps>(factor, batch.factor_strides, batch.n, k, x, batch.x_strides.row, inside, sums);
  for (int k = last; k >= 0; k -= kTile)
    solve_rows<true, kWarps>(factor, batch.factor_strides, batch.n, k, x, batch.x_strides.row, inside, sums);
}

template <class S, int kWarps>
cudaError_t launch_solve(const DeviceSolve* batches, int64_t count, cudaStream_t stream) {
  const auto blocks_of = [](const DeviceSolve& batch) {
    return (batch.n > kAlone) == (kWarps > 1) ? batch.count * chunks_of(batch.columns) : 0;
  };
  return for_each_list(batches, count, blocks_of, [&](const auto& list, dim3 grid) {
    return launch(solve_kernel<S, kWarps>, grid, dim3(kWarps * kWarpSize), 0, stream, list);
  });
}

template <class S>
cudaError_t launch_both(const DeviceSolve* batches, int64_t count, cudaStream_t stream) {
  const cudaError_t error = launch_solve<S, kManyWarps>(batches, count, stream);
  return error != cudaSuccess ? error : launch_solve<S, 1>(batches, count, stream);
}

}  // namespace

cudaError_t cholesky_solve(DType dtype, const DeviceSolve* batches, int64_t batch_count, cudaStream_t stream) {
  return dtype == DType::f64 ? launch_both<double>(batches, batch_count, stream) : launch_both<float>(batches, batch_count, stream);
}

}  // namespace mfac_kernels
