// Lengths and order of the transforms
#include "lags/cpu/fft.h"

#include <cmath>
#include <numbers>

namespace mfac_kernels {
namespace {

bool is_smooth(int64_t n) {
  for (int64_t p : {2, 3, 5})
    while (n % p == 0) n /= p;
  return n == 1;
}

}  // namespace

FftLength::FftLength(int64_t at_least) : n(at_least < 1 ? 1 : at_least) {
  while (!is_smooth(n)) ++n;
  int64_t rest = n;
  for (int64_t radix : {4, 2, 3, 5})
    for (; rest % radix == 0; rest /= radix) radices.push_back(radix);
  for (int64_t i = 0; i < n; ++i) {
    const double angle = 2 * std::numbers::pi * static_cast<double>(i) / static_cast<double>(n);
    cosines.push_back(std::cos(angle));
    sines.push_back(-std::sin(angle));
  }
}

FftPlan::FftPlan(int64_t rows, int64_t columns, int64_t row_reach, int64_t column_reach)
    : rows(rows), columns(columns), y(rows + row_reach), x(columns + column_reach), kept_columns(x.n / 2 + 1) {
  first.push_back(0);
  for (int64_t kx = 0; kx < kept_columns; ++kx) first.push_back(first.back() + (2 * kx % x.n == 0 ? y.n / 2 + 1 : y.n));
}

}  // namespace mfac_kernels
