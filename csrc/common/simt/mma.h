// cuda/mma.cuh under the SIMT shim: each fragment is taken apart and put together as the layout there says, the lanes of a warp meeting as
// for a shuffle.
#pragma once
#include <bit>
#include <cmath>
#include <span>

#include "common/cuda/convert.cuh"

namespace mfac_kernels {

inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return std::isnan(x) ? 0x7fffffff : (bits + (std::isinf(x) ? 0 : 0x1000)) & 0xffffe000;
}

namespace simt {

constexpr int kLanes = kWarpSize;

// Element h of a register
template <class T>
double element_of(uint32_t bits, int h) {
  if constexpr (sizeof(T) == 4)
    return std::bit_cast<float>(bits & 0xffffe000);  // what TF32 keeps
  else
    return widen(T{static_cast<uint16_t>(bits >> 16 * h)});
}

// The sum as tensor cores are seen to make it: every term is cut to one bit more than a float of the size of the largest has, the exact sum
// of these to a float, always towards zero. Source: Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ
// Computer Science 7, 2021.
inline float add_cut(std::span<const double> terms) {
  double largest = 0, sum = 0;
  for (double term : terms) {
    largest = std::max(largest, std::abs(term));
    sum += term;
  }
  if (!std::isfinite(sum) || largest == 0) return static_cast<float>(sum);
  const double step = std::ldexp(1.0, std::ilogb(largest) - 24);
  sum = 0;
  for (double term : terms) sum += std::trunc(term / step) * step;
  const float nearest = static_cast<float>(sum);
  return std::abs(static_cast<double>(nearest)) > std::abs(sum) && std::isfinite(nearest) ? std::nextafter(nearest, 0.0f) : nearest;
}

// What a lane brings to an mma, and where it wants the result
struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
void multiply(void* const* lanes) {
  constexpr int k = kMmaDepth<T>, kTogether = k / 2;  // products added at a time
  double a[16][k], b[k][8];
  for (int l = 0; l < kLanes; ++l) {
    const auto& lane = *static_cast<const MmaLane*>(lanes[l]);
    for (int h = 0; h < kMmaPerRegister<T>; ++h) {
      for (int i = 0; i < 4; ++i) a[fragment_of_a<T>(l, i, h).row][fragment_of_a<T>(l, i, h).column] = element_of<T>(lane.a[i], h);
      for (int i = 0; i < 2; ++i) b[fragment_of_b<T>(l, i, h).row][fragment_of_b<T>(l, i, h).column] = element_of<T>(lane.b[i], h);
    }
  }
  for (int l = 0; l < kLanes; ++l) {
    const auto& lane = *static_cast<const MmaLane*>(lanes[l]);
    for (int i = 0; i < 4; ++i) {
      const Position at = fragment_of_d(l, i);
      for (int first = 0; first < k; first += kTogether) {
        double terms[kTogether + 1] = {lane.d[i]};
        for (int j = 0; j < kTogether; ++j) terms[j + 1] = a[at.row][first + j] * b[first + j][at.column];
        lane.d[i] = add_cut(terms);
      }
    }
  }
}

struct MmaLaneOfDoubles {
  double* d;
  const double *a, *b;
};

inline void multiply_doubles(void* const* lanes) {
  constexpr int k = kMmaDepth<double>;
  double a[16][k], b[k][8];
  for (int l = 0; l < kLanes; ++l) {
    const auto& lane = *static_cast<const MmaLaneOfDoubles*>(lanes[l]);
    for (int i = 0; i < 4; ++i) a[fragment_of_a<double>(l, i, 0).row][fragment_of_a<double>(l, i, 0).column] = lane.a[i];
    for (int i = 0; i < 2; ++i) b[fragment_of_b<double>(l, i, 0).row][fragment_of_b<double>(l, i, 0).column] = lane.b[i];
  }
  for (int l = 0; l < kLanes; ++l) {
    const auto& lane = *static_cast<const MmaLaneOfDoubles*>(lanes[l]);
    for (int i = 0; i < 4; ++i) {
      const Position at = fragment_of_d(l, i);
      for (int j = 0; j < k; ++j) lane.d[i] = std::fma(a[at.row][j], b[j][at.column], lane.d[i]);
    }
  }
}

struct LoadLane {
  const void* row;  // null: not asked
  uint32_t* registers;
};

template <bool kTransposed, int n>
void load(void* const* lanes) {
  for (int l = 0; l < kLanes; ++l) {
    for (int j = 0; j < n; ++j) {
      uint16_t halves[2];
      for (int h = 0; h < 2; ++h) {
        const int row = kTransposed ? 2 * (l % 4) + h : l / 4, column = kTransposed ? l / 4 : 2 * (l % 4) + h;
        const void* from = static_cast<const LoadLane*>(lanes[8 * j + row])->row;
        std::memcpy(&halves[h], static_cast<const uint16_t*>(from) + column, sizeof(uint16_t));
      }
      static_cast<const LoadLane*>(lanes[l])->registers[j] = halves[0] | uint32_t(halves[1]) << 16;
    }
  }
}

}  // namespace simt

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Location where = simt::Location::current()) {
  simt::MmaLane lane = {d, a, b};
  simt::meet_whole_warp(&simt::multiply<T>, &lane, where);
}

inline void mma(double (&d)[4], const double (&a)[4], const double (&b)[2], simt::Location where = simt::Location::current()) {
  simt::MmaLaneOfDoubles lane = {d, a, b};
  simt::meet_whole_warp(&simt::multiply_doubles, &lane, where);
}

template <bool kTransposed = false, int n, class T>
void load_matrices(uint32_t (&registers)[n], Shared<T> row, simt::Location where = simt::Location::current()) {
  static_assert((n == 1 || n == 2 || n == 4) && (!kTransposed || sizeof(T) == 2));
  const bool asked = lane_of_thread() < 8 * n;
  simt::LoadLane lane = {asked ? row.together(16 / sizeof(T), where) : nullptr, registers};
  simt::meet_whole_warp(&simt::load<kTransposed, n>, &lane, where);
}

}  // namespace mfac_kernels
