// What the two passes over a window share (window_dots_kernels.cu, window_combine_kernels.cu): how a warp walks over rows.
#pragma once
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.h"

namespace mfac_kernels {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kBlocks = 2;     // on an SM, at least: the registers must suffice
constexpr int kStaged = 4096;  // elements of X in shared memory

// Vectors are taken one by one or by so many.
constexpr int kManyVectors = 4;
inline int vectors_together(int64_t vectors) { return vectors == 1 ? 1 : kManyVectors; }

// Rows in flight, and neighbouring columns of a lane. A warp takes kStep columns of kRows rows at a time.
template <class T, int kVectors>
struct WindowTile {
  static constexpr int kRows = 4;
  static constexpr int kColumns = kVectors == 1 || sizeof(T) > 2 ? 16 / sizeof(T) : 4;
  static constexpr int kStep = kWarpSize * kColumns;
  static constexpr int kChunk = kStaged / kVectors;
};

// A lane's columns within a step: neighbours if they can be loaded together, else one from each run of kWarpSize.
template <int kColumns, bool kAligned>
__device__ __forceinline__ int column_of(int lane, int c) {
  return kAligned ? lane * kColumns + c : c * kWarpSize + lane;
}
// Where shared memory holds a column: element c of each lane side by side, so that a warp's access meets no bank twice.
template <int kColumns>
__device__ __forceinline__ int position_of(int column, bool aligned) {
  constexpr int kStep = kWarpSize * kColumns;
  const int within = column % kStep;
  return aligned ? column - within + within % kColumns * kWarpSize + within / kColumns : column;
}

// May steps of these rows be loaded pack by pack?
template <class T, int kColumns>
__device__ __forceinline__ bool is_aligned(const T* first, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(stride * sizeof(T))) % (kColumns * sizeof(T)) == 0;
}

// This lane's elements of a step with `width` columns; those past it are zero.
template <bool kAligned, int kColumns, class T>
__device__ __forceinline__ Pack<T, kColumns> load_step(const T* p, int width) {
  const int lane = lane_of_thread();
  Pack<T, kColumns> pack;
  if (width >= kWarpSize * kColumns) {
    if constexpr (kAligned) {
      pack = load_pack<T, kColumns>(p + lane * kColumns);
    } else {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) pack.values[c] = p[column_of<kColumns, kAligned>(lane, c)];
    }
  } else {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = column_of<kColumns, kAligned>(lane, c);
      pack.values[c] = column < width ? p[column] : T{};
    }
  }
  return pack;
}

}  // namespace mfac_kernels
