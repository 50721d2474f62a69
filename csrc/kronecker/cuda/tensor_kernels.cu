// The sums of products of factor_kernels.cu on tensor cores: bfloat16 and float16 rows as they are, float32 rows as TF32 where that is
// allowed. Products are exact (of TF32's 11 digits), sums float32.
//
//   C[i, j] = sum_r w[r] P[r, i] P[r, j]      tiles of the lower triangle, 128 x 128
//
// Floor: R D^2 flops at 790 (16 bits) or 400 (TF32) TFLOP/s, the rates of a GEMM on an H200; x read once; half of D^2 floats written and
// read again, D^2 floats of the factor read and written. For a 3 x 3 convolution with 256 channels on 32 images of 14 x 14 (D = 2304,
// R = 6272) that is 42 or 83 us of arithmetic and 15 us of memory. Expected: 40-50 % of the rates: mma.sync reaches about 60 % of them on
// this GPU, and each chunk starts with 8 copies of 14 instructions per thread beside 64 mma.
//
// What makes it fast: four warps, each with 64 x 64 of the tile in registers, so that shared memory delivers a fragment for every second
// mma; copies of 16 bytes to shared memory that no register sees (cp.async), three chunks deep. For this, channels must be neighbours in
// memory, whose columns then come in the order (offset, channel): im2col is one address for 4 or 8 of them. A thread keeps to its columns
// and moves from row to row. A tile of the diagonal is copied once for both sides.
#include "common/cuda/async_copy.cuh"
#include "common/cuda/mma.cuh"
#include "kronecker/cuda/products.cuh"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 2;  // on an SM
constexpr int kTile = 128, kWarpTile = kTile / 2;
constexpr int kStages = 3;          // chunks in shared memory: one is multiplied, the others are on their way
constexpr int kSlab = 512;          // rows decoded at a time, and summed in registers
constexpr int kStride = kTile + 8;  // rows of a chunk: what a warp reads at once meets no bank twice

template <class T>
constexpr int kDepth = 2 * kMmaDepth<T>;  // rows of a chunk
template <class T>
constexpr int kVector = 16 / sizeof(T);  // columns copied together

// Neighbouring columns: `count` channels at one offset of the kernel, zeros after them; or the bias, and zeros.
template <class T>
struct PatchVector {
  PatchColumn<T> first;
  int count;
  bool bias;
};

template <class T>
__device__ __forceinline__ PatchVector<T> vector_of(const Side& side, int64_t block, int64_t column) {
  const Axis(&axes)[Patches::kAxes] = side.patches.axes;
  const int64_t offsets = axes[0].kernel * axes[1].kernel * axes[2].kernel;
  const int64_t offset = column / side.padded_channels, channel = column % side.padded_channels;
  // A block is a run of channels of a matrix, or all of a group's patches.
  const int64_t first = block * side.block_features, features = min(side.size, side.features - first);
  const bool has_bias = side.bias_feature == first + features - 1;
  PatchVector<T> vector = {{}, 0, has_bias && column == offsets * side.padded_channels};
  if (offset >= offsets) return vector;
  vector.count = static_cast<int>(max(int64_t(0), min(int64_t(kVector<T>), (features - has_bias) / offsets - channel)));
  vector.first = patch_column<T>(side.patches, (first + channel) * offsets + offset);
  return vector;
}

template <class T>
__device__ __forceinline__ void copy_vector(const Side& side, const T* data, const PatchRow& row, const PatchVector<T>& vector,
                                            Shared<T> to) {
  if (vector.bias) {
    T one = {};
    if (row.valid) narrow(side.bias, one);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) to[i] = i == 0 ? one : T{};
    return;
  }
  const bool inside = row.valid && vector.count > 0 && (!side.padded || meets_image(side.patches, row, vector.first));
  copy_async<kVector<T>>(to, inside ? data + (row.offset + vector.first.offset) : data, inside ? vector.count : 0);
}

// Columns [0, 16) of a chunk's rows, transposed: the fragment a of kMmaDepth rows
template <class T>
__device__ __forceinline__ void load_left(Shared<T> rows, Shared<float> weights, uint32_t (&a)[4]) {
  const int lane = lane_of_thread();
  if constexpr (sizeof(T) == 2) {
    load_matrices<true>(a, rows + ((lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Position at = fragment_of_a<T>(lane, i, 0);
      a[i] = to_tf32(rows[at.column * kStride + at.row] * weights[at.column]);
    }
  }
}
// Columns [0, 16) of a chunk's rows: two fragments b
template <class T>
__device__ __forceinline__ void load_right(Shared<T> rows, uint32_t (&b)[2][2]) {
  const int lane = lane_of_thread();
  if constexpr (sizeof(T) == 2) {
    uint32_t both[4];
    load_matrices<true>(both, rows + (lane % 16 * kStride + lane / 16 * 8));
#pragma unroll
    for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = both[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Position at = fragment_of_b<T>(lane, i % 2, 0);
      b[i / 2][i % 2] = to_tf32(rows[at.row * kStride + i / 2 * 8 + at.column]);
    }
  }
}

// blockIdx.x: tiles, innermost, blocks of a factor, runs of rows, and factors. Given: Products, or several together.
template <class T, class Given>
__global__ void __launch_bounds__(kThreads, kBlocks) tensor_kernel(const Given given) {
  constexpr int kVectors = kTile / kVector<T>;  // of a row
  constexpr int kRows = kThreads / kVectors;    // copied at a time
  constexpr int kFragments = kWarpTile / 16;
  MFAC_DYNAMIC_SHARED(T, stage);  // (kStages, side, kDepth, kStride)
  MFAC_SHARED(PatchRow, rows, kSlab);
  MFAC_SHARED(float, weights, kSlab);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_thread(), warp = warp_of_thread();
  const Place place = place_of_block(given);
  const auto& p = item_of(given, place.item);
  const Work work = work_of(p, place.index);
  if (work.run.count == 0) return;
  const int64_t block = work.tile / p.cut.tiles;
  const TileIndex tile = lower_tile(work.tile % p.cut.tiles);
  if (!is_wanted(p, tile)) return;
  const bool diagonal = tile.row == tile.column;
  const T* const data = static_cast<const T*>(p.a.patches.data) + block * p.a.block_offset;

  const int64_t begin = work.run.boundary(work.run.index, kSlab), end = work.run.boundary(work.run.index + 1, kSlab);

  const int first_row = thread / kVectors, column = thread % kVectors * kVector<T>;
  const PatchVector<T> left = vector_of<T>(p.a, block, tile.row * kTile + column);
  const PatchVector<T> right = vector_of<T>(p.a, block, tile.column * kTile + column);
  const auto stage_of = [&](int chunk) { return stage + chunk % kStages * 2 * kDepth<T> * kStride; };
  const auto copy = [&](int chunk) {
    const auto to = stage_of(chunk);
#pragma unroll
    for (int i = first_row; i < kDepth<T>; i += kRows) {
      const PatchRow row = rows[chunk * kDepth<T> + i];
      copy_vector(p.a, data, row, left, to + (i * kStride + column));
      if (!diagonal) copy_vector(p.a, data, row, right, to + ((kDepth<T> + i) * kStride + column));
    }
  };

  const int row_of_warp = warp / 2 * kWarpTile, column_of_warp = warp % 2 * kWarpTile;
  float* const tile_sums = static_cast<float*>(p.sums) + place.index * (kTile * kTile);
  int64_t first = begin;
  do {
    for (int i = thread; i < kSlab; i += kThreads) {
      rows[i] = patch_row(p.a.patches, first + i, end);
      weights[i] = sizeof(T) == 2 ? 1 : weight_of<float>(p, first + i, rows[i]);
    }
    __syncthreads();
    float sum[kFragments][2 * kFragments][4] = {};
    const auto chunks = static_cast<int>(divide_up(min(int64_t(kSlab), end - first), kDepth<T>));
    for (int chunk = 0; chunk < kStages - 1; ++chunk) {
      if (chunk < chunks) copy(chunk);
      commit_copies();
    }
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_copies<kStages - 2>();
      __syncthreads();  // this chunk has come for every thread, and the last one has been read
      if (chunk + kStages - 1 < chunks) copy(chunk + kStages - 1);
      commit_copies();
      const auto from = stage_of(chunk);
#pragma unroll
      for (int k = 0; k < kDepth<T>; k += kMmaDepth<T>) {
        uint32_t a[kFragments][4], b[2][2];
#pragma unroll
        for (int i = 0; i < kFragments; ++i)
          load_left<T>(from + (k * kStride + row_of_warp + 16 * i), weights + (chunk * kDepth<T> + k), a[i]);
        const auto others = from + ((diagonal ? k : kDepth<T> + k) * kStride + column_of_warp);
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
          load_right<T>(others + 16 * j, b);
#pragma unroll
          for (int i = 0; i < kFragments; ++i) {
            mma<T>(sum[i][2 * j], a[i], b[0]);
            mma<T>(sum[i][2 * j + 1], a[i], b[1]);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kFragments; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kFragments; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Position at = fragment_of_d(lane, 2 * half);
          auto& pair =
              *reinterpret_cast<Pack<float, 2>*>(tile_sums + (row_of_warp + 16 * i + at.row) * kTile + column_of_warp + 8 * j + at.column);
          Pack<float, 2> total = {};
          if (first > begin) total = pair;
          total.values[0] += sum[i][j][2 * half];
          total.values[1] += sum[i][j][2 * half + 1];
          pair = total;
        }
    __syncthreads();  // until the rows and the stages have been read
    first += kSlab;
  } while (first < end);
}

template <class Given>
cudaError_t launch_tensor(const Given& given, DType dtype, int64_t thread_blocks, cudaStream_t stream) {
  const auto run = [&]<class T>(T) {
    return launch(tensor_kernel<T, Given>, dim3(static_cast<unsigned>(thread_blocks)), dim3(kThreads),
                  kStages * 2 * kDepth<T> * kStride * sizeof(T), stream, given);
  };
  switch (dtype) {
    case DType::bf16: return run(bf16());
    case DType::fp16: return run(fp16());
    default: return run(float());
  }
}

}  // namespace

cudaError_t tensor_products(const Products& p, cudaStream_t stream) {
  return launch_tensor(p, p.a.patches.dtype, p.cut.thread_blocks(), stream);
}
cudaError_t tensor_products(const Together<FactorProducts>& all, cudaStream_t stream) {
  return launch_tensor(all, all.items[0].a.patches.dtype, all.thread_blocks, stream);
}

}  // namespace mfac_kernels
