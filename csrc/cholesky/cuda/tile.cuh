// A tile of a matrix in the registers of one thread, and its way from and to memory of any strides.
#pragma once
#include "cholesky/cuda/cholesky_kernels.h"
#include "common/cuda/convert.cuh"

namespace mfac_kernels {

constexpr int kTile = 8;

template <class S>
using Tile = S[kTile][kTile];

// The row of entry `index` of a lower triangle that is counted row by row
__device__ __forceinline__ int row_of_triangle(int index) { return (static_cast<int>(sqrtf(static_cast<float>(8 * index + 1))) - 1) / 2; }

// Four neighbours in shared memory, read or written together.
template <class S>
struct alignas(16) Quad {
  S x[4];
};

// Of element(0) ... element(3)
template <class S, class Element>
__device__ __forceinline__ Quad<S> quad_of(const Element& element) {
  Quad<S> quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) quad.x[i] = element(i);
  return quad;
}

template <class T>
__device__ __forceinline__ bool in_packs(const T* p, int64_t row_stride, int64_t column_stride) {
  return column_stride == 1 && (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(row_stride * sizeof(T))) % 16 == 0;
}

// What lies past `rows` and `columns` becomes zero.
template <class T, class S>
__device__ __forceinline__ void load_tile(const T* p, int64_t row_stride, int64_t column_stride, int rows, int columns, Tile<S>& a) {
  constexpr int kPack = 16 / sizeof(T);
  if (rows >= kTile && columns >= kTile && in_packs(p, row_stride, column_stride)) {
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; c += kPack) {
        const Pack<T, kPack> pack = load_pack<T, kPack>(p + r * row_stride + c);
#pragma unroll
        for (int i = 0; i < kPack; ++i) a[r][c + i] = static_cast<S>(widen(pack.values[i]));
      }
  } else {
#pragma unroll
    for (int r = 0; r < kTile; ++r, p += row_stride) {
      const T* element = p;
#pragma unroll
      for (int c = 0; c < kTile; ++c, element += column_stride) a[r][c] = r < rows && c < columns ? static_cast<S>(widen(*element)) : S(0);
    }
  }
}

// body(T()) for the type of dtype, which has no more bits than S
template <class S, class Body>
__device__ __forceinline__ void for_type_up_to(DType dtype, const Body& body) {
  if (dtype == DType::bf16) {
    body(bf16());
  } else if (dtype == DType::fp16) {
    body(fp16());
  } else if (dtype == DType::f32) {
    body(float());
  } else if constexpr (sizeof(S) == sizeof(double)) {
    body(double());
  }
}

// a, or its transpose, to memory
template <bool kTransposed, class S>
__device__ __forceinline__ void store_tile(const Tile<S>& a, S* p, int64_t row_stride, int64_t column_stride, int rows, int columns) {
  constexpr int kPack = 16 / sizeof(S);
  const auto at = [&](int r, int c) { return kTransposed ? a[c][r] : a[r][c]; };
  if (rows >= kTile && columns >= kTile && in_packs(p, row_stride, column_stride)) {
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; c += kPack) {
        Pack<S, kPack> pack;
#pragma unroll
        for (int i = 0; i < kPack; ++i) pack.values[i] = at(r, c + i);
        store_pack(pack, p + r * row_stride + c);
      }
  } else {
#pragma unroll
    for (int r = 0; r < kTile; ++r, p += row_stride) {
      S* element = p;
#pragma unroll
      for (int c = 0; c < kTile; ++c, element += column_stride)
        if (r < rows && c < columns) *element = at(r, c);
    }
  }
}

// The tile of A + damping I at an element's row and column, identity past n; on the diagonal both triangles, from the lower one. Returns
// whether it is finite.
template <class S>
__device__ __forceinline__ bool load_damped(const DeviceBlocks& batch, int64_t b, int row, int column, Tile<S>& a) {
  const int64_t offset = b * batch.in_strides.batch + row * batch.in_strides.row + column * batch.in_strides.column;
  for_type_up_to<S>(batch.in_dtype, [&](auto element) {
    using T = decltype(element);
    load_tile(static_cast<const T*>(batch.in) + offset, batch.in_strides.row, batch.in_strides.column, batch.n - row, batch.n - column, a);
  });
  if (row == column) {
    const S damping = static_cast<S>(batch.damping[b * batch.damping_stride]);
#pragma unroll
    for (int r = 0; r < kTile; ++r) {
      a[r][r] = row + r < batch.n ? a[r][r] + damping : S(1);
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

// The tile at an element's row and column, and its mirror image: -a, or a triangle's and zeros; NaN if failed.
template <CholeskyResult kResult, class S>
__device__ __forceinline__ void store_result(const DeviceBlocks& batch, int64_t b, int row, int column, bool failed, Tile<S>& a) {
#pragma unroll
  for (int r = 0; r < kTile; ++r)
#pragma unroll
    for (int c = 0; c < kTile; ++c) {
      if (kResult == CholeskyResult::inverse) a[r][c] = -a[r][c];
      if (kIsTriangular<kResult> && row == column && c > r) a[r][c] = 0;
      if (failed) a[r][c] = static_cast<S>(NAN);
    }
  const BlockStrides& strides = batch.out_strides;
  S* const out = static_cast<S*>(batch.out) + b * strides.batch;
  store_tile<false>(a, out + row * strides.row + column * strides.column, strides.row, strides.column, batch.n - row, batch.n - column);
  if (row == column) return;
  if (kIsTriangular<kResult> && !failed) {
#pragma unroll
    for (int r = 0; r < kTile; ++r)
#pragma unroll
      for (int c = 0; c < kTile; ++c) a[r][c] = 0;
  }
  store_tile<true>(a, out + column * strides.row + row * strides.column, strides.row, strides.column, batch.n - column, batch.n - row);
}

}  // namespace mfac_kernels
