// Pass 2 over a window of gradients G (m, d) on the device, k vectors at a time.
//
//   Y[v, j] = alpha X[v, j] + beta sum_i C[v, i] G[i, j]     (k, d)
//
// Floor and loads are those of pass 1 (window_dots_kernels.cu). The warps of a thread block share the rows, and add their sums once per
// tile of columns.
#include <algorithm>

#include "common/sizes.h"
#include "mfac/cuda/window_kernels.h"
#include "mfac/cuda/window_steps.cuh"

namespace mfac_kernels {
namespace {

struct CombineArguments {
  DeviceRows window, x, out;  // x.data may be null
  const double* coefficients;
  int64_t block_size, tiles;  // tiles of one block of columns
  double beta, alpha;
};

template <int kRows, int kColumns, class T, class Load>
__device__ __forceinline__ Packs<T, kRows, kColumns> load_rows(const T* g, int64_t stride, int64_t i, const Load& load) {
  Packs<T, kRows, kColumns> packs;
#pragma unroll
  for (int r = 0; r < kRows; ++r) packs.rows[r] = load(g + (i + r) * stride);
  return packs;
}

// sum += rows [i, i + kRows) times their coefficients, which are `rows` apart from vector to vector
template <int kRows, int kVectors, int kColumns, class T>
__device__ __forceinline__ void combine_rows(const Packs<T, kRows, kColumns>& packs, const double* const (&coefficients)[kVectors],
                                             int64_t i, Lift<T> (&lift)[kColumns], double (&sum)[kVectors][kColumns]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    double value[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) value[c] = lift[c](packs.rows[r].values[c]);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const double coefficient = coefficients[v][i + r] * Lift<T>::kScale;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[v][c] += coefficient * value[c];
    }
  }
}

// This warp's share of the rows, whose elements are load(row)
template <bool kAhead, int kVectors, int kColumns, class T, class Load>
__device__ __forceinline__ void combine_warp(const T* g, int64_t stride, int64_t rows, const Load& load,
                                             const double* const (&coefficients)[kVectors], double (&sum)[kVectors][kColumns]) {
  constexpr int kRows = WindowTile<T, kVectors>::kRows, kStep = kWarps * kRows;
  const int warp = warp_of_thread();
  const int64_t whole = rows / kRows * kRows;
  Lift<T> lift[kColumns];
  int64_t i = warp * kRows;
  const auto load_at = [&](int64_t at) { return load_rows<kRows, kColumns>(g, stride, at, load); };
  if constexpr (kAhead) {
    if (i < whole) {
      auto at_hand = load_at(i);
#pragma unroll 1
      for (; i + kStep < whole; i += kStep) {
        const auto next = load_at(i + kStep);
        combine_rows(at_hand, coefficients, i, lift, sum);
        at_hand = next;
      }
      combine_rows(at_hand, coefficients, i, lift, sum);
    }
  } else {
#pragma unroll 1  // as in pass 1
    for (; i < whole; i += kStep) combine_rows(load_at(i), coefficients, i, lift, sum);
  }
  if (whole + warp < rows) combine_rows(load_rows<1, kColumns>(g, stride, whole + warp, load), coefficients, whole + warp, lift, sum);
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sum[v][c] += lift[c].nan_unless_finite();
}

// blockIdx.x: vectors, innermost, and tiles of columns. Rows are dealt to warps.
template <class T, int kVectors>
__global__ void __launch_bounds__(kThreads, kBlocks) combine_kernel(const CombineArguments a) {
  using Tile = WindowTile<T, kVectors>;
  static_assert(Tile::kRows <= kWarps);  // the rows that fill no group are dealt one to a warp
  MFAC_SHARED(double, sums, kWarps * kVectors * Tile::kStep);
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t groups = divide_up(a.out.rows, kVectors);
  const int64_t first_vector = blockIdx.x % groups * kVectors, block = blockIdx.x / groups / a.tiles;
  const int64_t first_column = block * a.block_size + blockIdx.x / groups % a.tiles * Tile::kStep;
  const int64_t last_column = min((block + 1) * a.block_size, a.window.dim);
  const int width = static_cast<int>(min(int64_t(Tile::kStep), last_column - first_column));
  if (width <= 0) return;  // a ragged last block has fewer tiles

  const double* coefficients[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
    coefficients[v] = a.coefficients + (block * a.out.rows + min(first_vector + v, a.out.rows - 1)) * a.window.rows;
  const T* const g = static_cast<const T*>(a.window.data) + first_column;
  const bool is_whole = width == Tile::kStep;
  bool aligned = is_aligned<T, Tile::kColumns>(g, a.window.stride);
  double sum[kVectors][Tile::kColumns] = {};
  const auto combine = [&]<bool kAhead = false>(const auto& load) {
    combine_warp<kAhead>(g, a.window.stride, a.window.rows, load, coefficients, sum);
  };
  if constexpr (kVectors == 1) {
    aligned &= is_whole;
    if (aligned)
      combine.template operator()<Tile::kAhead>([](const T* p) { return load_step<true, Tile::kColumns>(p); });
    else
      combine([&](const T* p) { return load_ragged_step<false, Tile::kColumns>(p, width); });
  } else {  // in loops of their own they need more registers than there are
    const auto load = [&]<bool kAligned>(const T* p) {
      return is_whole ? load_step<kAligned, Tile::kColumns>(p) : load_ragged_step<kAligned, Tile::kColumns>(p, width);
    };
    if (aligned)
      combine([&](const T* p) { return load.template operator()<true>(p); });
    else
      combine([&](const T* p) { return load.template operator()<false>(p); });
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v)
#pragma unroll
    for (int c = 0; c < Tile::kColumns; ++c) sums[(warp * kVectors + v) * Tile::kStep + c * kWarpSize + lane] = sum[v][c];
  __syncthreads();

  for (int i = threadIdx.x; i < kVectors * Tile::kStep; i += kThreads) {
    const int v = i / Tile::kStep, column = i % Tile::kStep;
    if (first_vector + v >= a.out.rows || column >= width) continue;
    double y = 0;
    for (int w = 0; w < kWarps; ++w) y += sums[(w * kVectors + v) * Tile::kStep + position_of<Tile::kColumns>(column, aligned)];
    y *= Lift<T>::kScale;
    y *= a.beta;
    if (a.x.data) y += a.alpha * load_as(a.x.dtype, a.x.data, (first_vector + v) * a.x.stride + first_column + column);
    store_as(a.out.dtype, y, a.out.data, (first_vector + v) * a.out.stride + first_column + column);
  }
}

}  // namespace

cudaError_t window_combine(const DeviceRows& window, const double* coefficients, int64_t block_size, double beta, const DeviceRows* x,
                           double alpha, const DeviceRows& out, cudaStream_t stream) {
  if (out.rows == 0 || out.dim == 0) return cudaSuccess;
  const int64_t blocks = block_count(window.dim, block_size);
  return for_type(window.dtype, [&](auto element) {
    using T = decltype(element);
    const auto launch_combine = [&]<int kVectors>() {
      const int64_t tiles = divide_up(std::min(block_size, window.dim), WindowTile<T, kVectors>::kStep);
      const CombineArguments arguments = {window, x ? *x : DeviceRows{}, out, coefficients, block_size, tiles, beta, alpha};
      return launch(combine_kernel<T, kVectors>, dim3(static_cast<unsigned>(divide_up(out.rows, kVectors) * blocks * tiles)),
                    dim3(kThreads), 0, stream, arguments);
    };
    return vectors_together(out.rows) == 1 ? launch_combine.template operator()<1>() : launch_combine.template operator()<kManyVectors>();
  });
}

}  // namespace mfac_kernels
