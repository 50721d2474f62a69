// Blocks small enough to live in registers: n <= 128. X = (A + damping I)^-1, or its factor L.
//
// The lower triangle of A is cut into tiles of 8 x 8, one for each thread of a team. Steps of four rows K eliminate A from the bordered
// matrix [A I; I 0], whose Schur complement at the end is -X; what takes over the place of row K is row K of the identity:
//
//   P = D^-1 M[K, :]     M[K, K] = D D^T, and I in its place    a thread each four columns, D in all of them
//   M <- M - P^T P       M[K, :] and M[:, K] counted as zero     a thread each tile
//
// The factor is found on the way, L[:, K] = P^T, by the same steps without the border. Stable because D^-1 stands on both sides (the
// complement is Cholesky's own); exactly symmetric because only one half is computed.
//
// Flops: n^3 (n^3 / 3 for the factor). Bytes: n^2 / 2 elements read, n^2 written. Floor on an H200 (132 SMs, 128 multiply-adds a clock,
// 4.3 TB/s copied) of 4096 blocks of 32, 1024 of 64, 256 of 128 in float32: 7.8 us of memory each, or 5.9 if only the lower triangle is
// counted; 2.3, 4.5 and 9 us of arithmetic.
// Estimate, not measured: a step is 256 multiply-adds, 16 loads of 16 bytes from shared memory and about 100 other instructions in a warp,
// 370 in all, whose chain (a reciprocal root and three dependent operations four times over, two barriers, two trips through shared memory)
// is 400 clocks long and is hidden by other teams. A scheduler runs 3 warps of n = 32 (3 teams in a warp, 8 steps), 3 warps of n = 64 (2
// teams in 3 warps, 16 steps) or 3 of n = 128 (5 warps a team, 32 steps): 9, 18 and 36 thousand clocks, 5, 10 and 20 us. With memory half
// overlapped and 2 us to start: 11, 16 and 27 us.
//
// What makes it fast: a thread has 64 multiply-adds for 4 loads, where one thread a row has 4 for 1; half of the matrix is never computed;
// several teams share a warp or a thread block, so that 30 of 32 lanes work at n = 32; no shared memory but for four rows, and two
// barriers for each four columns; memory is read and written once, in whole sectors of 32 bytes.
#include <algorithm>

#include "cholesky/batches.cuh"
#include "cholesky/tile.cuh"

namespace mfac_kernels {
namespace {

constexpr int kHalf = kTile / 2;  // rows of a step

__host__ __device__ constexpr int tiles_of(int64_t n) { return static_cast<int>((n + kTile - 1) / kTile); }
// Threads of a block with t x t tiles: one for each in the lower triangle, one for each four columns.
__host__ __device__ constexpr int team_size(int t) { return t < 3 ? 2 * t : t * (t + 1) / 2; }

// Where four rows lie in shared memory: the two quads of each row of a tile are neighbours, those of the next tile kPitch quads on,
// so that neighbouring threads meet different banks.
constexpr int kPitch = kTile + 1;
constexpr int quads_of(int threads, int first, int last) {
  int most = 0;
  for (int t = first; t <= last; ++t) most = std::max(most, threads / team_size(t) * 2 * kPitch * t);
  return most;
}
// Blocks of kFirst to kLast tiles in a row, in thread blocks of kThreads.
template <int threads, int first, int last>
struct SizeClass {
  static constexpr int kThreads = threads, kFirst = first, kLast = last;
  static_assert(team_size(last) <= threads);
  static constexpr int kMaxTeams = threads / team_size(first);
  static constexpr int kQuads = quads_of(threads, first, last);  // four rows of each team, twice
};

// What a thread knows of its team
template <class S>
struct Team {
  int tiles, rank, row, column;  // the thread's tile; row >= tiles: it has none
  Shared<Quad<S>> rows, panel;   // M[K, :] and P
};

template <class Size>
__device__ __forceinline__ void team_barrier() {
  if constexpr (Size::kThreads == kWarpSize)
    __syncwarp();
  else
    __syncthreads();
}

__device__ __forceinline__ float reciprocal_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return rsqrt(x); }

// rows <- rows `half` of tile row k of M, the tiles below the diagonal transposed
template <int half, class S>
__device__ __forceinline__ void share_rows(const Tile<S>& a, const Team<S>& team, int k) {
  if (team.row == k) {
#pragma unroll
    for (int w = 0; w < kHalf; ++w)
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        Quad<S> quad;
#pragma unroll
        for (int i = 0; i < 4; ++i) quad.x[i] = a[half * kHalf + w][g * kHalf + i];
        team.rows[team.column * kPitch + 2 * w + g] = quad;
      }
  } else if (team.column == k && team.row < team.tiles) {
#pragma unroll
    for (int w = 0; w < kHalf; ++w)
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        Quad<S> quad;
#pragma unroll
        for (int i = 0; i < 4; ++i) quad.x[i] = a[g * kHalf + i][half * kHalf + w];
        team.rows[team.row * kPitch + 2 * w + g] = quad;
      }
  }
}

// Four columns of P. place: where their first row lies; own: that of the columns K. Returns 0, or 1 + the row of the first pivot that is
// not positive.
template <CholeskyResult kResult, class S>
__device__ __forceinline__ int solve_columns(const Team<S>& team, int place, int own, bool finished) {
  Quad<S> d[kHalf];  // the upper triangle of D D^T, then that of D^T with reciprocals on its diagonal
#pragma unroll
  for (int w = 0; w < kHalf; ++w) d[w] = team.rows[own + 2 * w];
  int bad = 0;
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
    if (!(d[w].x[w] > 0) && bad == 0) bad = w + 1;
    d[w].x[w] = reciprocal_root(d[w].x[w]);
#pragma unroll
    for (int i = w + 1; i < kHalf; ++i) d[w].x[i] *= d[w].x[w];
#pragma unroll
    for (int v = w + 1; v < kHalf; ++v)
#pragma unroll
      for (int i = v; i < kHalf; ++i) d[v].x[i] -= d[w].x[v] * d[w].x[i];
  }
  Quad<S> x[kHalf];
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
    x[w] = team.rows[place + 2 * w];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (kResult == CholeskyResult::inverse && place == own) x[w].x[i] = i == w ? S(1) : S(0);
      if (finished) x[w].x[i] = 0;
    }
  }
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[w].x[i] *= d[w].x[w];
#pragma unroll
      for (int v = w + 1; v < kHalf; ++v) x[v].x[i] -= d[w].x[v] * x[w].x[i];
    }
    team.panel[place + 2 * w] = x[w];
  }
  return bad;
}

// One step: rows `half` of tile row k.
template <int half, CholeskyResult kResult, class Size, class S>
__device__ __forceinline__ void eliminate(Tile<S>& a, const Team<S>& team, int k, int32_t& info) {
  const int t = team.tiles;
  share_rows<half>(a, team, k);
  team_barrier<Size>();
  if (team.rank < 2 * t) {
    const int tile = team.rank % t, right = team.rank / t;
    const bool finished = kResult == CholeskyResult::factor && (tile < k || (tile == k && right < half));
    const int bad = solve_columns<kResult>(team, tile * kPitch + right, k * kPitch + half, finished);
    if (team.rank == 0 && bad != 0 && info == 0) info = k * kTile + half * kHalf + bad;
  }
  team_barrier<Size>();
  if (team.row >= t) return;
  if constexpr (kResult == CholeskyResult::inverse) {
    if (team.row == k) {
#pragma unroll
      for (int w = 0; w < kHalf; ++w)
#pragma unroll
        for (int c = 0; c < kTile; ++c) a[half * kHalf + w][c] = 0;
    }
    if (team.column == k) {
#pragma unroll
      for (int r = 0; r < kTile; ++r)
#pragma unroll
        for (int w = 0; w < kHalf; ++w) a[r][half * kHalf + w] = 0;
    }
  } else if (team.column < k) {
    return;
  }
#pragma unroll
  for (int w = 0; w < kHalf; ++w) {
    const Quad<S> left[2] = {team.panel[team.row * kPitch + 2 * w], team.panel[team.row * kPitch + 2 * w + 1]};
    const Quad<S> right[2] = {team.panel[team.column * kPitch + 2 * w], team.panel[team.column * kPitch + 2 * w + 1]};
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      const S factor = left[r / 4].x[r % 4];
#pragma unroll
      for (int c = 0; c < kTile; ++c) a[r][c] -= factor * right[c / 4].x[c % 4];
      if (kResult == CholeskyResult::factor && team.column == k) a[r][half * kHalf + w] = factor;
    }
  }
}

// The tile of A + damping I, identity past n; on the diagonal both triangles, from the lower one. Returns whether it is finite.
template <class S>
__device__ __forceinline__ bool load_damped(const DeviceBlocks& batch, int64_t b, const Team<S>& team, Tile<S>& a) {
  const int first_row = team.row * kTile, first_column = team.column * kTile;
  const int64_t offset = b * batch.in_strides.batch + first_row * batch.in_strides.row + first_column * batch.in_strides.column;
  for_type_up_to<S>(batch.in_dtype, [&](auto element) {
    using T = decltype(element);
    load_tile(static_cast<const T*>(batch.in) + offset, batch.in_strides.row, batch.in_strides.column, batch.n - first_row,
              batch.n - first_column, a);
  });
  if (team.row == team.column) {
    const S damping = static_cast<S>(batch.damping[b * batch.damping_stride]);
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      a[r][r] = first_row + r < batch.n ? a[r][r] + damping : S(1);
#pragma unroll
      for (int c = r + 1; c < kTile; ++c) a[r][c] = a[c][r];
    }
  }
  S zeros[kTile] = {};
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int c = 0; c < kTile; ++c) zeros[c] += a[r][c] * 0;
  S zero = 0;
#pragma unroll
  for (int c = 0; c < kTile; ++c) zero += zeros[c];
  return zero == 0;
}

template <CholeskyResult kResult, class S>
__device__ __forceinline__ void store_result(const DeviceBlocks& batch, int64_t b, const Team<S>& team, bool failed, Tile<S>& a) {
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      if (kResult == CholeskyResult::inverse) a[r][c] = -a[r][c];
      if (kResult == CholeskyResult::factor && team.row == team.column && c > r) a[r][c] = 0;
      if (failed) a[r][c] = static_cast<S>(NAN);
    }
  const BlockStrides& strides = batch.out_strides;
  S* const out = static_cast<S*>(batch.out) + b * strides.batch;
  const int row = team.row * kTile, column = team.column * kTile;
  store_tile<false>(a, out + row * strides.row + column * strides.column, strides.row, strides.column, batch.n - row, batch.n - column);
  if (row == column) return;
  if (kResult == CholeskyResult::factor && !failed) {
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) a[r][c] = 0;
  }
  store_tile<true>(a, out + column * strides.row + row * strides.column, strides.row, strides.column, batch.n - column, batch.n - row);
}

template <CholeskyResult kResult, class S, class Size>
__global__ void __launch_bounds__(Size::kThreads) register_kernel(const BatchList<DeviceBlocks> list) {
  MFAC_SHARED(Quad<S>, quads, Size::kQuads);
  MFAC_SHARED(int32_t, infos, Size::kMaxTeams);
  const int index = batch_of_block(list);
  const DeviceBlocks& batch = list.batches[index];
  const int t = tiles_of(batch.n), size = team_size(t), teams = Size::kThreads / size;
  const int number = static_cast<int>(threadIdx.x) / size, rank = static_cast<int>(threadIdx.x) % size;
  const int64_t b = (blockIdx.x - list.first[index]) * teams + number;
  if (number >= teams || b >= batch.count) return;
  int32_t* const info_out = batch.info + b * batch.index_stride;
  const bool skipped = batch.only != nullptr && batch.only[b * batch.index_stride] == 0;
  if (skipped) {
    if (rank == 0) *info_out = 0;
    return;
  }

  const int row = (static_cast<int>(sqrtf(static_cast<float>(8 * rank + 1))) - 1) / 2;  // row (row + 1) / 2 <= rank
  const Shared<Quad<S>> first = quads + number * 2 * kPitch * t;
  const Team<S> team = {t, rank, row, rank - row * (row + 1) / 2, first, first + kPitch * t};
  int32_t& info = infos[number];
  Tile<S> a = {};
  bool finite = true;
  if (team.row < t) finite = load_damped(batch, b, team, a);
  if (rank == 0) info = 0;
  team_barrier<Size>();
  if (!finite) info = -1;
#pragma unroll 1
  for (int k = 0; k < t; ++k) {
    eliminate<0, kResult, Size>(a, team, k, info);
    if (k * kTile + kHalf < batch.n) eliminate<1, kResult, Size>(a, team, k, info);
  }
  if (team.row < t) store_result<kResult>(batch, b, team, info != 0, a);
  if (rank == 0) *info_out = info;
}

template <class Size>
bool is_in(const DeviceBlocks& batch) {
  return tiles_of(batch.n) >= Size::kFirst && tiles_of(batch.n) <= Size::kLast;
}

template <CholeskyResult kResult, class S, class Size>
cudaError_t launch_class(const DeviceBlocks* batches, int64_t count, cudaStream_t stream) {
  const auto blocks_of = [](const DeviceBlocks& batch) -> int64_t {
    if (!is_in<Size>(batch)) return 0;
    const int teams = Size::kThreads / team_size(tiles_of(batch.n));
    return (batch.count + teams - 1) / teams;
  };
  return for_each_list(batches, count, blocks_of, [&](const BatchList<DeviceBlocks>& list, dim3 grid) {
    return launch(register_kernel<kResult, S, Size>, grid, dim3(Size::kThreads), 0, stream, list);
  });
}

template <CholeskyResult kResult, class S, class... Sizes>
cudaError_t launch_classes(const DeviceBlocks* batches, int64_t count, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  static_cast<void>(((error = launch_class<kResult, S, Sizes>(batches, count, stream), error == cudaSuccess) && ...));
  return error;
}

// One warp; two teams of 36 in three; one of 136 in five.
using Warp = SizeClass<32, 1, 7>;
using Upto64 = SizeClass<96, 8, 8>;
using Upto128 = SizeClass<160, 9, 16>;

template <CholeskyResult kResult>
cudaError_t launch_result(DType dtype, const DeviceBlocks* batches, int64_t count, cudaStream_t stream) {
  // The largest first: they take longest.
  if (dtype == DType::f64) return launch_classes<kResult, double, Upto128, Upto64, Warp>(batches, count, stream);
  return launch_classes<kResult, float, Upto128, Upto64, Warp>(batches, count, stream);
}

}  // namespace

int64_t cholesky_work(DType, const DeviceBlocks*, int64_t) { return 0; }

cudaError_t cholesky_blocks(CholeskyResult result, DType dtype, const DeviceBlocks* batches, int64_t count, void*, cudaStream_t stream) {
  return result == CholeskyResult::inverse ? launch_result<CholeskyResult::inverse>(dtype, batches, count, stream)
                                           : launch_result<CholeskyResult::factor>(dtype, batches, count, stream);
}

}  // namespace mfac_kernels
