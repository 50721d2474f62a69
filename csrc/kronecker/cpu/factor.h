// Sums over the rows of patch matrices on the CPU, and what becomes of them: the part that all ops share.
#pragma once
#include <vector>

#include "kronecker/cpu/factor_kernels.h"

namespace mfac_kernels {

// factor <- beta factor + alpha sum over rows of w row row^T
struct FactorUpdate {
  Patches patches;
  Weights weights = {nullptr, 0};
  Factor factor = {};
  double beta = 1, alpha = 1;
  // The products of the bias column with the others are `bias` times their weighted sums; its own square's sum is bias_squares.
  double bias = 1, bias_squares = 0;
  int32_t* refused = nullptr;
};
void update_factor(const FactorUpdate&);

// Several that share no factor, at once; none of them narrow. Each result has the bits that it has alone.
void update_factors(const std::vector<FactorUpdate>&);

// Many groups of a few columns each have kernels of their own.
bool is_narrow(const FactorUpdate&);
void update_narrow(const FactorUpdate&);

// out (x.channels, y.channels), contiguous, = sum over rows of w x y^T; 1 x 1 patches
void cross_products(const Patches& x, const Patches& y, const Weights&, void* out);

}  // namespace mfac_kernels
