// Lags by way of the frequencies: with X_c the discrete Fourier transform of x_c over the image plane, padded so that no lag wraps around,
//
//   sum_n sum_p x_c(p) x_c'(p + l) = 1 / (rows columns) sum_f (sum_n conj(X_c(f)) X_c'(f)) e^{2 pi i f l}.
//
// Flops: per frequency of a half plane a Hermitian product of rank N, 4 N C^2, hence 2 N C^2 per padded pixel where each of the L lags
// takes 2 N C^2 per pixel; the transforms, 2.5 log2(rows columns) N C, and the last sum, small next to them, do not see N or C^2.
//
// Without torch. fft_impl.h computes; lags.cpp splits the work and corrects the sums at the border.
#pragma once
#include <cstdint>
#include <vector>

#include "common/types.h"

namespace mfac_kernels {

// One-dimensional transforms of one length, a product of 2, 3, 4 and 5
struct FftLength {
  int64_t n;
  std::vector<int64_t> radices;
  std::vector<double> cosines, sines;  // of -2 pi i / n, i < n

  explicit FftLength(int64_t at_least);
};

// Transforms of images of `rows` x `columns` pixels, padded to y.n x x.n, of which a half plane is kept: columns kx <= x.n / 2, and of
// those that are their own mirror images only ky <= y.n / 2.
class FftPlan {
 public:
  // Lags up to (row_reach, column_reach) pixels do not wrap around.
  FftPlan(int64_t rows, int64_t columns, int64_t row_reach, int64_t column_reach);

  int64_t rows, columns;
  FftLength y, x;
  int64_t kept_columns;
  std::vector<int64_t> first;  // frequency of column kx; first[kept_columns]: how many there are

  int64_t frequencies() const { return first.back(); }
  // How often frequency (ky, kx) stands for one of the whole plane.
  int64_t weight(int64_t ky, int64_t kx) const {
    const bool own_mirror = 2 * kx % x.n == 0;
    return own_mirror && 2 * ky % y.n == 0 ? 1 : 2;
  }
};

// Spectra of a panel (frequencies, 2, samples, tile), the parts part_step apart: real ones of all samples, then imaginary ones; twice the
// transform. Of a panel with fewer channels than a tile, the vectors past them are not touched.
struct FftKernels {
  // Of one sample and panel. spectrum: at its real part of frequency 0. work: transform_work(plan) bytes, aligned to 64.
  int64_t (*transform_work)(const FftPlan&);
  void (*transform)(const void* panel, int64_t channels, const FftPlan&, void* work, void* spectrum, int64_t part_step);

  // sums (reach, 4, tile, tile) = for each row lag ly < reach: of Re and Im of sum_n conj(a) b, their sums over the `count` frequencies of
  // a column with weights cosine, sine, cosine, sine. a has `rows` channels, b has `columns`. weights (count, reach, 2). work: a few
  // tiles.
  int64_t (*product_work)();
  void (*multiply_column)(const void* a, const void* b, int64_t rows, int64_t columns, int64_t samples, int64_t part_step, int64_t count,
                          const double* weights, int64_t reach, void* work, void* sums);
  // out (2, tile, tile) += the part of a lag that is symmetric in the operands, and the antisymmetric one; sums of its row lag
  void (*add_column)(const void* sums, double cosine, double sine, void* out);
  // forward = out[0] - out[1], backward = out[0] + out[1]
  void (*separate)(void* out);
  // out (2, tile, tile) += in
  void (*add)(const void* in, void* out);
  // Whether the pixels in rows core[0] to core[1] and columns core[2] to core[3] of a panel's images have at least 1 / 16 of the sum of
  // squares of each channel
  bool (*mostly_in_core)(const void* panel, int64_t samples, int64_t rows, int64_t columns, const int64_t core[4]);
};
const FftKernels& fft_kernels(DType);

}  // namespace mfac_kernels
