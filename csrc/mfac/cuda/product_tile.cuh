// Tiles of matrix products on the device: P[i, j] = sum_k A[i, k] B[j, k] in S (float or double), kRows x kColumns of it to a thread block.
//
// A and B are read kDepth at a time into registers, then widened to S and laid side by side in shared memory as [k][i]; while one stage is
// multiplied the next is on its way. Loads are single elements, 8 neighbours of 4 rows to a warp: full sectors, no bank met twice, and any
// stride and alignment; there are 12 of them per thread to 512 multiply-adds in float32. The products:
//
//   float     kThreadRows x kThreadColumns sums in each thread (FmaTile): 3 loads of 16 bytes for 32 multiply-adds
//   double    tensor cores (MmaTile): exact products, every sum rounded to float64, twice the rate of plain multiply-adds on sm_80 to 100
#pragma once
#include <algorithm>
#include <type_traits>

#include "common/cuda/convert.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/mma.cuh"
#include "common/sizes.h"

namespace mfac_kernels {

// ---- what a thread holds of a tile ------------------------------------------------------------------------------------------------------
//
//   kSums sums; sum i is the tile's entry (row(i), column(i % kOwnColumns)), i / kOwnColumns counting the rows of the thread
//   lanes l and l + kColumnLanes of a warp have the same columns, as have kWarpsDown warps, of which this is number warp_down()

template <int kRows_, int kColumns_, int kThreadRows, int kThreadColumns, int kDepth_>
struct FmaTile {
  using S = float;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_, kStride = (kRows > kColumns ? kRows : kColumns) + 4;
  static constexpr int kDown = kRows / kThreadRows, kAcross = kColumns / kThreadColumns, kThreads = kDown * kAcross;
  static constexpr int kSums = kThreadRows * kThreadColumns, kOwnColumns = kThreadColumns;
  static constexpr int kColumnLanes = 8, kWarpsAcross = kAcross / kColumnLanes, kWarpsDown = kDown / 4;  // warps of 4 x 8 threads
  static constexpr int kPack = 4;                                                                        // neighbours, loaded together

  static __device__ __forceinline__ int warp_down() { return warp_of_thread() / kWarpsAcross; }
  static __device__ __forceinline__ int down() { return warp_down() * 4 + lane_of_thread() / kColumnLanes; }
  static __device__ __forceinline__ int across() {
    return warp_of_thread() % kWarpsAcross * kColumnLanes + lane_of_thread() % kColumnLanes;
  }
  static __device__ __forceinline__ int row(int i) {
    const int r = i / kOwnColumns;
    return (r / kPack * kDown + down()) * kPack + r % kPack;
  }
  static __device__ __forceinline__ int column(int c) { return (c / kPack * kAcross + across()) * kPack + c % kPack; }

  template <int n>
  static __device__ __forceinline__ void load(Shared<S> stage, int step, S (&values)[n]) {
#pragma unroll
    for (int group = 0; group < n / kPack; ++group) {
      const Pack<S, kPack> pack = load_pack<S, kPack>(&stage[group * step]);
#pragma unroll
      for (int p = 0; p < kPack; ++p) values[group * kPack + p] = pack.values[p];
    }
  }

  static __device__ __forceinline__ void multiply(Shared<S> a, Shared<S> b, S (&sum)[kSums]) {
#pragma unroll 4
    for (int k = 0; k < kDepth; ++k) {
      S x[kThreadRows], y[kThreadColumns];
      load(a + (k * kStride + down() * kPack), kDown * kPack, x);
      load(b + (k * kStride + across() * kPack), kAcross * kPack, y);
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r)
#pragma unroll
        for (int c = 0; c < kThreadColumns; ++c) sum[r * kThreadColumns + c] += x[r] * y[c];
    }
  }
};

template <int kRows_, int kColumns_, int kWarpsDown_, int kWarpsAcross, int kDepth_>
struct MmaTile {
  using S = double;
  static constexpr int kRows = kRows_, kColumns = kColumns_, kDepth = kDepth_, kStride = (kRows > kColumns ? kRows : kColumns) + 4;
  static constexpr int kColumnLanes = 4, kWarpsDown = kWarpsDown_, kThreads = kWarpsDown * kWarpsAcross * kWarpSize;
  static constexpr int kDown = kRows / kWarpsDown / 16, kAcross = kColumns / kWarpsAcross / 8;  // fragments of a warp
  static constexpr int kSums = kDown * kAcross * 4, kOwnColumns = kAcross * 2;
  static constexpr int kMmaDepth = 8;

  static __device__ __forceinline__ int warp_down() { return warp_of_thread() / kWarpsAcross; }
  static __device__ __forceinline__ int first_row() { return warp_down() * kDown * 16; }
  static __device__ __forceinline__ int first_column() { return warp_of_thread() % kWarpsAcross * kAcross * 8; }
  static __device__ __forceinline__ int row(int i) {
    const int r = i / kOwnColumns;
    return first_row() + r / 2 * 16 + fragment_of_d(lane_of_thread(), r % 2 * 2).row;
  }
  static __device__ __forceinline__ int column(int c) { return first_column() + c / 2 * 8 + fragment_of_d(lane_of_thread(), c % 2).column; }

  static __device__ __forceinline__ void multiply(Shared<S> a, Shared<S> b, S (&sum)[kSums]) {
    const int lane = lane_of_thread();
#pragma unroll
    for (int k = 0; k < kDepth; k += kMmaDepth) {
      S x[kDown][4], y[kAcross][2];
#pragma unroll
      for (int i = 0; i < kDown * 4; ++i) {
        const Position at = fragment_of_a<S>(lane, i % 4, 0);
        x[i / 4][i % 4] = a[(k + at.column) * kStride + first_row() + i / 4 * 16 + at.row];
      }
#pragma unroll
      for (int i = 0; i < kAcross * 2; ++i) {
        const Position at = fragment_of_b<S>(lane, i % 2, 0);
        y[i / 2][i % 2] = b[(k + at.row) * kStride + first_column() + i / 2 * 8 + at.column];
      }
#pragma unroll
      for (int r = 0; r < kDown; ++r)
#pragma unroll
        for (int c = 0; c < kAcross; ++c) {
          S d[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) d[e] = sum[(r * 2 + e / 2) * kOwnColumns + c * 2 + e % 2];
          mma(d, x[r], y[c]);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[(r * 2 + e / 2) * kOwnColumns + c * 2 + e % 2] = d[e];
        }
    }
  }
};

// ---- operands ---------------------------------------------------------------------------------------------------------------------------

enum class Layout { rows, columns };  // A[i, k] at data[i * stride + k], or at data[k * stride + i]
enum class Shape { full, lower };     // lower: A[i, k] is zero for k > i + diagonal, and not read

template <class T, Layout kLayout, Shape kShape = Shape::full>
struct Operand {
  const T* data;
  int64_t stride, count, depth, diagonal;  // count rows, of which the tile may have more
};

// Elements of a stage of kSize rows, as the threads of a block share them: element e of a thread lies (i(e), k(e)) from its first.
template <class Tile, int kSize, class T, Layout kLayout, Shape kShape>
struct Staging {
  static constexpr int kElements = kSize * Tile::kDepth / Tile::kThreads;
  static constexpr bool kInRows = kLayout == Layout::rows;
  static constexpr int kRun = kInRows ? 8 : kSize;                     // neighbours in memory
  static constexpr int kRuns = Tile::kThreads / kRun;                  // that the block loads at a time
  static constexpr int kPasses = kInRows ? kSize / kRuns : kElements;  // until they have met every row, or the whole depth
  static_assert(!kInRows || kSize % kRuns == 0);
  T values[kElements] = {};

  static __device__ __forceinline__ int run() { return static_cast<int>(threadIdx.x) / kRun; }
  static __device__ __forceinline__ int place() { return static_cast<int>(threadIdx.x) % kRun; }
  static __device__ __forceinline__ int first_i() { return kInRows ? run() : place(); }
  static __device__ __forceinline__ int first_k() { return kInRows ? place() : run(); }
  static __device__ constexpr int i(int e) { return kInRows ? e % kPasses * kRuns : 0; }
  static __device__ constexpr int k(int e) { return kInRows ? e / kPasses * kRun : e * kRuns; }

  __device__ __forceinline__ void fetch(const Operand<T, kLayout, kShape>& a, int64_t first) {
    const int depth = static_cast<int>(min(int64_t(Tile::kDepth), a.depth - first)) - first_k();
    const int count = static_cast<int>(min(int64_t(kSize), a.count)) - first_i();
    const int64_t diagonal = a.diagonal + first_i() - first - first_k();
    const T* from = a.data + (kInRows ? first_i() * a.stride + first + first_k() : (first + first_k()) * a.stride + first_i());
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass, from += kRuns * a.stride) {
#pragma unroll
      for (int e = pass; e < kElements; e += kPasses) {
        bool inside = i(e) < count && k(e) < depth;
        if constexpr (kShape == Shape::lower) inside = inside && k(e) <= i(e) + diagonal;
        values[e] = inside ? from[kInRows ? k(e) : 0] : T{};
      }
    }
  }
  __device__ __forceinline__ void store(Shared<typename Tile::S> stage) const {
    const Shared<typename Tile::S> first = stage + (first_k() * Tile::kStride + first_i());
#pragma unroll
    for (int e = 0; e < kElements; ++e) first[k(e) * Tile::kStride + i(e)] = static_cast<typename Tile::S>(widen(values[e]));
  }
};

template <class Tile>
constexpr int kStageElements = 4 * Tile::kDepth * Tile::kStride;  // two stages of A and B

// sum += A B^T over depth; after(chunk) follows each kDepth of it. b_within_a >= 0: B is A from that row on, and is not read.
template <class Tile, class T, Layout kLayoutA, Shape kShapeA, class U, Layout kLayoutB, class After>
__device__ __forceinline__ void multiply(const Operand<T, kLayoutA, kShapeA>& a, const Operand<U, kLayoutB>& b, int b_within_a,
                                         Shared<typename Tile::S> stages, typename Tile::S (&sum)[Tile::kSums], const After& after) {
  constexpr int kOperand = Tile::kDepth * Tile::kStride;
  const int64_t chunks = divide_up(a.depth, Tile::kDepth);
  const bool reads_b = b_within_a < 0;
  Staging<Tile, Tile::kRows, T, kLayoutA, kShapeA> a_staging;
  Staging<Tile, Tile::kColumns, U, kLayoutB, Shape::full> b_staging;
  __syncthreads();  // until the last product has been read
  a_staging.fetch(a, 0);
  if (reads_b) b_staging.fetch(b, 0);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Shared<typename Tile::S> stage = stages + static_cast<int>(chunk % 2) * 2 * kOperand;
    a_staging.store(stage);
    if (reads_b) b_staging.store(stage + kOperand);
    __syncthreads();  // a stage is written again two chunks on: every thread is then past the barrier of the chunk between
    if (chunk + 1 < chunks) {
      a_staging.fetch(a, (chunk + 1) * Tile::kDepth);
      if (reads_b) b_staging.fetch(b, (chunk + 1) * Tile::kDepth);
    }
    Tile::multiply(stage, stage + (reads_b ? kOperand : b_within_a), sum);
    after(chunk);
  }
}

// 128 x 64 entries, 64 x 64, 32 x 32; kThreads 256, 256, 64
template <class S, int kSize>
using ProductTile =
    std::conditional_t<std::is_same_v<S, float>,
                       std::conditional_t<kSize == 128, FmaTile<128, 64, 8, 4, 16>,
                                          std::conditional_t<kSize == 64, FmaTile<64, 64, 4, 4, 32>, FmaTile<32, 32, 4, 4, 16>>>,
                       std::conditional_t<kSize == 128, MmaTile<128, 64, 4, 2, 8>,
                                          std::conditional_t<kSize == 64, MmaTile<64, 64, 4, 2, 16>, MmaTile<32, 32, 2, 1, 8>>>>;

// body.operator()<kSize>() for the tile that suits m rows
template <class Body>
auto for_size(int64_t m, const Body& body) {
  return m <= 32 ? body.template operator()<32>() : m <= 64 ? body.template operator()<64>() : body.template operator()<128>();
}

// Kernels walk on by the size of the grid.
inline unsigned grid_of(int64_t tasks) { return static_cast<unsigned>(std::min<int64_t>(tasks, 0x7fffffff)); }

// The tiles of a symmetric matrix that meet the lower triangle: row of tiles i has kRatio (i + 1) of them.
template <class Tile>
struct LowerTiles {
  static constexpr int kRatio = Tile::kRows / Tile::kColumns;
  static __host__ __device__ constexpr int64_t before(int64_t i) { return kRatio * i * (i + 1) / 2; }
  static __host__ __device__ constexpr int64_t count(int64_t m) { return before(divide_up(m, Tile::kRows)); }
  struct Corner {
    int64_t row, column;
  };
  static __device__ Corner at(int64_t tile) {
    int64_t i = 0;
    while (before(i + 1) <= tile) ++i;
    return {i * Tile::kRows, (tile - before(i)) * Tile::kColumns};
  }
};

}  // namespace mfac_kernels
