// The m x m core of a sliding window on the device: the algorithm and the storage of mfac/cpu/core_impl.h, no number of it read by the
// host.
//
// One thread block does an insert, and one each right-hand side of a solve. Columns of the factor are taken by panels of 32:
//
//   sweep    (drop the oldest, append the newest)   the panel's triangle in one warp: lane r holds row r, rotations are dealt by shuffles;
//                                                   then every newer row meets the panel's 32 rotations in one thread
//   back     (L^T x = b)                            each column's dot product with the solved part in one warp; then the triangle in one
//
// Floor: m^2/2 doubles of the factor read and written, 4 m^2 multiply-adds for an update, all on one SM (64 a clock): 36 us at m = 1024 on
// an H200. Expected: 200-300 us, most of it in the 32 dependent steps (a square root, two divisions) of each of the m/32 triangles: about
// the time of one pass over 1 GB of window, and hidden behind nothing. What makes it bearable: 3 m/32 barriers in place of m, the loads of
// 8 columns in flight, neighbouring threads on neighbouring rows, that is on neighbouring addresses. Work vectors are in global memory,
// which L1 serves, so that m has no limit. per_gradient while the window fills, and a change of the shift, append m times: O(m^3) on one
// SM.
#include "common/cuda/launch.h"
#include "mfac/cuda/core_kernels.h"
#include "mfac/cuda/seen.cuh"
#include "mfac/ring.h"

namespace mfac_kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kPanel = kWarpSize;         // columns; a lane each
constexpr int kPanelStride = kPanel + 1;  // of the triangle in shared memory: rows start in different banks
constexpr int kTogether = 8;              // columns loaded at a time

struct Scratch {
  Shared<double> triangle;              // (kPanel, kPanelStride), row by row
  Shared<double> cosine, sine, y, sum;  // kPanel each
};

// triangle <- rows and columns [first, first + n) of L, for neighbouring threads down a column; above the diagonal it stays as it is
__device__ __forceinline__ void load_triangle(const double* factor, Slots slots, int64_t first, int n, Shared<double> triangle) {
  for (int i = threadIdx.x; i < n * kPanel; i += kThreads) {
    const int row = i % kPanel, column = i / kPanel;
    if (row < n && row >= column) triangle[row * kPanelStride + column] = factor[slots(first + column) * slots.m + slots(first + row)];
  }
  __syncthreads();
}

// L L^T <- L L^T + v v^T (if kUpdate) and b <- L^-1 b over the `count` oldest positions; b becomes row `slot` of L (if slot >= 0).
template <bool kUpdate>
__device__ __forceinline__ void sweep(double* factor, Slots slots, int64_t count, double* v, double* b, int64_t slot, const Scratch& s) {
  const int64_t m = slots.m;
  for (int64_t first = 0; first < count; first += kPanel) {
    const int n = static_cast<int>(min(int64_t(kPanel), count - first));
    load_triangle(factor, slots, first, n, s.triangle);
    if (warp_of_thread() == 0) {
      const int row = lane_of_thread();
      const bool inside = row < n;
      const int64_t p = slots(first + (inside ? row : 0));
      double vp = kUpdate && inside ? v[p] : 0, bp = inside ? b[p] : 0;
      for (int column = 0; column < n; ++column) {
        double l = inside && row >= column ? s.triangle[row * kPanelStride + column] : 0, cosine = 1, sine = 0;
        double pivot = read_lane(l, column);
        if constexpr (kUpdate) {
          const double vc = read_lane(vp, column), norm = sqrt(pivot * pivot + vc * vc);
          cosine = pivot / norm;
          sine = vc / norm;
          const double rotated = cosine * l + sine * vp;
          vp = cosine * vp - sine * l;
          l = row == column ? norm : rotated;
          pivot = norm;
          if (inside && row >= column) s.triangle[row * kPanelStride + column] = l;
        }
        const double y = read_lane(bp, column) / pivot;
        bp = row > column ? bp - y * l : row == column ? y : bp;
        if (row == 0) {
          s.cosine[column] = cosine;
          s.sine[column] = sine;
          s.y[column] = y;
        }
      }
      if (inside) {
        b[p] = bp;
        if (slot >= 0) factor[p * m + slot] = bp;
      }
    }
    __syncthreads();
    if constexpr (kUpdate) {
      for (int i = threadIdx.x; i < n * kPanel; i += kThreads) {
        const int row = i % kPanel, column = i / kPanel;
        if (row < n && row >= column) factor[slots(first + column) * m + slots(first + row)] = s.triangle[row * kPanelStride + column];
      }
    }
    for (int64_t position = first + n + threadIdx.x; position < count; position += kThreads) {
      const int64_t p = slots(position);
      double vp = kUpdate ? v[p] : 0, bp = b[p];
      for (int column = 0; column < n; column += kTogether) {
        double l[kTogether];
#pragma unroll
        for (int c = 0; c < kTogether; ++c) l[c] = column + c < n ? factor[slots(first + column + c) * m + p] : 0;
#pragma unroll
        for (int c = 0; c < kTogether; ++c) {
          if (column + c >= n) continue;
          if constexpr (kUpdate) {
            const double cosine = s.cosine[column + c], sine = s.sine[column + c], rotated = cosine * l[c] + sine * vp;
            vp = cosine * vp - sine * l[c];
            l[c] = rotated;
            factor[slots(first + column + c) * m + p] = rotated;
          }
          bp -= s.y[column + c] * l[c];
        }
      }
      if constexpr (kUpdate) v[p] = vp;
      b[p] = bp;
    }
    __syncthreads();
  }
}

// x <- L^-T x over the `count` oldest positions, newest panels first
__device__ __forceinline__ void back_substitute(const double* factor, Slots slots, int64_t count, double* x, const Scratch& s) {
  const int64_t m = slots.m;
  for (int64_t end = count; end > 0; end -= min(end, int64_t(kPanel))) {
    const int n = static_cast<int>(min(int64_t(kPanel), end));
    const int64_t first = end - n;
    for (int column = warp_of_thread(); column < n; column += kWarps) {
      const double* l = factor + slots(first + column) * m;
      double sum = 0;
      for (int64_t position = end + lane_of_thread(); position < count; position += kWarpSize) {
        const int64_t p = slots(position);
        sum += l[p] * x[p];
      }
      sum = warp_sum(sum);
      if (lane_of_thread() == 0) s.sum[column] = sum;
    }
    load_triangle(factor, slots, first, n, s.triangle);
    if (warp_of_thread() == 0) {
      const int column = lane_of_thread();
      const bool inside = column < n;
      const int64_t p = slots(first + (inside ? column : 0));
      double rest = inside ? x[p] - s.sum[column] : 0;
      for (int row = n - 1; row >= 0; --row) {
        const double solved = read_lane(rest, row) / s.triangle[row * kPanelStride + row];
        if (column == row) rest = solved;
        if (column < row) rest -= s.triangle[row * kPanelStride + column] * solved;
      }
      if (inside) x[p] = rest;
    }
    __syncthreads();
  }
}

// Replaces the gradient in `slot` (absent: a zero row) by one with Gram row `dots`; `older` slots before it hold gradients. With
// drop_oldest the slot held the oldest gradient, which leaves the factor. work: 2 m.
__device__ __forceinline__ void replace(double* factor, int64_t m, int64_t slot, int64_t older, bool drop_oldest, const double* dots,
                                        double shift, double* work, const Scratch& s) {
  double *v = work, *b = work + m;
  const Slots slots = {m, slot >= older ? slot - older : slot + m - older};
  for (int64_t p = threadIdx.x; p < m; p += kThreads) {
    b[p] = dots[p];
    if (drop_oldest) v[p] = factor[slot * m + p];
  }
  __syncthreads();
  if (drop_oldest)
    sweep<true>(factor, slots, older, v, b, slot, s);
  else
    sweep<false>(factor, slots, older, nullptr, b, slot, s);
  double square = 0;
  for (int64_t position = threadIdx.x; position < older; position += kThreads) {
    const double l = b[slots(position)];
    square += l * l;
  }
  square = block_sum(square, s.sum);
  if (threadIdx.x == 0) {
    // K - shift I is positive semidefinite: no pivot is below shift, nor below the rounding of the sum it comes from.
    const double whole = dots[slot] + shift, least = max(shift, static_cast<double>(m) * 0x1p-52 * whole);
    factor[slot * m + slot] = sqrt(max(whole - square, least));
  }
  __syncthreads();
}

__device__ __forceinline__ void refactor(const double* gram, double* factor, const Ring& ring, double* work, const Scratch& s) {
  const int64_t m = ring.slots.m;
  for (int64_t i = threadIdx.x; i < m * m; i += kThreads) factor[i] = 0;
  __syncthreads();
  for (int64_t age = 0; age < ring.filled; ++age) {
    const int64_t slot = ring.slots(age);
    replace(factor, m, slot, age, false, gram + slot * m, ring.shift, work, s);
  }
}

#define MFAC_CORE_SCRATCH(name)                        \
  MFAC_SHARED(double, triangle, kPanel* kPanelStride); \
  MFAC_SHARED(double, cosine, kPanel);                 \
  MFAC_SHARED(double, sine, kPanel);                   \
  MFAC_SHARED(double, y, kPanel);                      \
  MFAC_SHARED(double, sum, kWarpSize);                 \
  const Scratch name = {triangle, cosine, sine, y, sum}

__global__ void __launch_bounds__(kThreads, 1) insert_kernel(double* gram, double* factor, int64_t* state, const double* dots, int64_t m,
                                                             double shift, bool per_gradient, double* work, double* coefficients) {
  MFAC_CORE_SCRATCH(scratch);
  int refused = 0;
  for (int64_t p = threadIdx.x; p < m; p += kThreads) {
    refused |= !isfinite(dots[p]);
    coefficients[p] = 0;
  }
  refused = __syncthreads_or(refused);
  const int64_t seen = seen_of(state);
  __syncthreads();  // until every thread has read the state
  if (threadIdx.x == 0) ++state[refused ? 1 : 0];
  if (refused) return;

  const bool full = seen >= m;
  const int64_t slot = seen % m;
  for (int64_t p = threadIdx.x; p < m; p += kThreads) gram[slot * m + p] = dots[p];
  const Ring ring = ring_of(m, seen + 1, shift, per_gradient);
  if (per_gradient && !full && ring.filled > 1) {
    __syncthreads();
    refactor(gram, factor, ring, work, scratch);  // the shift grows with every gradient until the window is full
  } else {
    replace(factor, m, slot, ring.filled - 1, full, dots, ring.shift, work, scratch);
  }
  if (threadIdx.x == 0) coefficients[slot] = 1 / factor[slot * m + slot];
  __syncthreads();
  back_substitute(factor, ring.slots, ring.filled, coefficients, scratch);
}

__global__ void __launch_bounds__(kThreads)
    solve_kernel(double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient, double* all) {
  MFAC_CORE_SCRATCH(scratch);
  const Ring ring = ring_of(m, seen_of(state), shift, per_gradient);
  double* x = all + blockIdx.x * m;
  sweep<false>(factor, ring.slots, ring.filled, nullptr, x, -1, scratch);
  back_substitute(factor, ring.slots, ring.filled, x, scratch);
  for (int64_t position = ring.filled + threadIdx.x; position < m; position += kThreads) x[ring.slots(position)] /= ring.shift;
}

__global__ void __launch_bounds__(kThreads, 1)
    refactor_kernel(const double* gram, double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient, double* work) {
  MFAC_CORE_SCRATCH(scratch);
  refactor(gram, factor, ring_of(m, seen_of(state), shift, per_gradient), work, scratch);
}

}  // namespace

cudaError_t core_insert(double* gram, double* factor, int64_t* state, const double* dots, int64_t m, double shift, bool per_gradient,
                        double* work, double* coefficients, cudaStream_t stream) {
  return launch(insert_kernel, dim3(1), dim3(kThreads), 0, stream, gram, factor, state, dots, m, shift, per_gradient, work, coefficients);
}

cudaError_t core_solve(const double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient, double* x, int64_t vectors,
                       cudaStream_t stream) {
  if (vectors == 0) return cudaSuccess;
  // Without an update the factor is only read.
  return launch(solve_kernel, dim3(static_cast<unsigned>(vectors)), dim3(kThreads), 0, stream, const_cast<double*>(factor), state, m, shift,
                per_gradient, x);
}

cudaError_t core_refactor(const double* gram, double* factor, const int64_t* state, int64_t m, double shift, bool per_gradient,
                          double* work, cudaStream_t stream) {
  return launch(refactor_kernel, dim3(1), dim3(kThreads), 0, stream, gram, factor, state, m, shift, per_gradient, work);
}

}  // namespace mfac_kernels
