// The oldest gradient leaves the core: L' L'^T = L L^T + v v^T for the newer ones, v being its column of L, and W' = L'^-1.
//
// The rotations that take v into L depend on p = L^-1 v alone, and with v goes a column of W: p = -W[:, oldest] L[oldest, oldest], with a
// step of refinement. With t_y = 1 + p_0^2 + .. + p_y^2
//
//   cosine_y = sqrt(t_{y-1} / t_y),   sine_y = p_y / sqrt(t_y)
//
// and rotation y meets row y of the array: L[x, y] of the newer x with what is left of v_x, and W[y, x] of the older x with the sum that
// column x of W carries from row to row. Rotations are orthogonal: the rounding of a replacement is of the size of eps |L| and eps |W|
// however ill-conditioned K is, and goes when its row does. What a column carries into row y has a closed form,
//
//   (v_x - sum of p_k L[x, k] over k < y) / sqrt(t_{y-1}),     (sum of p_k W[k, x] over x <= k < y) / sqrt(t_{y-1}),
//
// so that the rows of a column are cut into parts that do not wait for each other.
#pragma once
#include "mfac/cuda/core_passes.cuh"

namespace mfac_kernels {

// p is refined by its residual and W; the rotations are found (find_rotations); the triangles meet them.
enum class Drop { residual, refine, rotate };

// (m) each, by slot
struct Rotations {
  double *p, *cosine, *sine;
  double* scale;  // 1 / sqrt(t_{y-1})
};

// The sum of the values of all threads before this one, one block. scratch: kWarpSize
__device__ __forceinline__ double sum_before(double value, Shared<double> scratch) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  double sum = value;
#pragma unroll
  for (int n = 1; n < kWarpSize; n *= 2) {
    const double other = __shfl_up_sync(kAllLanes, sum, n);
    if (lane >= n) sum += other;
  }
  if (lane == kWarpSize - 1) scratch[warp] = sum;
  __syncthreads();
  const double exclusive = __shfl_up_sync(kAllLanes, sum, 1);
  return warp_sum(lane < warp ? scratch[lane] : 0) + (lane > 0 ? exclusive : 0);
}

// cosine, sine and scale from p, by one block. scratch: kWarpSize
__device__ __forceinline__ void find_rotations(const Span& span, const Rotations& r, Shared<double> scratch) {
  const int64_t each = divide_up(span.count, blockDim.x);
  const int64_t begin = min(each * threadIdx.x, span.count), end = min(begin + each, span.count);
  double square = 0;
  for (int64_t y = begin; y < end; ++y) {
    const double p = r.p[span.slots(y)];
    square += p * p;
  }
  double before = 1 + sum_before(square, scratch);
  for (int64_t y = begin; y < end; ++y) {
    const int64_t slot = span.slots(y);
    const double p = r.p[slot], after = before + p * p, root = sqrt(after);
    r.cosine[slot] = sqrt(before) / root;
    r.sine[slot] = p / root;
    r.scale[slot] = 1 / sqrt(before);
    before = after;
  }
}

// The array meets every rotation, kColumns for each block. v (m) by slot. factor_sums, inverse_sums: kPartSums
__device__ __forceinline__ void rotate(double* array, const Span& span, const double* v, const Rotations& r, Shared<double> factor_sums,
                                       Shared<double> inverse_sums) {
  const int64_t m = span.slots.m, each = divide_up(span.count, kParts), step = int64_t(gridDim.x) * kColumns;
  const int column = threadIdx.x % kColumns, part = threadIdx.x / kColumns;
  const int64_t begin = min(part * each, span.count), end = min(begin + each, span.count);
  for (int64_t first = int64_t(blockIdx.x) * kColumns; first < span.count; first += step) {
    const int64_t x = first + column, last = x < span.count ? end : begin, slot = span.slots(min(x, span.count - 1));
    const double pivot = array[slot * m + slot], inverse_pivot = 1 / pivot, new_pivot = pivot / r.cosine[slot];
    double of_factor = 0, of_inverse = 0;
#pragma unroll 8
    for (int64_t y = begin; y < last; ++y) {
      const int64_t q = span.slots(y);
      const double value = array[q * m + slot], p = r.p[q];
      if (y < x)
        of_factor += p * value;
      else
        of_inverse += p * (y == x ? inverse_pivot : value);
    }
    factor_sums[part * kPartStride + column] = of_factor;
    inverse_sums[part * kPartStride + column] = of_inverse;
    __syncthreads();
    if (begin < last) {
      const bool in_factor = begin <= x;
      double carried = in_factor ? v[slot] : 0;
      for (int k = 0; k < part; ++k) carried += in_factor ? -factor_sums[k * kPartStride + column] : inverse_sums[k * kPartStride + column];
      carried *= r.scale[span.slots(begin)];
      for (int64_t y = begin; y < last; y += kTogether) {
        double values[kTogether], cosines[kTogether], sines[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const int64_t q = span.slots(min(y + i, last - 1));
          values[i] = array[q * m + slot];
          cosines[i] = r.cosine[q];
          sines[i] = r.sine[q];
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if (y + i >= last) continue;
          const int64_t q = span.slots(y + i);
          const double cosine = cosines[i], sine = sines[i], value = values[i];
          if (y + i == x) {  // what was left of v is in the pivot; column x of W begins
            array[q * m + slot] = new_pivot;
            carried = sine * inverse_pivot;
          } else {
            const double turn = y + i < x ? sine : -sine;
            array[q * m + slot] = cosine * value + turn * carried;
            carried = cosine * carried - turn * value;
          }
        }
      }
    }
    __syncthreads();
  }
}

}  // namespace mfac_kernels
