// Blocks too large for the registers of one thread block: the elimination of register_kernels.cu, 64 rows K at a time, with M in the
// lower triangle of out.
//
//   prepare   M = A + damping I, in out's type; finite or not
//   panel     M[K, K] = D D^T in registers, P = D^-1 M[K, :], with I in place of the columns K      a thread a column
//   update    M <- M - P^T P, M[K, :] and M[:, K] counted as zero; of a factor L[:, K] = P^T         a thread a tile of 8 x 8
//             of a factor's inverse rows below K alone, and M[K, :] = P
//   finish    -M, or the triangle, and its mirror image
//
// Flops: n^3 (n^3 / 3 for the factor), all but 64 n^2 of them in update, which reads and writes n^2 / 2 elements a step: 8 multiply-adds a
// byte in float32, where an H200 does 7 from memory, and L2 holds the half of M that is used up to n = 4096 or so. Floor there: 1.2 ms of
// arithmetic. Estimate, not measured: update runs at half of that rate, panel takes 15 us of latency, 64 steps of 2 launches: 3 to 4 ms;
// n = 256 to 512: 100 to 200 us for a batch that fills the device no more than once, of which most is latency.
//
// One launch a step serves all batches. Nothing is left to a library: cuSOLVER's factorisation and inversion of a batch go block by block,
// torch's check of the inverse synchronises with the host, and torch's products follow the process's choice of TF32.
#include <algorithm>
#include <vector>

#include "cholesky/cuda/batches.cuh"
#include "cholesky/cuda/registers.h"
#include "cholesky/cuda/sweep.cuh"

namespace mfac_kernels {
namespace {

constexpr int kBlock = 64;              // rows of a step
constexpr int kTiles = kBlock / kTile;  // tiles in a row of a square of kBlock
constexpr int kQuads = kBlock / 4;      // quads in such a row
constexpr int kSquareThreads = kTiles * kTiles;
constexpr int kColumns = 128;  // columns of a thread block of panel, one a thread

struct LargeBlocks {
  DeviceBlocks blocks;
  void* panels;  // (count, kBlock, pitch)
};
static_assert(sizeof(BatchList<LargeBlocks>) + 2 * sizeof(int) <= 4096);

__host__ __device__ constexpr int squares_of(int n) { return (n + kBlock - 1) / kBlock; }
__host__ __device__ constexpr int pitch_of(int n) { return squares_of(n) * kBlock; }
__host__ __device__ constexpr int chunks_of(int n) { return (pitch_of(n) + kColumns - 1) / kColumns; }

__device__ __forceinline__ bool is_chosen(const DeviceBlocks& batch, int64_t b) {
  return batch.only == nullptr || batch.only[b * batch.index_stride] != 0;
}
template <class S>
__device__ __forceinline__ S* result_of(const DeviceBlocks& batch, int64_t b) {
  return static_cast<S*>(batch.out) + b * batch.out_strides.batch;
}

// A thread's tile in one of the lower squares of a batch
struct Place {
  int64_t b;
  int square_row, square_column, row, column;  // row, column: of the tile's first element
  bool lower;

  __device__ Place(int n, int64_t thread_block) {
    const int count = squares_of(n), each = count * (count + 1) / 2;
    b = thread_block / each;
    const int index = static_cast<int>(thread_block % each);
    square_row = row_of_triangle(index);
    square_column = index - square_row * (square_row + 1) / 2;
    row = square_row * kBlock + static_cast<int>(threadIdx.x) / kTiles * kTile;
    column = square_column * kBlock + static_cast<int>(threadIdx.x) % kTiles * kTile;
    lower = row >= column;
  }
};

__global__ void __launch_bounds__(kSquareThreads) clear_kernel(const BatchList<LargeBlocks> list) {
  const int index = batch_of_block(list);
  const DeviceBlocks& batch = list.batches[index].blocks;
  const int64_t b = (blockIdx.x - list.first[index]) * kSquareThreads + threadIdx.x;
  if (b < batch.count) batch.info[b * batch.index_stride] = 0;
}

template <class S>
__global__ void __launch_bounds__(kSquareThreads) prepare_kernel(const BatchList<LargeBlocks> list) {
  const int index = batch_of_block(list);
  const DeviceBlocks& batch = list.batches[index].blocks;
  const Place place(batch.n, blockIdx.x - list.first[index]);
  if (!place.lower || !is_chosen(batch, place.b)) return;
  Tile<S> a;
  if (!load_damped(batch, place.b, place.row, place.column, a)) batch.info[place.b * batch.index_stride] = -1;
  const BlockStrides& strides = batch.out_strides;
  store_tile<false>(a, result_of<S>(batch, place.b) + place.row * strides.row + place.column * strides.column, strides.row, strides.column,
                    batch.n - place.row, batch.n - place.column);
}

// transposed (kBlock, kQuads) <- D^T, reciprocals on its diagonal. The diagonal block of M is factored as in register_kernels.cu, or is D.
template <CholeskyResult kResult, class S>
__device__ __forceinline__ void factor_diagonal(const S* m, const BlockStrides& strides, int rows, Shared<Quad<S>> scratch,
                                                Shared<Quad<S>> transposed, int32_t& info) {
  const int rank = static_cast<int>(threadIdx.x), row = row_of_triangle(rank), column = rank - row * (row + 1) / 2;
  const Team<S> team = {kTiles, rank, row, column, scratch, scratch + kPitch * kTiles};
  Tile<S> a = {};
  if (row < kTiles) {
    load_tile(m + row * kTile * strides.row + column * kTile * strides.column, strides.row, strides.column, rows - row * kTile,
              rows - column * kTile, a);
    if (row == column) {
#pragma unroll
      for (int r = 0; r < kTile; ++r) {
        if (row * kTile + r >= rows) a[r][r] = 1;
#pragma unroll
        for (int c = r + 1; c < kTile; ++c) a[r][c] = a[c][r];
      }
    }
  }
  if (rank == 0) info = 0;
  if constexpr (kResult == CholeskyResult::triangular_inverse) {
    if (rank == 0)
      for (int r = 0; r < rows && info == 0; ++r)
        if (m[r * (strides.row + strides.column)] == 0) info = r + 1;
  } else {
#pragma unroll 1
    for (int k = 0; k < kTiles; ++k) {
      eliminate<0, CholeskyResult::factor, false>(a, team, k, info);
      eliminate<1, CholeskyResult::factor, false>(a, team, k, info);
    }
  }
  if (row < kTiles) {
#pragma unroll
    for (int c = 0; c < kTile; ++c)
#pragma unroll
      for (int g = 0; g < 2; ++g)
        transposed[(column * kTile + c) * kQuads + row * 2 + g] = quad_of<S>([&](int i) {
          const int r = 4 * g + i;
          return row == column && r == c ? 1 / a[r][c] : row == column && r < c ? S(0) : a[r][c];
        });
  }
  __syncthreads();
}

template <CholeskyResult kResult, class S>
__global__ void __launch_bounds__(kColumns) panel_kernel(const BatchList<LargeBlocks> list, int step) {
  MFAC_DYNAMIC_SHARED(Quad<S>, shared);
  MFAC_SHARED(int32_t, infos, 1);
  const int index = batch_of_block(list);
  const DeviceBlocks& batch = list.batches[index].blocks;
  const int chunks = chunks_of(batch.n), pitch = pitch_of(batch.n), first = step * kBlock;
  const int64_t b = (blockIdx.x - list.first[index]) / chunks;
  const int chunk = static_cast<int>((blockIdx.x - list.first[index]) % chunks);
  if (!is_chosen(batch, b)) return;
  const BlockStrides& strides = batch.out_strides;
  const S* const m = result_of<S>(batch, b);
  const Shared<Quad<S>> transposed = shared, solved = shared + kBlock * kQuads;
  const int rows = min(kBlock, batch.n - first);
  factor_diagonal<kResult>(m + first * (strides.row + strides.column), strides, rows, solved, transposed, infos[0]);
  if (threadIdx.x == 0 && chunk == 0) {
    int32_t& info = batch.info[b * batch.index_stride];
    if (infos[0] != 0 && info == 0) info = first + infos[0];
  }
  __syncthreads();  // `solved` was scratch until here

  const int column = chunk * kColumns + static_cast<int>(threadIdx.x);
  if (column >= pitch || (kResult == CholeskyResult::factor && column < first)) return;
  const bool own = column >= first && column < first + kBlock;
  const bool solve = kResult != CholeskyResult::triangular_inverse || column < first + kBlock;
  const S* const from =
      column < first ? m + first * strides.row + column * strides.column : m + column * strides.row + first * strides.column;
  const int64_t stride = column < first ? strides.row : strides.column;
  S* const to = static_cast<S*>(list.batches[index].panels) + b * kBlock * pitch + column;
  const auto entry = [&](Shared<Quad<S>> quads, int place) -> S& { return quads[place / 4].x[place % 4]; };
  const int lane = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int k = 0; k < kBlock; k += kTile) {
    S x[kTile];
#pragma unroll
    for (int r = 0; r < kTile; ++r)
      x[r] = own ? S(k + r == column - first) : k + r < rows && column < batch.n ? from[(k + r) * stride] : S(0);
#pragma unroll 1
    for (int j = 0; j < (solve ? k : 0); ++j) {
      const S y = entry(solved, j * kColumns + lane);
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const Quad<S> d = transposed[j * kQuads + k / 4 + g];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[4 * g + i] -= d.x[i] * y;
      }
    }
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      if (!solve) break;
      const Quad<S> d[2] = {transposed[(k + j) * kQuads + k / 4], transposed[(k + j) * kQuads + k / 4 + 1]};
      x[j] *= d[j / 4].x[j % 4];
#pragma unroll
      for (int r = j + 1; r < kTile; ++r) x[r] -= d[r / 4].x[r % 4] * x[j];
    }
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      entry(solved, (k + r) * kColumns + lane) = x[r];
      S result = x[r];
      // Of the factor the columns K are D^T itself.
      if (kResult == CholeskyResult::factor && own) {
        const S d = entry(transposed, (k + r) * kBlock + column - first);
        result = column - first == k + r ? 1 / d : d;
      }
      to[int64_t(k + r) * pitch] = result;
    }
  }
}

// left, right (kBlock, kQuads) <- the columns of P that meet in a square, those of the left halves of tiles first
template <class S>
__device__ __forceinline__ void load_square(const S* panel, int pitch, int square, Shared<Quad<S>> to) {
  for (int i = threadIdx.x; i < kBlock * kQuads; i += kSquareThreads) {
    const int w = i / kQuads, q = i % kQuads;
    to[w * kQuads + q % 2 * kTiles + q / 2] = *reinterpret_cast<const Quad<S>*>(panel + int64_t(w) * pitch + square * kBlock + 4 * q);
  }
}

template <CholeskyResult kResult, class S>
__global__ void __launch_bounds__(kSquareThreads) update_kernel(const BatchList<LargeBlocks> list, int step) {
  MFAC_DYNAMIC_SHARED(Quad<S>, left);
  const int index = batch_of_block(list);
  const DeviceBlocks& batch = list.batches[index].blocks;
  const Place place(batch.n, blockIdx.x - list.first[index]);
  if (!is_chosen(batch, place.b) || (kResult == CholeskyResult::factor && place.square_column < step)) return;
  if (kIsFactorInverse<kResult> && place.square_row < step) return;
  if (kResult == CholeskyResult::triangular_inverse && place.square_column > step) return;
  const int pitch = pitch_of(batch.n);
  const S* const panel = static_cast<const S*>(list.batches[index].panels) + place.b * kBlock * pitch;
  const Shared<Quad<S>> right = left + kBlock * kQuads;
  load_square(panel, pitch, place.square_row, left);
  if (kResult != CholeskyResult::factor || place.square_column != step) load_square(panel, pitch, place.square_column, right);
  __syncthreads();
  if (!place.lower) return;

  const BlockStrides& strides = batch.out_strides;
  S* const m = result_of<S>(batch, place.b) + place.row * strides.row + place.column * strides.column;
  const int rows = batch.n - place.row, columns = batch.n - place.column;
  const int ty = static_cast<int>(threadIdx.x) / kTiles, tx = static_cast<int>(threadIdx.x) % kTiles;
  Tile<S> a = {};
  if (kResult == CholeskyResult::factor && place.square_column == step) {
#pragma unroll
    for (int c = 0; c < kTile; ++c)
#pragma unroll
      for (int r = 0; r < kTile; ++r) a[r][c] = left[(tx * kTile + c) * kQuads + r / 4 * kTiles + ty].x[r % 4];
  } else if (kIsFactorInverse<kResult> && place.square_row == step) {
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) a[r][c] = right[(ty * kTile + r) * kQuads + c / 4 * kTiles + tx].x[c % 4];
  } else {
    if (place.square_row != step && place.square_column != step) load_tile(m, strides.row, strides.column, rows, columns, a);
#pragma unroll 2
    for (int w = 0; w < kBlock; ++w) {
      const Quad<S> l[2] = {left[w * kQuads + ty], left[w * kQuads + kTiles + ty]};
      const Quad<S> r[2] = {right[w * kQuads + tx], right[w * kQuads + kTiles + tx]};
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int c = 0; c < kTile; ++c) a[i][c] -= l[i / 4].x[i % 4] * r[c / 4].x[c % 4];
    }
  }
  store_tile<false>(a, m, strides.row, strides.column, rows, columns);
}

template <CholeskyResult kResult, class S>
__global__ void __launch_bounds__(kSquareThreads) finish_kernel(const BatchList<LargeBlocks> list) {
  const int index = batch_of_block(list);
  const DeviceBlocks& batch = list.batches[index].blocks;
  const Place place(batch.n, blockIdx.x - list.first[index]);
  if (!place.lower || !is_chosen(batch, place.b)) return;
  const BlockStrides& strides = batch.out_strides;
  Tile<S> a;
  load_tile(result_of<S>(batch, place.b) + place.row * strides.row + place.column * strides.column, strides.row, strides.column,
            batch.n - place.row, batch.n - place.column, a);
  if (kResult == CholeskyResult::inverse && place.row == place.column) {
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = r + 1; c < kTile; ++c) a[r][c] = a[c][r];
  }
  store_result<kResult>(batch, place.b, place.row, place.column, batch.info[place.b * batch.index_stride] != 0, a);
}

bool is_large(const DeviceBlocks& batch) { return batch.n > kLargestInRegisters; }
int64_t panel_size(const DeviceBlocks& batch) { return is_large(batch) ? batch.count * kBlock * pitch_of(batch.n) : 0; }

template <CholeskyResult kResult, class S>
cudaError_t launch_large(const DeviceBlocks* batches, int64_t count, S* panels, cudaStream_t stream) {
  std::vector<LargeBlocks> large;
  int steps = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!is_large(batches[i])) continue;
    large.push_back({batches[i], panels});
    panels += panel_size(batches[i]);
    steps = std::max(steps, squares_of(batches[i].n));
  }
  const auto for_each = [&](const auto& blocks_of, const auto& start) {
    return for_each_list(large.data(), static_cast<int64_t>(large.size()), blocks_of, start);
  };
  const auto squares = [](const LargeBlocks& batch) {
    const int64_t side = squares_of(batch.blocks.n);
    return batch.blocks.count * side * (side + 1) / 2;
  };
  const dim3 square_threads(kSquareThreads);
  constexpr size_t kSquareBytes = kBlock * kQuads * sizeof(Quad<S>), kPanelBytes = kSquareBytes + kBlock * kColumns * sizeof(S);

  cudaError_t error = for_each([](const LargeBlocks& batch) { return (batch.blocks.count + kSquareThreads - 1) / kSquareThreads; },
                               [&](const auto& list, dim3 grid) { return launch(clear_kernel, grid, square_threads, 0, stream, list); });
  if (error != cudaSuccess) return error;
  error = for_each(squares, [&](const auto& list, dim3 grid) { return launch(prepare_kernel<S>, grid, square_threads, 0, stream, list); });
  for (int step = 0; step < steps && error == cudaSuccess; ++step) {
    const auto if_left = [&](const LargeBlocks& batch, int64_t blocks) { return step < squares_of(batch.blocks.n) ? blocks : 0; };
    error = for_each([&](const LargeBlocks& batch) { return if_left(batch, batch.blocks.count * chunks_of(batch.blocks.n)); },
                     [&](const auto& list, dim3 grid) {
                       return launch(panel_kernel<kResult, S>, grid, dim3(kColumns), kPanelBytes, stream, list, step);
                     });
    if (error != cudaSuccess) return error;
    error = for_each([&](const LargeBlocks& batch) { return if_left(batch, squares(batch)); },
                     [&](const auto& list, dim3 grid) {
                       return launch(update_kernel<kResult, S>, grid, square_threads, 2 * kSquareBytes, stream, list, step);
                     });
  }
  if (error != cudaSuccess) return error;
  return for_each(squares,
                  [&](const auto& list, dim3 grid) { return launch(finish_kernel<kResult, S>, grid, square_threads, 0, stream, list); });
}

}  // namespace

int64_t cholesky_work(DType dtype, const DeviceBlocks* batches, int64_t batch_count) {
  int64_t size = 0;
  for (int64_t i = 0; i < batch_count; ++i) size += panel_size(batches[i]);
  return size * (dtype == DType::f64 ? sizeof(double) : sizeof(float));
}

cudaError_t cholesky_blocks(CholeskyResult result, DType dtype, const DeviceBlocks* batches, int64_t batch_count, void* work,
                            cudaStream_t stream) {
  const auto for_type = [&]<class S>(S* panels) {
    return for_result(result, [&]<CholeskyResult kResult>() { return launch_large<kResult>(batches, batch_count, panels, stream); });
  };
  const cudaError_t error = dtype == DType::f64 ? for_type(static_cast<double*>(work)) : for_type(static_cast<float*>(work));
  return error != cudaSuccess ? error : cholesky_in_registers(result, dtype, batches, batch_count, stream);
}

}  // namespace mfac_kernels
