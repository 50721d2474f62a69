// Sums of products of the rows of a patch matrix P (R, D), which is never formed: the factor of a linear layer or a convolution.
//
//   C[i, j] = sum_r w[r] P[r, i] P[r, j]      (D, D), its diagonal blocks, or one per group of channels
//
// Floor: R D^2 flops in the lower triangle, multiply-adds in float32 (60 TFLOP/s on an H200) or float64; x read once. For a 3 x 3
// convolution with 256 channels on 32 images of 14 x 14 (D = 2304, R = 6272) that is 0.56 ms of arithmetic and 2 us of memory: arithmetic
// is the bound from D = 64 or so. Expected: 65-68 % of it with tiles of 128, 49 % with tiles of 64, which is the share of the loop's
// instructions that are multiply-adds; of the others half address patches.
//
// What makes it fast: im2col is address arithmetic, done while a tile goes to shared memory. Rows and columns of a tile are decoded into
// tables, once per 256 rows and once per tile, so an element costs an addition, three comparisons if the image is padded, and a load that
// neighbouring threads share: along columns if channels are neighbours in memory, else along rows. Loads of the next 8 rows are in flight
// while these ones' 8 x 8 products per thread run. Only tiles of the lower triangle exist. Every 256 rows registers are added to the tile's
// sums in the workspace, which keeps the digits of long sums; runs of rows have their own, and are added in order: no atomics.
#include <type_traits>

#include "kronecker/cuda/products.cuh"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 2;  // on an SM, at least: the registers must suffice
constexpr int kDepth = 8;   // rows of P multiplied at a time
constexpr int kSlab = 256;  // rows decoded at a time, one by each thread, and summed in registers
static_assert(kSlab == kThreads && kSlab % kDepth == 0);

template <class T>
__device__ __forceinline__ T element(const Side& side, const T* data, const PatchRow& row, const PatchColumn<T>& column) {
  bool inside = column.has_element;
  if (side.padded) inside &= meets_image(side.patches, row, column);
  T value = column.constant;
  if (inside) value = data[row.offset + column.offset];
  return value;
}

template <bool kCross, class Item>
__device__ __forceinline__ const Side& right_side(const Item& p) {
  if constexpr (kCross)
    return p.b;
  else
    return p.a;
}

// blockIdx.x: tiles, innermost, blocks of a factor, runs of rows, and factors. Given: Products, or several together.
template <class T, int kTile, bool kCross, class Given>
__global__ void __launch_bounds__(kThreads, kBlocks) products_kernel(const Given given) {
  using A = Accumulator<T>;
  constexpr int kPer = kTile / 16;        // rows, and columns, of the tile that a thread sums
  constexpr int kWide = 16 / sizeof(A);   // of which this many lie together
  constexpr int kStride = kTile + kWide;  // rows are aligned; 8 rows of 4 columns meet every bank once
  constexpr int kLoads = kDepth * kTile / kThreads;
  MFAC_SHARED(A, stage, 2 * 2 * kDepth * kStride);  // (chunk, side, row, column)
  MFAC_SHARED(PatchRow, rows, 2 * kSlab);
  MFAC_SHARED(A, weights, kSlab);
  MFAC_SHARED(PatchColumn<T>, columns, 2 * kTile);
  MFAC_SHARED(int, item, 1);  // read for each slab: of several, its fields do not fit the registers as well
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread(), warp = warp_of_thread();
  const Place place = place_of_block(given);
  const auto& p = item_of(given, place.item);
  const Work work = work_of(p, place.index);
  if (work.run.count == 0) return;
  const int64_t block = work.tile / p.cut.tiles, index = work.tile % p.cut.tiles;
  const TileIndex tile = kCross ? TileIndex{index / p.cut.tiles_across, index % p.cut.tiles_across} : lower_tile(index);
  if (!kCross && !is_wanted(p, tile)) return;
  const Side& b = right_side<kCross>(p);
  const T* const data_a = static_cast<const T*>(p.a.patches.data) + block * p.a.block_offset;
  const T* const data_b = static_cast<const T*>(b.patches.data) + block * b.block_offset;

  const int64_t begin = work.run.boundary(work.run.index, kSlab), end = work.run.boundary(work.run.index + 1, kSlab);
  for (int i = thread; i < kTile; i += kThreads) {
    columns[i] = column_of<T>(p.a, block, tile.row * kTile + i);
    columns[kTile + i] = column_of<T>(b, block, tile.column * kTile + i);
  }

  // Where this thread's loads of a tile (kDepth, kTile) lie: the first, and from one to the next
  const int row = p.along_rows ? thread % kDepth : thread / kTile, row_step = p.along_rows ? 0 : kThreads / kTile;
  const int column = p.along_rows ? thread / kDepth : thread % kTile, column_step = p.along_rows ? kThreads / kDepth : 0;
  T values[2][kLoads];
  const auto load = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int r = chunk * kDepth + row + i * row_step, c = column + i * column_step;
      values[0][i] = element(p.a, data_a, rows[r], columns[c]);
      values[1][i] = element(b, data_b, rows[r + (kCross ? kSlab : 0)], columns[kTile + c]);
    }
  };
  const auto store = [&](int chunk) {
    const auto to = stage + chunk % 2 * 2 * kDepth * kStride;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int r = row + i * row_step, c = column + i * column_step;
      to[r * kStride + c] = static_cast<A>(widen(values[0][i])) * weights[chunk * kDepth + r];
      to[(kDepth + r) * kStride + c] = static_cast<A>(widen(values[1][i]));
    }
  };

  // A warp's threads form 4 x 8 of the block's 16 x 16; packs of a thread are 16 packs apart.
  const int ty = lane / 8 + warp / 2 * 4, tx = lane % 8 + warp % 2 * 8;
  A* const tile_sums = static_cast<A*>(p.sums) + place.index * (kTile * kTile);
  int64_t first = begin;
  if (thread == 0) item[0] = place.item;
  __syncthreads();
  do {
    const auto& of_slab = item_of(given, item[0]);
    // Past the end the last row again, whose weight is 0 there: an element need not ask.
    const int64_t at = min(first + thread, end - 1);
    rows[thread] = patch_row(of_slab.a.patches, at, end);
    weights[thread] = at == first + thread ? weight_of<A>(of_slab, at, rows[thread]) : A(0);
    if (kCross) rows[kSlab + thread] = patch_row(b.patches, at, end);
    __syncthreads();
    A sum[kPer][kPer] = {};
    const auto chunks = static_cast<int>(divide_up(min(int64_t(kSlab), end - first), kDepth));
    if (chunks > 0) {
      load(0);
      store(0);
    }
    __syncthreads();
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool more = chunk + 1 < chunks;
      if (more) load(chunk + 1);
      const auto from = stage + chunk % 2 * 2 * kDepth * kStride;
#pragma unroll(kTile == 64 ? 2 : 1)  // more would not fit the registers; other warps hide the latency
      for (int k = 0; k < kDepth; ++k) {
        Pack<A, kWide> left[kPer / kWide], right[kPer / kWide];
#pragma unroll
        for (int g = 0; g < kPer / kWide; ++g) {
          left[g] = load_pack<A, kWide>(from + (k * kStride + (16 * g + ty) * kWide));
          right[g] = load_pack<A, kWide>(from + ((kDepth + k) * kStride + (16 * g + tx) * kWide));
        }
#pragma unroll
        for (int i = 0; i < kPer; ++i)
#pragma unroll
          for (int j = 0; j < kPer; ++j) sum[i][j] += left[i / kWide].values[i % kWide] * right[j / kWide].values[j % kWide];
      }
      if (more) store(chunk + 1);
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      A* const to = tile_sums + ((16 * (i / kWide) + ty) * kWide + i % kWide) * kTile + tx * kWide;
#pragma unroll
      for (int g = 0; g < kPer / kWide; ++g) {
        auto& pack = *reinterpret_cast<Pack<A, kWide>*>(to + 16 * g * kWide);
        Pack<A, kWide> total = {};
        if (first > begin) total = pack;
#pragma unroll
        for (int c = 0; c < kWide; ++c) total.values[c] += sum[i][g * kWide + c];
        pack = total;
      }
    }
    first += kSlab;
  } while (first < end);
}

template <class T, bool kCross, class Given>
cudaError_t launch_products(const Given& given, const Cut& cut, int64_t thread_blocks, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(thread_blocks));
  if constexpr (!std::is_same_v<T, double>)
    if (cut.tile() == 128) return launch(products_kernel<T, 128, kCross, Given>, grid, dim3(kThreads), 0, stream, given);
  return launch(products_kernel<T, 64, kCross, Given>, grid, dim3(kThreads), 0, stream, given);
}

}  // namespace

cudaError_t fma_products(const Products& p, cudaStream_t stream) {
  return for_type(p.a.patches.dtype, [&](auto element) {
    using T = decltype(element);
    return p.cut.cross ? launch_products<T, true>(p, p.cut, p.cut.thread_blocks(), stream)
                       : launch_products<T, false>(p, p.cut, p.cut.thread_blocks(), stream);
  });
}
cudaError_t fma_products(const Together<FactorProducts>& all, cudaStream_t stream) {
  return for_type(all.items[0].a.patches.dtype, [&](auto element) {
    return launch_products<decltype(element), false>(all, all.items[0].cut, all.thread_blocks, stream);
  });
}

}  // namespace mfac_kernels
