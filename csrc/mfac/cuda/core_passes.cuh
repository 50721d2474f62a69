// The two triangles of a window's core on the device, and the passes over them that solve.
//
// K = L L^T in the order of age as on the CPU (mfac/cpu/core_impl.h), and W = L^-1 beside it: the array (m, m) that is half empty there has
// W in its other half. In slot coordinates
//
//   array[y, x]  =  L[x, y]  for slots x newer than y, and for x = y;    W[y, x]  for slots x older than y;    W[y, y] = 1 / L[y, y]
//
// With W a triangular solve is no chain of m dependent steps but products, which every SM takes a share of:
//
//   L y = b       y = W b,      y += W (b - L y)           forward, forward_residual, forward_refined
//   L^T x = y     x = W^T y,    x += W^T (y - L^T x)       back, back_residual, back_refined
//
// W differs from the inverse of L by c m eps cond(L), and cond(L) is the root of cond(K): one step of refinement squares that, so solves
// are as accurate as substitution for every K that float64 can hold.
#pragma once
#include "common/cuda/launch.h"
#include "common/sizes.h"
#include "mfac/ring.h"

namespace mfac_kernels {

constexpr int kCoreThreads = 256;
constexpr int kCoreWarps = kCoreThreads / kWarpSize;
constexpr int kColumns = kCoreWarps;       // of the array, that a block takes at a time: two sectors of 32 bytes of each row
constexpr int kParts = kWarpSize;          // of the rows, for every column; the sums of a column's parts meet in one warp
constexpr int kPartStride = kColumns + 1;  // in shared memory: a column's sums lie in different banks
constexpr int kPartSums = kParts * kPartStride;
constexpr int kTogether = 8;  // loads of a thread that do not wait for each other

// The `count` oldest positions of the ring.
struct Span {
  Slots slots;
  int64_t count;
};

enum class Half { factor, inverse };

// The sum of x y over at = first, first + step, .. < end where wanted(at), (x, y) = load(at): a thread's kTogether next pairs are on their
// way at once, also at the end.
template <class Load, class Wanted>
__device__ __forceinline__ double sum_of_products(int64_t first, int64_t end, int step, Load load, Wanted wanted) {
  double sum = 0;
  for (int64_t at = first; at < end; at += kTogether * step) {
    double2 pairs[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) pairs[i] = load(min(at + i * step, end - 1));
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (at + i * step < end && wanted(at + i * step)) sum += pairs[i].x * pairs[i].y;
  }
  return sum;
}

// store(y, sum): sum of W[y, x] b[x] over positions x (Half::inverse) or of L[x, y] b[x] (Half::factor), a row of the array for each warp
template <Half half, class Store>
__device__ __forceinline__ void row_products(const double* array, const Span& span, const double* b, Store store) {
  constexpr bool kOlder = half == Half::inverse;
  for (int64_t y = int64_t(blockIdx.x) * kCoreWarps + warp_of_thread(); y < span.count; y += int64_t(gridDim.x) * kCoreWarps) {
    const int64_t slot = span.slots(y), end = kOlder ? y : span.count;
    const double *row = array + slot * span.slots.m, *pivot = row + slot;
    double sum = sum_of_products((kOlder ? 0 : y + 1) + lane_of_thread(), end, kWarpSize,
                                 [&](int64_t x) {
                                   const int64_t p = span.slots(x);
                                   return double2{row[p], b[p]};
                                 },
                                 [](int64_t) { return true; });
    sum = warp_sum(sum);
    if (lane_of_thread() == 0) store(slot, kOlder ? sum + b[slot] / *pivot : sum + b[slot] * *pivot);
  }
}

// store(x, sum): sum of W[y, x] b[y] over positions y (Half::inverse) or of L[x, y] b[y] (Half::factor), kColumns of the array for each
// block. sums: kPartSums
template <Half half, class Store>
__device__ __forceinline__ void column_products(const double* array, const Span& span, const double* b, Shared<double> sums, Store store) {
  constexpr bool kNewer = half == Half::inverse;
  const int64_t m = span.slots.m, step = int64_t(gridDim.x) * kColumns;
  const int column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  for (int64_t first = int64_t(blockIdx.x) * kColumns; first < span.count; first += step) {
    const int64_t x = min(first + column, span.count - 1), p = span.slots(x);
    const int64_t end = kNewer ? span.count : min(first + kColumns, span.count);
    double sum = sum_of_products((kNewer ? first : 0) + part, end, kParts,
                                 [&](int64_t y) {
                                   const int64_t q = span.slots(y);
                                   return double2{array[q * m + p], b[q]};
                                 },
                                 [&](int64_t y) { return y != x && (y > x) == kNewer; });
    sums[part * kPartStride + column] = sum;
    __syncthreads();
    sum = warp_sum(sums[lane_of_thread() * kPartStride + warp_of_thread()]);
    if (lane_of_thread() == 0 && first + warp_of_thread() < span.count) {
      const int64_t slot = span.slots(first + warp_of_thread());
      const double pivot = array[slot * m + slot];
      store(slot, kNewer ? sum + b[slot] / pivot : sum + b[slot] * pivot);
    }
    __syncthreads();
  }
}

enum class Pass { forward, forward_residual, forward_refined, back, back_residual, back_refined };

// (m) each, by slot; r is a work vector. After the six passes y = L^-1 b and x = L^-T y.
struct SolveVectors {
  const double* b;
  double *y, *r, *x;
};

template <Pass pass>
__device__ __forceinline__ void solve_pass(const double* array, const Span& span, const SolveVectors& v, Shared<double> sums) {
  if constexpr (pass == Pass::forward) row_products<Half::inverse>(array, span, v.b, [&](int64_t p, double sum) { v.y[p] = sum; });
  if constexpr (pass == Pass::forward_residual)
    column_products<Half::factor>(array, span, v.y, sums, [&](int64_t p, double sum) { v.r[p] = v.b[p] - sum; });
  if constexpr (pass == Pass::forward_refined) row_products<Half::inverse>(array, span, v.r, [&](int64_t p, double sum) { v.y[p] += sum; });
  if constexpr (pass == Pass::back) column_products<Half::inverse>(array, span, v.y, sums, [&](int64_t p, double sum) { v.x[p] = sum; });
  if constexpr (pass == Pass::back_residual)
    row_products<Half::factor>(array, span, v.x, [&](int64_t p, double sum) { v.r[p] = v.y[p] - sum; });
  if constexpr (pass == Pass::back_refined)
    column_products<Half::inverse>(array, span, v.r, sums, [&](int64_t p, double sum) { v.x[p] += sum; });
}

}  // namespace mfac_kernels
