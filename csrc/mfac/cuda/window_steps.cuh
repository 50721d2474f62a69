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
  static constexpr bool kAhead = kVectors == 1;  // a step is loaded while the one before it is added
  static constexpr int kColumns = kVectors == 1 || sizeof(T) > 2 ? 16 / sizeof(T) : 4;
  static constexpr int kStep = kWarpSize * kColumns;
  static constexpr int kChunk = kStaged / kVectors;
};

// The elements of a window in float64 arithmetic. Conversions would be the bound: on an H200 two passes took 9 ms for 8.2e9 elements of any
// type, 4 a clock on an SM. So the bits are moved instead: sign, exponent and mantissa of a float32 in their places in a double give its
// value times 2^-896, exactly, denormals too. A sum of products is multiplied by kScale, and so is every other factor (up to 2^575): half
// of that each, so that no product underflows. What is not finite is noticed, and makes a sum NaN. What it gains: not measured.
template <class T>
class Lift {
 public:
  static constexpr double kScale = 0x1p448;
  __device__ __forceinline__ double operator()(T value) {
    const uint32_t bits = __float_as_uint(float_of(value));
    largest_ = max(largest_, bits & 0x7fffffffu);
    return __hiloint2double(static_cast<int32_t>(bits) >> 3 & static_cast<int32_t>(0x8fffffffu), static_cast<int32_t>(bits << 29));
  }
  __device__ __forceinline__ double nan_unless_finite() const { return largest_ < 0x7f800000u ? 0 : static_cast<double>(NAN); }

 private:
  uint32_t largest_ = 0;
};
template <>
class Lift<double> {
 public:
  static constexpr double kScale = 1;
  __device__ __forceinline__ double operator()(double value) const { return value; }
  __device__ __forceinline__ double nan_unless_finite() const { return 0; }
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

// A lane's packs of several rows
template <class T, int kRows, int kColumns>
struct Packs {
  Pack<T, kColumns> rows[kRows];
};

// May steps of these rows be loaded pack by pack?
template <class T, int kColumns>
__device__ __forceinline__ bool is_aligned(const T* first, int64_t stride) {
  return (reinterpret_cast<uintptr_t>(first) | static_cast<uintptr_t>(stride * sizeof(T))) % (kColumns * sizeof(T)) == 0;
}

// This lane's elements of a step: of a whole one, or of the first `width` columns, zeros after them. Nothing divides the loads of a whole
// step, so that those of several rows are on their way at once: elements of 16 bits are taken apart where a branch ends, which waits.
template <bool kAligned, int kColumns, class T>
__device__ __forceinline__ Pack<T, kColumns> load_step(const T* p) {
  const int lane = lane_of_thread();
  Pack<T, kColumns> pack;
  if constexpr (kAligned) {
    pack = load_pack<T, kColumns>(p + lane * kColumns);
  } else {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) pack.values[c] = p[column_of<kColumns, kAligned>(lane, c)];
  }
  return pack;
}
template <bool kAligned, int kColumns, class T>
__device__ __forceinline__ Pack<T, kColumns> load_ragged_step(const T* p, int width) {
  Pack<T, kColumns> pack;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const int column = column_of<kColumns, kAligned>(lane_of_thread(), c);
    pack.values[c] = column < width ? p[column] : T{};
  }
  return pack;
}

}  // namespace mfac_kernels
