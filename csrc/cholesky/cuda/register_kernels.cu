// Blocks small enough to live in registers, n <= 128. X = (A + damping I)^-1, or the factor L of A + damping I = L L^T, or L^-1.
//
// The lower triangle of A is cut into tiles of 8 x 8, one for each thread of a team. Steps of four rows K eliminate A from the bordered
// matrix M = [A I; I 0], whose Schur complement at the end is -X; what takes the place of row K is row K of the identity:
//
//   P = D^-1 M[K, :]     M[K, K] = D D^T, and I in its place     a thread each four columns, D in all of them
//   M <- M - P^T P       M[K, :] and M[:, K] counted as zero     a thread each tile
//
// The factor is found on the way, L[:, K] = P^T, by the same steps without the border. So is its inverse: what P has left of the diagonal
// are the rows K of L^-1, which stay, and only rows below K are updated. Where A is a triangle, D is its own block on the diagonal and
// what lies right of K is L^T as it is. Stable because D^-1 stands on both sides: the
// complement is Cholesky's own. Exactly symmetric because only one half is computed.
//
// Flops: n^3 (n^3 / 3 for the factor). Bytes: n^2 / 2 elements read, n^2 written. Floor of 4096 blocks of 32, 1024 of 64 or 256 of 128 in
// float32 on an H200 (132 SMs, 128 multiply-adds a clock, 4.3 TB/s copied): 5.9 us of memory each (7.8 if the upper triangle were read,
// too); 2.3, 4.5 and 9 us of arithmetic.
// Estimate, not measured: of a step's 480 instructions 256 are multiply-adds, 16 load P, 110 factor D and solve four columns (in those
// warps that have columns) and 80 hand rows over and clear them (in those that hold them). Its chain, four reciprocal roots, two barriers
// and two trips through shared memory, is 400 clocks long and passes while other warps work. The busiest scheduler of an SM has 3 warps:
// of 3 teams each for n = 32 (8 steps), 2 teams in 3 warps for n = 64 (16 steps), one in 5 for n = 128 (32 steps). At 480, 450 and 350
// instructions a step that is 12, 22 and 34 thousand clocks, 7, 12 and 19 us; with 2 us to start and 4 us of memory that nothing hides:
// 13, 18 and 25 us. float64: twice the clocks, and one thread block of n = 128 on an SM where float32 has two.
//
// What makes it fast: a thread has 64 multiply-adds for 4 loads of 16 bytes, where one row a thread has 4 for 1; half of the matrix is
// never computed; teams share a warp or a thread block, so that 30 of 32 lanes work at n = 32; shared memory holds four rows, so that it
// limits nothing; two barriers for four columns; memory is met once each way, in whole sectors of 32 bytes.
//
// The limit is the register file: n = 256 would take 528 threads, whose share is 96 registers, 20 too few.
#include <algorithm>

#include "cholesky/cuda/batches.cuh"
#include "cholesky/cuda/registers.h"
#include "cholesky/cuda/sweep.cuh"

namespace mfac_kernels {
namespace {

__host__ __device__ constexpr int tiles_of(int64_t n) { return static_cast<int>((n + kTile - 1) / kTile); }
// Threads of a block with t x t tiles: one for each in the lower triangle, one for each four columns.
__host__ __device__ constexpr int team_size(int t) { return t < 3 ? 2 * t : t * (t + 1) / 2; }

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

template <CholeskyResult kResult, class S, class Size>
__global__ void __launch_bounds__(Size::kThreads) register_kernel(const BatchList<DeviceBlocks> list) {
  MFAC_SHARED(Quad<S>, quads, Size::kQuads);
  MFAC_SHARED(int32_t, infos, Size::kMaxTeams);
  constexpr bool kOneWarp = Size::kThreads == kWarpSize;
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

  const int row = row_of_triangle(rank);
  const Shared<Quad<S>> first = quads + number * 2 * kPitch * t;
  const Team<S> team = {t, rank, row, rank - row * (row + 1) / 2, first, first + kPitch * t};
  int32_t& info = infos[number];
  Tile<S> a = {};
  bool finite = true;
  if (team.row < t) finite = load_damped(batch, b, row * kTile, team.column * kTile, a);
  if (rank == 0) info = 0;
  team_barrier<kOneWarp>();
  if (!finite) info = -1;
#pragma unroll 1
  for (int k = 0; k < t; ++k) {
    eliminate<0, kResult, kOneWarp>(a, team, k, info);
    if (k * kTile + kHalf < batch.n) eliminate<1, kResult, kOneWarp>(a, team, k, info);
  }
  if (team.row < t) store_result<kResult>(batch, b, row * kTile, team.column * kTile, info != 0, a);
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

cudaError_t cholesky_in_registers(CholeskyResult result, DType dtype, const DeviceBlocks* batches, int64_t count, cudaStream_t stream) {
  return for_result(result, [&]<CholeskyResult kResult>() { return launch_result<kResult>(dtype, batches, count, stream); });
}

}  // namespace mfac_kernels
