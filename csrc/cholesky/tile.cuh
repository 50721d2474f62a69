// A tile of a matrix in the registers of one thread, and its way from and to memory of any strides.
#pragma once
#include "common/convert.cuh"

namespace mfac_kernels {

constexpr int kTile = 8;

template <class S>
using Tile = S[kTile][kTile];

// Four neighbours in shared memory, read or written together.
template <class S>
struct alignas(16) Quad {
  S x[4];
};

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

}  // namespace mfac_kernels
