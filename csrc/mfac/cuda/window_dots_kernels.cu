// Pass 1 over a window of gradients G (m, d) on the device, k vectors at a time; an insert writes its row on the way.
//
//   D[v, i] = sum_j G[i, j] X[v, j]     (k, m)
//
// Floor: m d sizeof(T) bytes of G read once; X and the partial sums are 1/m and less of it. On an H200 (4.3 TB/s copied, 132
// SMs) m = 1024, d = 25.6 M takes 24 ms a pass in float32, 12 ms in 16 bits. Arithmetic is float64: k multiply-adds an element, and 5
// operations on its bits in place of a conversion (Lift). An SM receives 19 bytes a clock, 5 float32 or 10 16-bit elements, and does 64 of
// either: memory is the bound for k <= 4. Beyond that the vectors are taken by fours, whose blocks run side by side and find G in L2: bound
// by float64 from k = 8 or so. Expected: 85-90 % of the copy bandwidth for k <= 4. GPUs with 2 float64 operations a clock (compute
// capability 8.6, 8.9, 12.0) are bound by these, at a few per cent of their bandwidth.
//
// What makes it fast: 16-byte loads, one per row for 4 rows (2 blocks x 256 threads x 4 x 16 bytes = 32 KB in flight on an SM, where
// NVIDIA's own kernels aim at 48 on an H200: tools/cuda_devices.py), on their way while the step before is added: registers for a second
// step there are none. Rows belong to warps, so nothing waits at a barrier while G streams; X's columns stay in shared memory in float64,
// converted once for all rows, and each chunk of 4096 columns ends in one shuffle reduction of 4 sums at once. No atomics: partial sums
// lie in a workspace and are added in order.
#include <algorithm>

#include "common/sizes.h"
#include "mfac/cuda/seen.cuh"
#include "mfac/cuda/window_kernels.h"
#include "mfac/cuda/window_steps.cuh"

namespace mfac_kernels {
namespace {

constexpr int64_t kManyBlocks = 528;  // four for each SM of an H200

struct DotsArguments {
  DeviceRows window, x;
  int64_t block_size, segments, chunks;  // segments and chunks of one block of columns
  const int64_t* state;                  // of an insert
  const double* squares;                 // of an insert: the partial sums of |g|^2
  double* partial;                       // (blocks, vectors, rows, segments)
};

// sum += kRows rows times kVectors vectors over `width` columns
template <class T, int kVectors, bool kAligned, int kColumns>
__device__ __forceinline__ void dot_rows(const T* const (&rows)[WindowTile<T, kVectors>::kRows], int width, Shared<double> x,
                                         double (&sum)[WindowTile<T, kVectors>::kRows * kVectors]) {
  using Tile = WindowTile<T, kVectors>;
  constexpr int kStep = kWarpSize * kColumns;
  const int lane = lane_of_thread();
  Lift<T> lift[Tile::kRows];
  using Step = Packs<T, Tile::kRows, kColumns>;
  const auto load_whole = [&](int step) {
    Step g;
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) g.rows[r] = load_step<kAligned, kColumns>(rows[r] + step);
    return g;
  };
  const auto add = [&](int step, const Step& g) {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      double xv[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) xv[v] = x[v * Tile::kChunk + step + c * kWarpSize + lane];
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) {
        const double value = lift[r](g.rows[r].values[c]);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) sum[r * kVectors + v] += value * xv[v];
      }
    }
  };
  int step = 0;
  if constexpr (Tile::kAhead && kAligned) {
    if (kStep <= width) {
      Step g = load_whole(0);
#pragma unroll 1
      for (; step + 2 * kStep <= width; step += kStep) {
        const Step next = load_whole(step + kStep);
        add(step, g);
        g = next;
      }
      add(step, g);
      step += kStep;
    }
  } else {
#pragma unroll 1  // the loads of two steps do not fit the registers
    for (; step + kStep <= width; step += kStep) add(step, load_whole(step));
  }
  if (step < width) {
    Step g;
#pragma unroll
    for (int r = 0; r < Tile::kRows; ++r) g.rows[r] = load_ragged_step<kAligned, kColumns>(rows[r] + step, width - step);
    add(step, g);
  }
#pragma unroll
  for (int r = 0; r < Tile::kRows; ++r)
#pragma unroll
    for (int v = 0; v < kVectors; ++v) sum[r * kVectors + v] += lift[r].nan_unless_finite();
}

// The sum of n numbers, the same in every thread of every block.
__device__ double sum_in_order(const double* values, int64_t n, Shared<double> scratch) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) sum += values[i];
  return block_sum(sum, scratch);
}

// blockIdx.x: vectors, innermost, and segments; blockIdx.y: rows.
template <class T, int kVectors, bool kInsert>
__global__ void __launch_bounds__(kThreads, kBlocks) dots_kernel(const DotsArguments a) {
  using Tile = WindowTile<T, kVectors>;
  MFAC_SHARED(double, x, kStaged);
  MFAC_SHARED(double, scratch, kWarpSize);
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t groups = divide_up(a.x.rows, kVectors);
  const int64_t first_vector = blockIdx.x % groups * kVectors, block = blockIdx.x / groups / a.segments;
  const int64_t segment = blockIdx.x / groups % a.segments;
  const int64_t first_column = block * a.block_size, columns = min(a.block_size, a.window.dim - first_column);

  // An insert meets the rows that are filled, all but its own, whose dot product is the sum of squares.
  int64_t rows = a.window.rows, slot = a.window.rows;
  if constexpr (kInsert) {
    if (!isfinite(sum_in_order(a.squares, a.segments, scratch))) return;  // refused: nothing is written
    const int64_t seen = seen_of(a.state);
    slot = seen % a.window.rows;
    rows = min(seen, a.window.rows - 1);
  }

  T* const g = static_cast<T*>(a.window.data) + first_column;
  const bool aligned = is_aligned<T, Tile::kColumns>(g, a.window.stride);
  const int64_t begin = segment * a.chunks / a.segments, end = (segment + 1) * a.chunks / a.segments;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t start = chunk * Tile::kChunk;
    const int width = static_cast<int>(max(int64_t(0), min(int64_t(Tile::kChunk), columns - start)));  // a ragged last block is narrower
    const int padded = static_cast<int>(divide_up(width, Tile::kStep)) * Tile::kStep;
    __syncthreads();  // until the last chunk has been read
    for (int v = 0; v < kVectors; ++v) {
      const int64_t row = (first_vector + v) * a.x.stride + first_column + start;
      for (int column = threadIdx.x; column < padded; column += kThreads) {
        const bool inside = column < width && first_vector + v < a.x.rows;
        double value = inside ? load_as(a.x.dtype, a.x.data, row + column) : 0;
        if constexpr (kInsert) {
          T rounded;
          narrow(value, rounded);
          value = widen(rounded);
          if (inside && blockIdx.y == 0) g[slot * a.window.stride + start + column] = rounded;
        }
        x[v * Tile::kChunk + position_of<Tile::kColumns>(column, aligned)] = value * Lift<T>::kScale;
      }
    }
    __syncthreads();

    for (int64_t i = (int64_t(blockIdx.y) * kWarps + warp) * Tile::kRows; i < rows; i += int64_t(gridDim.y) * kWarps * Tile::kRows) {
      const auto row_of = [&](int64_t index) { return index + (kInsert && index >= slot); };
      const T* row[Tile::kRows];
      double sum[Tile::kRows * kVectors] = {};
#pragma unroll
      for (int r = 0; r < Tile::kRows; ++r) row[r] = g + row_of(min(i + r, rows - 1)) * a.window.stride + start;  // past the end: the last
      if (aligned)
        dot_rows<T, kVectors, true, Tile::kColumns>(row, width, x, sum);
      else
        dot_rows<T, kVectors, false, 2>(row, width, x, sum);
      const double total = warp_sums(sum) * Lift<T>::kScale;
      const int r = lane / kVectors, v = lane % kVectors;
      if (r < Tile::kRows && i + r < rows && first_vector + v < a.x.rows) {
        const int64_t output = (block * a.x.rows + first_vector + v) * a.window.rows + row_of(i + r);
        double& partial = a.partial[output * a.segments + segment];
        partial = chunk == begin ? total : partial + total;
      }
    }
  }
}

// out[i] = sum of partial[i, :segments], a warp per i
__global__ void __launch_bounds__(kThreads) sum_segments_kernel(const double* partial, int64_t segments, int64_t n, double* out) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + warp_of_thread();
  if (i >= n) return;
  double sum = 0;
  for (int64_t s = lane_of_thread(); s < segments; s += kWarpSize) sum += partial[i * segments + s];
  sum = warp_sum(sum);
  if (lane_of_thread() == 0) out[i] = sum;
}

// ---- insert: sum of squares, dots, sum of segments -----------------------------------------------------------------------------------

// partial[segment] = the sum of squares of g, rounded to T, over a segment: its sum is finite exactly if every dot product with g will be.
template <class T>
__global__ void __launch_bounds__(kThreads) squares_kernel(const DeviceRows g, int64_t chunks, double* partial) {
  MFAC_SHARED(double, scratch, kWarpSize);
  const int64_t begin = blockIdx.x * chunks / gridDim.x * kStaged;
  const int64_t end = min((blockIdx.x + 1) * chunks / gridDim.x * kStaged, g.dim);
  double sum = 0;
  for (int64_t j = begin + threadIdx.x; j < end; j += kThreads) {
    T rounded;
    narrow(load_as(g.dtype, g.data, j), rounded);
    const double value = widen(rounded);
    sum += value * value;
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// dots of all rows: those of the empty ones are zero, a refused gradient's are NaN.
__global__ void __launch_bounds__(kThreads)
    finish_insert_kernel(const double* squares, const double* partial, int64_t segments, const int64_t* state, int64_t rows, double* dots) {
  MFAC_SHARED(double, scratch, kWarpSize);
  const double square = sum_in_order(squares, segments, scratch);
  const int64_t i = int64_t(blockIdx.x) * kWarps + warp_of_thread(), seen = seen_of(state);
  if (i >= rows) return;
  double sum = 0;
  if (i < seen && i != seen % rows)
    for (int64_t s = lane_of_thread(); s < segments; s += kWarpSize) sum += partial[i * segments + s];
  sum = warp_sum(sum);
  if (i == seen % rows) sum = square;
  if (!isfinite(square)) sum = NAN;
  if (lane_of_thread() == 0) dots[i] = sum;
}

// ---- launch -----------------------------------------------------------------------------------------------------------------------

int64_t chunks_of(int64_t dim, int64_t block_size, int64_t vectors) {
  return divide_up(std::min(block_size, dim), kStaged / vectors_together(vectors));
}

template <class T, int kVectors, bool kInsert>
cudaError_t launch_dots(const DotsArguments& a, int64_t blocks, cudaStream_t stream) {
  const int64_t grid = divide_up(a.x.rows, kVectors) * blocks * a.segments;
  const int64_t row_groups = divide_up(a.window.rows, kWarps * WindowTile<T, kVectors>::kRows);
  const int64_t splits = std::clamp<int64_t>(kManyBlocks / grid, 1, std::min<int64_t>(row_groups, 65535));
  return launch(dots_kernel<T, kVectors, kInsert>, dim3(static_cast<unsigned>(grid), static_cast<unsigned>(splits)), dim3(kThreads), 0,
                stream, a);
}

}  // namespace

WindowCut window_cut(int64_t dim, int64_t block_size, int64_t vectors) {
  const int64_t blocks = block_count(dim, block_size);
  if (blocks == 0) return {0, 1};
  return {blocks, std::clamp<int64_t>(kManyBlocks / blocks, 1, chunks_of(dim, block_size, vectors))};
}

cudaError_t window_dots(const DeviceRows& window, const DeviceRows& x, int64_t block_size, double* partial, double* dots,
                        cudaStream_t stream) {
  const WindowCut cut = window_cut(window.dim, block_size, x.rows);
  const int64_t outputs = cut.blocks * x.rows * window.rows;
  if (outputs == 0) return cudaSuccess;
  const DotsArguments arguments = {window,  x,       block_size, cut.segments, chunks_of(window.dim, block_size, x.rows),
                                   nullptr, nullptr, partial};
  const cudaError_t error = for_type(window.dtype, [&](auto element) {
    using T = decltype(element);
    return vectors_together(x.rows) == 1 ? launch_dots<T, 1, false>(arguments, cut.blocks, stream)
                                         : launch_dots<T, kManyVectors, false>(arguments, cut.blocks, stream);
  });
  if (error != cudaSuccess) return error;
  return launch(sum_segments_kernel, dim3(static_cast<unsigned>(divide_up(outputs, kWarps))), dim3(kThreads), 0, stream, partial,
                cut.segments, outputs, dots);
}

cudaError_t window_insert(const DeviceRows& window, const int64_t* state, const DeviceRows& g, double* partial, double* dots,
                          cudaStream_t stream) {
  const WindowCut cut = window_cut(window.dim, window.dim, 1);
  const int64_t chunks = chunks_of(window.dim, window.dim, 1);
  double *squares = partial, *rest = partial + cut.segments;
  const DotsArguments arguments = {window, g, window.dim, cut.segments, chunks, state, squares, rest};
  const cudaError_t error = for_type(window.dtype, [&](auto element) {
    using T = decltype(element);
    const cudaError_t first =
        launch(squares_kernel<T>, dim3(static_cast<unsigned>(cut.segments)), dim3(kThreads), 0, stream, g, chunks, squares);
    return first != cudaSuccess ? first : launch_dots<T, 1, true>(arguments, 1, stream);
  });
  if (error != cudaSuccess) return error;
  return launch(finish_insert_kernel, dim3(static_cast<unsigned>(divide_up(window.rows, kWarps))), dim3(kThreads), 0, stream, squares, rest,
                cut.segments, state, window.rows, dots);
}

}  // namespace mfac_kernels
